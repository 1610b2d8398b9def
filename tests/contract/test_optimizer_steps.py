"""Contract O23 to O32: steps that are not like the others."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contract.cases import angle, give_gradients, layers, norm, same, snapshot, take_steps
from torch import Tensor, nn

from pl_layer_rotation import Layca

TURN = math.atan(0.1)


@pytest.mark.contract("O23")
def test_a_group_added_in_mid_training_takes_our_defaults_and_turns_from_its_first_step() -> None:
    first, second, bias = layers(shapes=[(5, 4), (6, 3), (3,)])
    optimizer = Layca([{"params": [first], "name": "body"}], lr=0.1, base="AdamW", betas=(0.8, 0.99))
    take_steps(optimizer, 0, 2)
    optimizer.add_param_group({"params": [second, bias]})
    added = optimizer.param_groups[1]
    assert (added["lr"], added["rotate"], added["tangential"], added["betas"]) == (0.1, True, True, (0.8, 0.99))
    before = snapshot([first, second])
    take_steps(optimizer, 2, 3)
    for old, new in zip(before, (first, second), strict=True):
        assert angle(old, new) == pytest.approx(TURN, rel=1e-5)
        assert norm(new) == pytest.approx(norm(old), rel=1e-6)


@pytest.mark.contract("O23")
@pytest.mark.parametrize("names", [["body"], ["body", "head"], ["group1"], ["group2", "group1"]])
def test_groups_added_without_a_name_among_named_ones_get_a_free_one(names: list[str]) -> None:
    tensors = layers(shapes=[(2, 2)] * 4)
    optimizer = Layca([{"params": [t], "name": name} for t, name in zip(tensors, names, strict=False)])
    for tensor in tensors[len(names) :]:
        optimizer.add_param_group({"params": [tensor]})
    found = [group["name"] for group in optimizer.param_groups]
    assert found[: len(names)] == names
    assert len(set(found)) == 4


@pytest.mark.contract("O23")
def test_in_an_added_group_the_rank_alone_tells_layers_from_the_rest() -> None:
    (first,) = layers(shapes=[(5, 4)])
    embedding, normalization = nn.Embedding(6, 3), nn.LayerNorm(3)
    optimizer = Layca([first], lr=0.1)
    optimizer.add_param_group({"params": [*embedding.parameters(), *normalization.parameters()]})
    before = embedding.weight.detach().clone()
    take_steps(optimizer, 0, 1)
    assert angle(before, embedding.weight) == pytest.approx(TURN, rel=1e-5)
    torch.testing.assert_close(normalization.weight.detach(), 1 - 0.1 * normalization.weight.grad)


class BreaksOnce(torch.optim.Adam):
    """Fails in the middle of a step, when it has changed what it was lent."""

    fail = False

    def step(self, closure: Any = None) -> None:
        super().step()
        if BreaksOnce.fail:
            raise RuntimeError("out of memory")


@pytest.mark.contract("O24")
def test_after_a_step_that_failed_midway_weights_and_options_are_whole_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (weight,), (twin,) = layers()[1:2], layers()[1:2]
    optimizer, other = Layca([weight], lr=0.1, base=BreaksOnce), Layca([twin], lr=0.1, base="Adam")
    take_steps(optimizer, 0, 1)
    take_steps(other, 0, 1)
    before = weight.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr(BreaksOnce, "fail", True)
        with pytest.raises(RuntimeError, match="out of memory"):
            take_steps(optimizer, 1, 2)
    assert torch.equal(weight, before)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["params"]) == (0.1, [weight])
    assert set(optimizer.state) == {weight}
    take_steps(optimizer, 2, 3)
    assert angle(before, weight) == pytest.approx(TURN, rel=1e-5)
    assert copy.deepcopy(optimizer).state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.contract("O24")
@pytest.mark.parametrize("order", ["last", "first", "plain"])
def test_a_sparse_gradient_that_the_base_refuses_moves_nothing_at_all(order: str) -> None:
    weight, bias = layers(shapes=[(5, 4), (4,)])
    embedding = nn.Embedding(6, 3, sparse=True)
    tensors: list[Tensor] = [weight, bias, embedding.weight]
    groups = {
        "last": [{"params": tensors}],
        "first": [{"params": tensors[::-1]}],
        "plain": [{"params": tensors[:2]}, {"params": tensors[2:], "rotate": False}],
    }
    optimizer = Layca(groups[order], lr=0.1, base="Adam")
    before = snapshot(tensors)
    give_gradients([weight, bias], 0)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert same(tensors, before)
    take_steps(optimizer, 0, 1)
    assert angle(before[0], weight) == pytest.approx(TURN, rel=1e-5)


@pytest.mark.contract("O24")
def test_a_closure_that_raises_moves_nothing() -> None:
    tensors = layers(shapes=[(5, 4), (4,)])
    optimizer = Layca(tensors, lr=0.1, base="Adam")
    take_steps(optimizer, 0, 1)
    before, state = snapshot(tensors), copy.deepcopy(optimizer.state_dict())

    def closure() -> float:
        raise ZeroDivisionError("no batch")

    with pytest.raises(ZeroDivisionError, match="no batch"):
        optimizer.step(closure)
    assert same(tensors, before)
    assert torch.is_grad_enabled()
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    assert float(optimizer.state[tensors[0]]["step"]) == 1


@pytest.mark.contract("O25")
@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_gradients_turn_an_embedding_as_dense_ones_do(coalesced: bool) -> None:
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(50, 3, sparse=sparse)
        optimizer = Layca(embedding.parameters(), lr=0.1)
        for rows in ([1, 2, 2, 7], [7, 7, 0], [49]):
            optimizer.zero_grad()
            embedding(torch.tensor(rows)).square().sum().backward()
            if sparse and coalesced:
                embedding.weight.grad = embedding.weight.grad.coalesce()
            before = embedding.weight.detach().clone()
            optimizer.step()
            assert angle(before, embedding.weight) == pytest.approx(TURN, rel=1e-5)
        results.append(embedding.weight)
    torch.testing.assert_close(results[1], results[0], rtol=5e-6, atol=5e-6)


@pytest.mark.contract("O26")
@pytest.mark.parametrize(("base", "options"), [("SGD", {"momentum": 0.9}), ("Adam", {}), ("RMSprop", {})])
def test_complex_weights_turn_as_their_real_pairs_and_complex_biases_are_plain(
    base: str, options: dict[str, Any]
) -> None:
    weight, bias = layers(torch.complex128, [(6, 4), (4,)])
    with torch.no_grad():
        weight.mul_(1 + 0.5j)
    real = nn.Parameter(torch.view_as_real(weight.detach()).clone())
    twin = nn.Parameter(bias.detach().clone())
    ours, pairs = Layca([weight, bias], lr=0.1, base=base, **options), Layca([real], lr=0.1, base=base, **options)
    theirs = getattr(torch.optim, base)([twin], lr=0.1, **options)
    for step in range(3):
        give_gradients([weight, bias], step)
        for tensor in (weight, bias):
            tensor.grad = tensor.grad * (0.3 - 2j)
        real.grad, twin.grad = torch.view_as_real(weight.grad).clone(), bias.grad.clone()
        before = weight.detach().clone()
        for optimizer in (ours, pairs, theirs):
            optimizer.step()
        assert angle(before, weight) == pytest.approx(TURN, rel=1e-7)
    torch.testing.assert_close(torch.view_as_real(weight.detach()), real.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias, twin, rtol=1e-9, atol=1e-12)


@pytest.mark.contract("O26")
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8], ids=str)
def test_parameters_that_are_not_numbers_to_train_are_left_alone(dtype: torch.dtype) -> None:
    quantized = nn.Parameter(torch.ones(3, 3, dtype=dtype), requires_grad=False)
    (weight,) = layers(shapes=[(5, 4)])
    before = [quantized.detach().clone(), weight.detach().clone()]
    optimizer = Layca([quantized, weight], lr=0.1, base="AdamW")
    give_gradients([weight], 0)
    optimizer.step()
    assert torch.equal(quantized, before[0])
    assert quantized.dtype == dtype
    assert set(optimizer.state) == {weight}
    assert angle(before[1], weight) == pytest.approx(TURN, rel=1e-5)


@pytest.mark.contract("O27")
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: Layca(p, lr=0.1)], ids=["SGD", "Layca"]
)
def test_backward_through_a_graph_from_before_the_step_is_an_error(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    loss = net(torch.ones(2, 4)).square().sum()
    loss.backward(retain_graph=True)
    make(net.parameters()).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def trained(compiled: str) -> list[Tensor]:
    """Weights after three steps, with nothing, the step or the whole training function compiled."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = Layca(net.parameters(), lr=0.1, base="AdamW")
    step = torch.compile(lambda: optimizer.step(), backend="eager") if compiled == "step" else optimizer.step

    def train(inputs: Tensor) -> None:
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        step()

    run = torch.compile(train, backend="eager") if compiled == "function" else train
    for seed in range(3):
        run(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)))
    return list(net.parameters())


