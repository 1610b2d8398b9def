"""Layca against an independent numpy twin, and what users of torch's optimizers take for granted."""

import copy
import functools
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference_optimizers as twins
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pl_layer_rotation import Layca, layer_rotation

BASES = {
    "sgd": (torch.optim.SGD, {}, twins.sgd),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, lambda: twins.sgd(0.9)),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, lambda: twins.sgd(0.9, True)),
    "adam": (torch.optim.Adam, {}, twins.adam),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.99)}, lambda: twins.adam(0.8, 0.99)),
    "rmsprop": (torch.optim.RMSprop, {}, twins.rmsprop),
    "adagrad": (torch.optim.Adagrad, {}, twins.adagrad),
}
every_base = pytest.mark.parametrize(("base", "options", "twin"), BASES.values(), ids=BASES)


def angle(before: Tensor, after: Tensor) -> float:
    distance = float(layer_rotation(after, before))
    return math.atan2(math.sqrt(distance * (2 - distance)), 1 - distance)


def norm(tensor: Tensor) -> float:
    return float(tensor.detach().norm(dtype=torch.float64))


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def backward(net: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    dtype = next(net.parameters()).dtype
    net.zero_grad()
    net(torch.randn(5, 2, 4, 4, generator=generator, dtype=dtype)).square().mean().backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        backward(net, step)
        optimizer.step()


@pytest.mark.contract("O1")
@every_base
@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"foreach": False}], ids=["default", "foreach", "loop"])
def test_sixty_steps_equal_the_four_steps_of_the_paper(
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    twin: Callable[[], twins.Direction],
    kernel: dict[str, Any],
) -> None:
    net = network(torch.float64)
    optimizer = Layca(net.parameters(), lr=0.03, base=base, **options, **kernel)
    layers = [p for p in net.parameters() if p.dim() > 1]
    initial = [p.detach().numpy().copy() for p in layers]
    expected = [array.copy() for array in initial]
    directions = [twin() for _ in layers]
    for step in range(60):
        backward(net, step)
        gradients = [p.grad.numpy().copy() for p in layers]
        optimizer.step()
        for i, gradient in enumerate(gradients):
            expected[i] = twins.layca(expected[i], initial[i], directions[i](gradient), 0.03)
    for parameter, array in zip(layers, expected, strict=True):
        error = np.linalg.norm(parameter.detach().numpy() - array) / np.linalg.norm(array)
        assert error < 1e-10


def random_gradients(tensors: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale).to(tensor.dtype)


def layers(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 2, 3, 3), (40, 30), (1, 7), (3000, 100)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


@pytest.mark.contract("O1")
@every_base
@pytest.mark.parametrize("lr", [1e-6, 3**-5, 3**-3, 1.0])
def test_a_step_turns_by_the_requested_angle(base: Any, options: dict[str, Any], twin: Any, lr: float) -> None:
    # Below 1e-4 the rounding of fp32 weights is itself an angle of 3e-8.
    tensors = layers(torch.float64 if lr < 1e-4 else torch.float32)
    optimizer = Layca(tensors, lr=lr, base=base, **options)
    for step in range(3):
        before = [tensor.detach().clone() for tensor in tensors]
        random_gradients(tensors, step)
        optimizer.step()
        for old, new in zip(before, tensors, strict=True):
            assert angle(old, new) == pytest.approx(math.atan(lr), rel=1e-5)
            assert norm(new) == pytest.approx(norm(old), rel=1e-6)


@pytest.mark.contract("O3")
@pytest.mark.parametrize(("base", "scale"), [("SGD", 1e-30), ("SGD", 1e30), ("Adam", 1e-30)])
def test_the_scale_of_gradients_does_not_matter(base: str, scale: float) -> None:
    tensors, scaled = layers(), layers()
    options = {"eps": 1e-45} if base == "Adam" else {"momentum": 0.9}
    for some, factor in ((tensors, 1.0), (scaled, scale)):
        optimizer = Layca(some, base=base, **options)
        for step in range(2):
            random_gradients(some, step, factor)
            optimizer.step()
    start = layers()
    for one, other, old in zip(tensors, scaled, start, strict=True):
        if base == "SGD":
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert angle(old, other) > 3**-3


