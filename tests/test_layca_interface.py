"""What users of torch's optimizers take for granted: schedulers, groups, closures, hooks, scalers."""

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from contract.cases import angle, give_gradients
from layca_cases import backward, every_base, layers, network
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pl_layer_rotation import Layca

SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.3, 0.1], total_steps=8),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.contract("O33")
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_see_an_ordinary_optimizer(make: Any) -> None:
    def groups() -> list[dict[str, Any]]:
        first, second = layers()[:2]
        return [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}]

    ours, theirs = Layca(groups(), momentum=0.9), torch.optim.SGD(groups(), momentum=0.9)
    schedulers = [make(optimizer) for optimizer in (ours, theirs)]
    for step in range(6):
        tensor = ours.param_groups[0]["params"][0]
        before = tensor.detach().clone()
        for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
            give_gradients([p for g in optimizer.param_groups for p in g["params"]], step)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
        assert angle(before, tensor) == pytest.approx(math.atan(rate), rel=1e-4)
        for key in ("lr", "momentum"):
            assert [g[key] for g in ours.param_groups] == [g[key] for g in theirs.param_groups]


@pytest.mark.contract("O34")
def test_schedulers_act_after_a_state_was_loaded() -> None:
    (weight,) = layers()[:1]
    optimizer = Layca([weight], lr=0.1)
    optimizer.load_state_dict(Layca(layers()[:1], lr=0.1).state_dict())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    give_gradients([weight], 0)
    optimizer.step()
    scheduler.step()
    before = weight.detach().clone()
    optimizer.step()
    assert angle(before, weight) == pytest.approx(math.atan(0.05), rel=1e-5)


@pytest.mark.contract("O18")
def test_a_tensor_lr_stays_a_tensor_and_is_obeyed() -> None:
    (weight,) = layers()[1:2]
    rate = torch.tensor(0.1)
    optimizer = Layca([weight], lr=rate)
    give_gradients([weight], 0)
    before = weight.detach().clone()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-5)


@pytest.mark.contract("O23")
def test_a_group_added_later_takes_the_defaults() -> None:
    first, second = layers()[:2]
    optimizer = Layca([first], lr=0.1, base="AdamW")
    optimizer.add_param_group({"params": [second]})
    assert {k: v for k, v in optimizer.param_groups[1].items() if k != "params"} == {
        k: v for k, v in optimizer.param_groups[0].items() if k != "params"
    }
    before = second.detach().clone()
    give_gradients([first, second], 0)
    optimizer.step()
    assert angle(before, second) == pytest.approx(math.atan(0.1), rel=1e-5)


@pytest.mark.contract("O19")
def test_the_closure_runs_once_with_gradients_and_its_loss_comes_back() -> None:
    net = network()
    optimizer = Layca(net.parameters())
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        backward(net)
        return torch.tensor(1.5)

    before = net[0].weight.detach().clone()
    assert optimizer.step(closure) == 1.5
    assert calls == [True]
    assert angle(before, net[0].weight) == pytest.approx(math.atan(3**-3), rel=1e-5)
    assert optimizer.step() is None


@pytest.mark.contract("O22")
def test_hooks_fire_once_a_step() -> None:
    (weight,) = layers()[:1]
    optimizer = Layca([weight], base="Adam")
    seen: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(type(o).__name__)),
    ]
    give_gradients([weight], 0)
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert seen == ["pre", "post", "Layca"]


@pytest.mark.contract("O20")
@every_base
def test_freezing_and_unfreezing_between_steps(base: Any, options: dict[str, Any], twin: Any) -> None:
    kernels = [{}, {"foreach": True}, {"foreach": False}]
    results = []
    for kernel in kernels:
        tensors = layers(torch.float64)[:3]
        optimizer = Layca(tensors, base=base, **options, **kernel)
        for step in range(5):
            give_gradients(tensors, step)
            if step < 2:
                tensors[1].grad = None
            optimizer.step()
        results.append(tensors)
    for other in results[1:]:
        assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(results[0], other, strict=True))


@pytest.mark.contract("O24")
def test_an_exception_of_the_base_leaves_the_weights_alone() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = Layca(embedding.parameters(), base="Adam")
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    embedding.weight.grad = torch.randn(5, 3)
    optimizer.step()
    assert angle(before, embedding.weight) == pytest.approx(math.atan(3**-3), rel=1e-5)


@pytest.mark.contract("O28")
def test_no_gradient_is_kept_alive() -> None:
    (weight,) = layers()[:1]
    optimizer = Layca([weight], base="Adam")
    give_gradients([weight], 0)
    optimizer.step()
    reference = weakref.ref(weight.grad)
    optimizer.zero_grad()
    assert reference() is None


@pytest.mark.contract("O6", "O40")
@pytest.mark.parametrize("fused", [None, True])
def test_an_overflow_under_a_gradient_scaler_is_skipped_whole(fused: bool | None) -> None:
    net = network()
    optimizer = Layca(net.parameters(), base="AdamW", fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = copy.deepcopy(net)
    scaler.scale(net(torch.ones(1, 2, 4, 4)).sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))
    net.zero_grad()
    scaler.scale(net(torch.ones(1, 2, 4, 4)).square().sum()).backward()
    scaler.step(optimizer)
    assert angle(before[0].weight, net[0].weight) == pytest.approx(math.atan(3**-3), rel=1e-5)


@pytest.mark.contract("O15")
def test_named_parameters_keep_their_names() -> None:
    net = network()
    optimizer = Layca(net.named_parameters(), base="Adam")
    names = [name for name, _ in net.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