@pytest.mark.contract("O29")
@pytest.mark.parametrize("compiled", ["step", "function"])
def test_compiled_steps_give_the_same_weights(compiled: str) -> None:
    for one, other in zip(trained(compiled), trained("nothing"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@contextmanager
def synchronizing_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.contract("O29")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: no step may wait for it")
@pytest.mark.parametrize(("base", "options"), [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {})])
def test_steps_on_a_gpu_never_wait_for_it(base: str, options: dict[str, Any]) -> None:
    tensors = [nn.Parameter(t.detach().cuda()) for t in layers(shapes=[(40, 30), (4, 2, 3, 3), (30,)])]
    twins = layers(shapes=[(40, 30), (4, 2, 3, 3), (30,)])
    on_gpu, on_cpu = (Layca(some, lr=0.1, base=base, **options) for some in (tensors, twins))
    take_steps(on_gpu, 0, 2)  # the first steps look for layers of zeros and make the state
    give_gradients(twins, 2)
    for tensor, twin in zip(tensors, twins, strict=True):
        tensor.grad = twin.grad.cuda()
    torch.cuda.synchronize()
    with synchronizing_is_an_error():
        on_gpu.step()
    take_steps(on_cpu, 0, 3)
    for tensor, twin in zip(tensors, twins, strict=True):
        torch.testing.assert_close(tensor.cpu(), twin, rtol=1e-4, atol=1e-5)


@pytest.mark.contract("O30")
@pytest.mark.parametrize("base", ["SGD", "AdamW", "Adagrad"])
def test_on_the_meta_device_it_can_be_made_but_not_stepped(base: str) -> None:
    layer = nn.Linear(4, 5, device="meta")
    optimizer = Layca(layer.parameters(), lr=0.1, base=base)
    for parameter in layer.parameters():
        parameter.grad = torch.empty_like(parameter)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        optimizer.step()


@pytest.mark.contract("O30")
def test_weights_that_left_the_meta_device_in_place_are_stepped() -> None:
    layer = nn.Linear(4, 5, device="meta")
    optimizer = Layca(layer.parameters(), lr=0.1, base="Adam")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    layer.reset_parameters()
    before = layer.weight.detach().clone()
    take_steps(optimizer, 0, 1)
    assert angle(before, layer.weight) == pytest.approx(TURN, rel=1e-5)


@pytest.mark.contract("O30")
@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("early", [False, True], ids=["first step with a shape", "a step before"])
def test_lazy_parameters_turn_once_they_have_a_shape(base: str, early: bool) -> None:
    layer = nn.LazyLinear(5)
    optimizer = Layca(layer.parameters(), lr=0.1, base=base)
    if early:
        optimizer.step()  # nothing has a gradient yet
    layer(torch.ones(2, 4)).square().sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert angle(before, layer.weight) == pytest.approx(TURN, rel=1e-5)


@pytest.mark.contract("O30")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_change_of_dtype_between_steps_is_followed(momentum: float) -> None:
    layer = nn.Linear(30, 20)
    optimizer = Layca(layer.parameters(), lr=0.1, momentum=momentum)
    take_steps(optimizer, 0, 2)
    layer.double()
    for entry in optimizer.state.values():  # as every torch optimizer asks of its user
        if entry.get("momentum_buffer") is not None:
            entry["momentum_buffer"] = entry["momentum_buffer"].double()
    before = layer.weight.detach().clone()
    take_steps(optimizer, 2, 4)
    assert layer.weight.dtype == torch.float64
    after = layer.weight.detach().clone()
    take_steps(optimizer, 4, 5)
    assert angle(after, layer.weight) == pytest.approx(TURN, rel=1e-9)
    assert norm(layer.weight) == pytest.approx(norm(before), rel=1e-6)


@pytest.mark.contract("O31")
@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_one_optimizer_per_parameter_in_backward_equals_one_for_all(base: str) -> None:
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        if in_backward:
            optimizers = {parameter: Layca([parameter], lr=0.1, base=base) for parameter in net.parameters()}

            def step(parameter: Tensor, optimizers: dict[Tensor, Layca] = optimizers) -> None:
                optimizers[parameter].step()
                parameter.grad = None

            for parameter in net.parameters():
                parameter.register_post_accumulate_grad_hook(step)
        else:
            together = Layca(net.parameters(), lr=0.1, base=base)
        for seed in range(3):
            net(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            if not in_backward:
                together.step()
                together.zero_grad()
        results.append(list(net.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.contract("O31")
def test_tied_weights_are_turned_once() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    net["head"].weight = net["embedding"].weight
    optimizer = Layca(net.parameters(), lr=0.1)
    before = net["head"].weight.detach().clone()
    net["head"](net["embedding"](torch.tensor([1, 2, 3]))).square().sum().backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 1
    assert angle(before, net["head"].weight) == pytest.approx(TURN, rel=1e-5)
    assert net["head"].weight is net["embedding"].weight