@pytest.mark.contract("O2")
def test_the_norm_is_kept_over_ten_thousand_steps() -> None:
    weight = nn.Parameter(torch.randn(20, 30, generator=torch.Generator().manual_seed(0)))
    start = norm(weight)
    optimizer = Layca([weight], lr=1e-2, momentum=0.9)
    for step in range(10_000):
        random_gradients([weight], step)
        optimizer.step()
    assert norm(weight) == pytest.approx(start, rel=1e-6)


@pytest.mark.contract("O1")
@pytest.mark.parametrize("sine", [1e-1, 1e-3, 1e-5])
def test_nearly_radial_steps_turn_by_the_requested_angle(sine: float) -> None:
    weight = nn.Parameter(torch.randn(200, 300, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    across = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    across -= (across * before).sum() / before.square().sum() * before
    weight.grad = before + sine * across * (before.norm() / across.norm())
    Layca([weight], lr=0.1).step()
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-4)


@pytest.mark.contract("O5", "O8")
@pytest.mark.parametrize("gradient", ["zero", "radial", "none"])
def test_without_a_direction_a_layer_stays_bitwise(gradient: str) -> None:
    weight = nn.Parameter(torch.randn(30, 20))
    before = weight.detach().clone()
    weight.grad = {"zero": torch.zeros_like(before), "radial": before.clone(), "none": None}[gradient]
    Layca([weight], lr=0.1).step()
    assert torch.equal(weight, before)


@pytest.mark.contract("O5")
def test_a_learning_rate_of_zero_moves_nothing_but_builds_the_state() -> None:
    net = network()
    before = copy.deepcopy(net)
    optimizer = Layca(net.parameters(), lr=0.0, base="Adam")
    train(net, optimizer, 0, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))
    assert all({"exp_avg", "initial_norm"} <= optimizer.state[p].keys() for p in net.parameters())


@pytest.mark.contract("O6")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_reaches_its_layer_and_no_other(bad: float) -> None:
    tensors, alone = layers(), layers()
    random_gradients(tensors, 0)
    random_gradients(alone, 0)
    tensors[1].grad[0, 0] = bad
    Layca(tensors).step()
    Layca(alone).step()
    assert tensors[1].isnan().any()
    assert all(torch.equal(tensors[i], alone[i]) for i in (0, 2, 3))


@pytest.mark.contract("O7")
def test_a_layer_of_zeros_is_refused_by_name() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "lora_b": nn.Linear(3, 2, bias=False)})
    nn.init.zeros_(net["lora_b"].weight)
    optimizer = Layca(net.named_parameters())
    net["lora_b"](net["a"](torch.ones(1, 3))).sum().backward()
    with pytest.raises(
        RuntimeError,
        match=r"`params` with `rotate=True` must not be all zeros, got 'lora_b.weight': a layer of zeros has no "
        r"direction to turn. Put it into a group with `rotate=False`, as `layca_optimizers` does, or initialize it.",
    ):
        optimizer.step()


def test_tensors_that_fsdp1_flattened_are_refused() -> None:
    weight = nn.Parameter(torch.ones(12))
    weight._fsdp_flattened = True  # type: ignore[attr-defined]  # as FSDP1 marks them
    weight.grad = torch.ones(12)
    optimizer = Layca([weight])
    for _ in range(2):  # a second try is no plain step either
        with pytest.raises(
            RuntimeError, match=r"`params` must keep their shape, got parameter 0 .*, flattened by FSDP1"
        ):
            optimizer.step()
    assert torch.equal(weight, torch.ones(12))


