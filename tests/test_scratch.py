"""The short cuts of a step on the CPU: what AdamW clears itself, and SGD's momentum without a stand-in."""

import copy
import math
from typing import Any

import pytest
import torch
from contract.cases import give_gradients
from torch import nn

from pl_layer_rotation import Layca, _base_optimizer, _scratch

# In runs of at most 60,000 elements: several share the memory, a later one is larger than those before.
SHAPES = [(40, 30), (300, 100), (7,), (250, 150), (128, 400), (5, 2)]


@pytest.fixture(autouse=True)
def small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scratch, "_ELEMENTS", 60_000)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def without_short_cuts(optimizer: Layca, monkeypatch: pytest.MonkeyPatch) -> Layca:
    optimizer._base.clears = False
    monkeypatch.setattr(optimizer._base, "step_momentum", lambda *arguments: None)
    return optimizer


def state_of(optimizer: Layca) -> list[torch.Tensor]:
    return [value for entry in optimizer.state.values() for value in entry.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spoilt", [None, 1, 4], ids=["clean", "NaN in a small layer", "NaN in the largest layer"])
def test_adamw_steps_from_zero_whatever_the_step_before_left(
    dtype: torch.dtype, spoilt: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, plain = parameters(dtype), parameters(dtype)
    optimizers = [Layca(tensors, lr=0.03, base="AdamW") for tensors in (short, plain)]
    assert optimizers[0]._base.clears
    without_short_cuts(optimizers[1], monkeypatch)
    for step in range(6):
        for tensors, optimizer in zip((short, plain), optimizers, strict=True):
            give_gradients(tensors, step)
            if spoilt is not None and step == 2:
                assert tensors[spoilt].grad is not None
                tensors[spoilt].grad.view(-1)[-20_000:] = math.nan
            optimizer.step()
    for place, (ours, expected) in enumerate(zip(short, plain, strict=True)):
        assert torch.equal(ours, expected) or place == spoilt
        assert bool(ours.isfinite().all()) is (place != spoilt)
    for ours, expected in zip(state_of(optimizers[0]), state_of(optimizers[1]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert all(group["weight_decay"] == 0 for group in optimizers[0].param_groups)


def test_the_decay_of_plain_groups_stays_theirs() -> None:
    tensors = parameters()
    groups = [{"params": tensors[:3]}, {"params": tensors[3:], "rotate": False, "weight_decay": 0.3, "lr": 0.01}]
    optimizer = Layca(groups, lr=0.03, base="AdamW")
    expected = copy.deepcopy(tensors[3:])
    torch_optimizer = torch.optim.AdamW(expected, lr=0.01, weight_decay=0.3)
    for step in range(3):
        give_gradients(tensors, step)
        for twin, tensor in zip(expected, tensors[3:], strict=True):
            twin.grad = tensor.grad
        optimizer.step()
        torch_optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]
    torch.testing.assert_close(tensors[3:], expected)


def test_a_step_that_failed_leaves_nothing_in_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, expected = parameters(), parameters()
    optimizer, twin = (Layca(each, lr=0.03, base="AdamW") for each in (tensors, expected))
    for step in range(2):
        for each, one in ((tensors, optimizer), (expected, twin)):
            give_gradients(each, step)
            one.step()

    def spoil(borrowed: Any, closure: Any = None) -> None:
        for group in borrowed.param_groups:
            for stand_in in group["params"]:
                stand_in.fill_(math.inf)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_base_optimizer, "run_step", spoil)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    for each, one in ((tensors, optimizer), (expected, twin)):
        give_gradients(each, 2)
        one.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, expected, strict=True))


class OtherDecay(torch.optim.AdamW):
    """Its decay is not AdamW's."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step without any decay."""
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step(closure)


def test_what_only_descends_from_adamw_gets_zeros() -> None:
    tensors, expected = parameters(), parameters()
    for each, base in ((tensors, OtherDecay), (expected, torch.optim.AdamW)):
        optimizer = Layca(each, lr=0.03, base=base)
        for step in range(3):
            give_gradients(each, step)
            optimizer.step()
    torch.testing.assert_close(tensors, expected)


MOMENTA: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "maximize": {"momentum": 0.8, "maximize": True},
    "leading dims": {"momentum": 0.9, "leading_dims": 1},
    "hyperball": {"momentum": 0.9, "tangential": False},
    "Nesterov": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("options", MOMENTA.values(), ids=MOMENTA)