@pytest.mark.contract("O8", "O16")
@every_base
def test_plain_tensors_take_the_steps_of_the_base(base: Any, options: dict[str, Any], twin: Any) -> None:
    tensors = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.tensor([[2.0]]))]
    clones = copy.deepcopy(tensors)
    groups = [
        {"params": tensors[:1], "lr": 0.1},
        {"params": tensors[1:2], "rotate": False, "lr": 0.2},
        {"params": tensors[2:], "lr": 0.3},
    ]
    ours = Layca(groups, base=base, **options)
    weight_decay = {"weight_decay": 0.0} if base is torch.optim.AdamW else {}
    theirs = base(
        [
            {"params": [c], "lr": lr, **(weight_decay if lr != 0.2 else {})}
            for c, lr in zip(clones, (0.1, 0.2, 0.3), strict=True)
        ],
        **options,
    )
    for step in range(3):
        for some, optimizer in ((tensors, ours), (clones, theirs)):
            random_gradients(some, step)
            optimizer.step()
    for one, other in zip(tensors, clones, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.contract("O10")
def test_maximize_turns_the_other_way() -> None:
    (weight,), (mirror,) = layers()[:1], layers()[:1]
    before = weight.detach().clone()
    for tensor, maximize in ((weight, False), (mirror, True)):
        random_gradients([tensor], 0)
        Layca([tensor], maximize=maximize).step()
    assert angle(weight, mirror) == pytest.approx(2 * math.atan(3**-3), rel=1e-4)
    assert angle(before, mirror) == pytest.approx(math.atan(3**-3), rel=1e-5)


def test_without_projection_the_update_is_hyperball() -> None:
    (weight,) = layers(torch.float64)[1:2]
    before = weight.detach().clone()
    random_gradients([weight], 0)
    Layca([weight], lr=0.1, tangential=False).step()
    moved = before - 0.1 * before.norm() * weight.grad / weight.grad.norm()
    torch.testing.assert_close(weight.detach(), moved * before.norm() / moved.norm(), rtol=1e-12, atol=1e-12)


def layout(kind: str) -> nn.Parameter:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    if kind == "channels_last":
        return nn.Parameter(weight.to(memory_format=torch.channels_last))
    if kind == "transposed":
        return nn.Parameter(weight.transpose(0, 1))
    return nn.Parameter(torch.randn(8, 4, 3, 6, generator=torch.Generator().manual_seed(0))[..., ::2])


@pytest.mark.contract("O9")
@pytest.mark.parametrize("kind", ["channels_last", "transposed", "sliced"])
def test_the_layout_of_weights_is_kept_and_does_not_matter(kind: str) -> None:
    weight = layout(kind)
    plain = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    strides = weight.stride()
    for tensor in (weight, plain):
        optimizer = Layca([tensor], base="AdamW")
        for step in range(3):
            random_gradients([tensor], step)
            optimizer.step()
    assert weight.stride() == strides
    torch.testing.assert_close(weight, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.contract("O21", "O26")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.complex64, 1e-5)]
)
def test_other_dtypes_turn_by_the_angle_within_their_resolution(dtype: torch.dtype, tolerance: float) -> None:
    weight = nn.Parameter(torch.randn(60, 50, generator=torch.Generator().manual_seed(0)).to(dtype))
    if dtype.is_complex:
        weight = nn.Parameter(weight.detach() * (1 + 0.5j))
    before = weight.detach().clone()
    weight.grad = torch.randn(60, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    Layca([weight], lr=0.1).step()
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=tolerance)


def test_layers_larger_than_the_scratch_and_many_small_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(2300, 2000), *[(9, 9)] * 50]]
    before = [tensor.detach().clone() for tensor in tensors]
    random_gradients(tensors, 0)
    Layca(tensors, lr=0.05, base="Adam").step()
    for old, new in zip(before, tensors, strict=True):
        assert angle(old, new) == pytest.approx(math.atan(0.05), rel=1e-5)


@pytest.mark.contract("O1")
@given(
    lr=st.floats(1e-3, 2.0),
    shape=st.sampled_from([(2, 1), (3, 2), (5, 4, 2), (4, 3, 2, 2)]),
    seed=st.integers(0, 2**20),
    scale=st.floats(1e-6, 1e6),
)
@settings(deadline=None, max_examples=60)
def test_angle_and_norm_for_any_layer(lr: float, shape: tuple[int, ...], seed: int, scale: float) -> None:
    weight = nn.Parameter(
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    )
    before = weight.detach().clone()
    random_gradients([weight], seed + 1)
    Layca([weight], lr=lr).step()
    assert angle(before, weight) == pytest.approx(math.atan(lr), rel=1e-7)
    assert float(weight.detach().norm()) == pytest.approx(float(before.norm()), rel=1e-12)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded: dict[str, Any] = torch.load(stream, weights_only=True)
    return loaded


@pytest.mark.contract("O12", "O13", "O35")
@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_training_goes_on_bit_by_bit(
    base: Any, options: dict[str, Any], twin: Any, dtype: torch.dtype, way: str
) -> None:
    net = network(dtype)
    optimizer = Layca(net.parameters(), base=base, **options)
    train(net, optimizer, 0, 3)
    if way == "state_dict":
        other = network(dtype)
        other.load_state_dict(through_a_file(net.state_dict()))
        resumed = Layca(other.parameters(), lr=0.5, base=base, **options)
        resumed.load_state_dict(state_dict=through_a_file(optimizer.state_dict()))
    else:
        twins_of_both = copy.deepcopy if way == "deepcopy" else lambda both: pickle.loads(pickle.dumps(both))
        other, resumed = twins_of_both((net, optimizer))
    train(net, optimizer, 3, 6)
    train(other, resumed, 3, 6)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.contract("O35", "O36")
def test_loading_leaves_the_given_state_alone_and_keeps_norms_exact() -> None:
    net = network(torch.bfloat16)
    optimizer = Layca(net.parameters())
    train(net, optimizer, 0, 1)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    Layca(network(torch.bfloat16).parameters()).load_state_dict(state)
    norms = [entry["initial_norm"] for entry in state["state"].values()]
    assert all(norm.dtype == torch.float32 and norm.dim() == 0 for norm in norms)
    assert [float(n) for n in norms] == [float(entry["initial_norm"]) for entry in before["state"].values()]


@pytest.mark.contract("O37")
def test_the_state_of_another_base_is_refused_by_name() -> None:
    state = Layca(layers(), base="SGD").state_dict()
    with pytest.raises(
        ValueError, match=r"`state_dict` must come from Layca over AdamW, got groups without betas, eps\."
    ):
        Layca(layers(), base="AdamW").load_state_dict(state)


@pytest.mark.contract("O37")
def test_the_state_of_other_tensors_is_refused_before_a_kernel_reads_past_its_end() -> None:
    saved, ours = nn.Linear(3, 2, bias=False), nn.Linear(5, 4, bias=False)
    optimizer = Layca(saved.parameters(), base="AdamW")
    random_gradients(list(saved.parameters()), 0)
    optimizer.step()
    message = r"`state_dict` must come from .* got exp_avg of shape \(2, 3\) for parameter 0 of group 0 \(4, 5\)"
    with pytest.raises(ValueError, match=message):
        Layca(ours.parameters(), base="AdamW").load_state_dict(optimizer.state_dict())


@pytest.mark.contract("O37")
def test_the_state_of_the_plain_base_leaves_our_options_as_they_are() -> None:
    first, second = layers()[:2]
    groups = [{"params": [first], "lr": 1e-3, "weight_decay": 0.1}, {"params": [second], "lr": 1e-3}]
    plain = torch.optim.AdamW(groups)
    random_gradients([first, second], 0)
    plain.step()
    ours = [
        {"params": [first], "lr": 0.05, "name": "rotating"},
        {"params": [second], "lr": 0.01, "name": "plain", "rotate": False},
    ]
    optimizer = Layca(ours, base="AdamW")
    with pytest.warns(UserWarning, match="Layca loaded the state of a plain optimizer"):
        optimizer.load_state_dict(plain.state_dict())
    kept = [(g["name"], g["lr"], g["rotate"], g["weight_decay"]) for g in optimizer.param_groups]
    assert kept == [("rotating", 0.05, True, 0.0), ("plain", 0.01, False, 0.01)]
    assert torch.equal(optimizer.state[first]["exp_avg"], plain.state[first]["exp_avg"])
    before = first.detach().clone()
    optimizer.step()
    assert angle(before, first) == pytest.approx(math.atan(0.05), rel=1e-5)


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
            random_gradients([p for g in optimizer.param_groups for p in g["params"]], step)
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
    random_gradients([weight], 0)
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
    random_gradients([weight], 0)
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
    random_gradients([first, second], 0)
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
    random_gradients([weight], 0)
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
            random_gradients(tensors, step)
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
    random_gradients([weight], 0)
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


def base_from_a_function(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, betas=(0.8, 0.99))