def test_momentum_without_stand_ins_is_sgds(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in [(300, 100), (250, 150)]]
    expected = copy.deepcopy(tensors)
    ours = Layca(tensors, lr=0.03, **options)
    theirs = without_short_cuts(Layca(expected, lr=0.03, **options), monkeypatch)
    taken = []
    step_momentum = ours._base.step_momentum
    monkeypatch.setattr(ours._base, "step_momentum", lambda *args: taken.append(step_momentum(*args)) or taken[-1])
    for step in range(5):
        for each, optimizer in ((tensors, ours), (expected, theirs)):
            give_gradients(each, step)
            if step == 3:
                for group in optimizer.param_groups:
                    group["momentum"] = 0.7
            optimizer.step()
    # Two runs of tensors a step; the first step makes the momentum.
    assert [buffers is not None for buffers in taken] == [False] * 2 + ["nesterov" not in options] * 8
    torch.testing.assert_close(tensors, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(state_of(ours), state_of(theirs), rtol=1e-13, atol=1e-15)


def test_momentum_that_is_switched_off_and_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, expected = ([nn.Parameter(torch.eye(200, dtype=torch.float64) + 0.1)] for _ in range(2))
    ours = Layca(tensors, lr=0.03, momentum=0.9)
    theirs = without_short_cuts(Layca(expected, lr=0.03, momentum=0.9), monkeypatch)
    for step, momentum in enumerate([0.9, 0.9, 0.0, 0.0, 0.5, 0.5]):
        for each, optimizer in ((tensors, ours), (expected, theirs)):
            optimizer.param_groups[0]["momentum"] = momentum
            give_gradients(each, step)
            optimizer.step()
    torch.testing.assert_close(tensors, expected, rtol=1e-13, atol=1e-15)


def test_momentum_goes_on_after_that_of_a_plain_sgd() -> None:
    tensors = parameters()
    plain = torch.optim.SGD(tensors, lr=0.01, momentum=0.9)
    give_gradients(tensors, 0)
    plain.step()
    optimizer = Layca(tensors, lr=0.03, momentum=0.9)
    with pytest.warns(UserWarning, match="state of a plain optimizer"):
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    norms = [tensor.detach().double().norm() for tensor in tensors]
    for step in range(1, 4):
        give_gradients(tensors, step)
        optimizer.step()
    for tensor, norm in zip(tensors, norms, strict=True):
        if tensor.dim() > 1:
            assert float(tensor.detach().double().norm()) == pytest.approx(float(norm), rel=1e-6)
    expected = torch.zeros(40, 30)
    for step in range(4):
        give_gradients(tensors, step)
        expected = 0.9 * expected + tensors[0].grad
    torch.testing.assert_close(optimizer.state[tensors[0]]["momentum_buffer"], expected)


def test_momentum_goes_on_after_a_loaded_state() -> None:
    tensors, twins = parameters(), parameters()
    optimizer, other = Layca(tensors, lr=0.03, momentum=0.9), Layca(twins, lr=0.03, momentum=0.9)
    for step in range(3):
        give_gradients(tensors, step)
        optimizer.step()
    give_gradients(twins, 99)
    other.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for twin, tensor in zip(twins, tensors, strict=True):
        twin.data.copy_(tensor)
    for step in range(3, 6):
        for each, one in ((tensors, optimizer), (twins, other)):
            give_gradients(each, step)
            one.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, twins, strict=True))


def test_momentum_that_is_switched_on_later_is_remembered() -> None:
    (tensor,) = tensors = [nn.Parameter(torch.eye(200, dtype=torch.float64) + 0.1)]
    optimizer = Layca(tensors, lr=0.03)
    buffer = torch.zeros_like(tensor)
    for step, momentum in enumerate([0.0, 0.9, 0.9, 0.9]):
        optimizer.param_groups[0]["momentum"] = momentum
        give_gradients(tensors, step)
        assert tensor.grad is not None
        optimizer.step()
        if momentum:
            buffer = momentum * buffer + tensor.grad
    torch.testing.assert_close(optimizer.state[tensor]["momentum_buffer"], buffer)


def test_state_of_another_memory_format_is_paired_by_element() -> None:
    shape = (64, 16, 3, 3)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        (tensor,) = tensors = [nn.Parameter(start.clone())]
        optimizer = Layca(tensors, lr=0.03, base="AdamW")
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            if step == 2:
                tensor.data = tensor.data.contiguous(memory_format=memory_format)
            gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
            tensor.grad = gradient.contiguous(memory_format=memory_format if step >= 2 else torch.contiguous_format)
            optimizer.step()
        results.append(tensor.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_a_tensor_without_elements_takes_plain_steps() -> None:
    empty, layer = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.eye(3))
    optimizer = Layca([empty, layer], lr=0.1, leading_dims=1)
    empty.grad, layer.grad = torch.empty(0, 3), torch.ones(3, 3)
    optimizer.step()
    assert layer.detach().norm(dim=1).tolist() == pytest.approx([1.0] * 3, rel=1e-6)