def test_the_base_may_be_a_class_a_name_or_a_function() -> None:
    results = []
    for base, options in (
        (torch.optim.Adam, {"betas": (0.8, 0.99)}),
        ("Adam", {"betas": (0.8, 0.99)}),
        (base_from_a_function, {}),
        (functools.partial(torch.optim.Adam, betas=(0.8, 0.99)), {}),
    ):
        net = network()
        train(net, Layca(net.parameters(), base=base, **options), 0, 3)
        results.append(net[0].weight.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


class NeedsTheWeights(torch.optim.SGD):
    """Multiplicative updates: each weight moves in proportion to its size."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.abs() * parameter.grad, alpha=-group["lr"])


@pytest.mark.contract("O14", "O42")
@pytest.mark.parametrize("base", [NeedsTheWeights, torch.optim.LBFGS, torch.optim.SparseAdam])
def test_a_base_that_needs_more_than_gradients_is_refused_by_name(base: Any) -> None:
    message = f"`base` must give a direction that depends on gradients alone, got {base.__name__}, which needs"
    with pytest.raises(ValueError, match=message):
        Layca(layers(), base=base)


OTHER_BASES = ["NAdam", "RAdam", "Adadelta", "Adamax", "ASGD", "Rprop", "Adafactor"]


@pytest.mark.parametrize("base", OTHER_BASES)
def test_the_other_optimizers_of_torch_are_taken(base: str) -> None:
    (weight,) = layers()[1:2]
    before = weight.detach().clone()
    random_gradients([weight], 0)
    Layca([weight], lr=0.1, base=base).step()
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-5)


@pytest.mark.contract("O14")
@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, "fast", None])
def test_a_bad_lr_is_refused(lr: Any) -> None:
    message = rf"`lr` must be a finite number of at least 0, got {lr!r}\. Try 3\*\*-3, an angle of 2\.1 degrees\."
    with pytest.raises(ValueError, match=message):
        Layca(layers(), lr=lr)
    with pytest.raises(ValueError, match=message):
        Layca([{"params": layers(), "lr": lr}])


@pytest.mark.contract("O14")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"base": "AdamX"},
            ValueError,
            r"`base` must name an optimizer of torch\.optim, got 'AdamX'\. Similar names: 'Adam",
        ),
        ({"base": 3}, TypeError, r"`base` must be an optimizer class, its name or a function .*, got 3\. Pass"),
        ({"base": lambda params: None}, TypeError, r"`base` must make a torch optimizer, got None"),
        (
            {"speed": 1},
            TypeError,
            r"`speed` must be an option of the base optimizer SGD, got speed=1\. Its options are momentum",
        ),
        (
            {"weight_decay": 0.1},
            ValueError,
            r"`weight_decay` must be 0 in a rotating group, got 0\.1: the norm of a rotating",
        ),
        ({"differentiable": True}, ValueError, r"`differentiable` must be False, got True\."),
        ({"momentum": -1.0}, ValueError, "Invalid momentum value"),
    ],
)
def test_bad_options_are_named_with_their_mend(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layca(layers(), **options)


@pytest.mark.contract("O14")
def test_weight_decay_acts_in_plain_groups_only() -> None:
    rotating, plain = layers()[:2]
    groups = [{"params": [rotating]}, {"params": [plain], "rotate": False, "weight_decay": 0.2}]
    optimizer = Layca(groups, base="AdamW")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2]
    with pytest.raises(ValueError, match=r"`weight_decay` must be 0 in a rotating group, got 0\.3"):
        Layca([{"params": [rotating], "weight_decay": 0.3}], base="AdamW")


@pytest.mark.contract("O14")
def test_parameters_are_refused_as_torch_refuses_them() -> None:
    weight = layers()[0]
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        Layca(weight)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        Layca([])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        Layca([{"params": [weight]}, {"params": [weight]}])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        Layca([weight * 2])


@pytest.mark.contract("O15")
def test_named_parameters_keep_their_names() -> None:
    net = network()
    optimizer = Layca(net.named_parameters(), base="Adam")
    names = [name for name, _ in net.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


@pytest.mark.contract("O32")
def test_equal_runs_are_bitwise_equal_and_draw_no_random_numbers() -> None:
    results = []
    for _ in range(2):
        net = network()
        torch.manual_seed(11)
        train(net, Layca(net.parameters(), base="Adam"), 0, 3)
        results.append([*net.parameters(), torch.rand(1)])
    torch.manual_seed(11)
    assert torch.equal(results[0][-1], torch.rand(1))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
