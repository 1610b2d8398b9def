"""The path that accelerators take: the angles of the CPU's, and nothing on it waits for a value."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contract.cases import angle, give_gradients
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from pl_layer_rotation import Layca, _turning

# What makes Python wait for an accelerator.
WAITING = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "is_nonzero"}
SHAPES = [(8, 3, 3, 3), (40, 30), (7,), (5, 2)]


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take tensors on the CPU for tensors on an accelerator."""
    monkeypatch.setattr(_turning, "on_host", lambda chunk: False)


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or "").rsplit(".", 1)[-1]
        if name in WAITING:
            raise AssertionError(f"{name} waits for the accelerator")
        return func(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero"):
            raise AssertionError(f"{func} waits for the accelerator")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits() -> Iterator[None]:
    with Functions(), Kernels():
        yield


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


BASES: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "adamw": {"base": "AdamW"},
    "hyperball": {"base": "AdamW", "tangential": False},
}


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_both_paths_make_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    results = []
    for host in (True, False):
        monkeypatch.setattr(_turning, "on_host", lambda chunk, host=host: host)
        tensors = parameters(dtype)
        optimizer = Layca(tensors, lr=0.03, **options)
        for step in range(5):
            give_gradients(tensors, step)
            optimizer.step()
        results.append(tensors)
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.contract("O29")
@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
@pytest.mark.parametrize("lr", [0.03, torch.tensor(0.03)], ids=["number", "tensor"])
def test_no_step_after_the_first_waits_for_a_value(options: dict[str, Any], lr: float | Tensor) -> None:
    tensors = parameters()
    optimizer = Layca(tensors, lr=lr, **options)
    give_gradients(tensors, 0)
    optimizer.step()
    before = tensors[1].detach().clone()
    give_gradients(tensors, 1)
    with nothing_waits():
        optimizer.step()
    if options.get("tangential", True):
        assert angle(before, tensors[1]) == pytest.approx(math.atan(0.03), rel=1e-5)


@pytest.mark.usefixtures("accelerator")
def test_the_guard_of_the_test_above_sees_what_waits() -> None:
    with pytest.raises(AssertionError, match="waits"), nothing_waits():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="waits"), nothing_waits():
        bool(torch.ones(1) > 0)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("lr", [1e-4, 0.1])
def test_angles_of_gradients_of_any_size(scale: float, lr: float) -> None:
    weight = nn.Parameter(torch.randn(60, 50, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    weight.grad = scale * torch.randn(60, 50, generator=torch.Generator().manual_seed(1))
    Layca([weight], lr=lr).step()
    assert angle(before, weight) == pytest.approx(math.atan(lr), rel=1e-4)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("sine", [1e-1, 1e-2])
def test_nearly_radial_steps_turn_by_the_angle(sine: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(60, 50, generator=generator))
    across = torch.randn(60, 50, generator=generator)
    across -= (across * weight.detach()).sum() / weight.detach().square().sum() * weight.detach()
    before = weight.detach().clone()
    weight.grad = before + sine * before.norm() / across.norm() * across
    Layca([weight], lr=0.01).step()
    assert angle(before, weight) == pytest.approx(math.atan(0.01), rel=1e-3)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("kind", ["zero", "radial"])
def test_without_a_direction_a_layer_stays(kind: str) -> None:
    weight = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    weight.grad = torch.zeros(6, 5) if kind == "zero" else 2 * before
    Layca([weight], lr=0.1).step()
    assert torch.equal(weight.detach(), before)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_weights(dtype: torch.dtype, tolerance: float) -> None:
    weight = parameters(dtype)[1]
    before = weight.detach().clone()
    give_gradients([weight], 0)
    Layca([weight], lr=0.1).step()
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_cuda_reports_no_synchronization(options: dict[str, Any]) -> None:
    tensors = [nn.Parameter(tensor.detach().cuda()) for tensor in parameters()]
    optimizer = Layca(tensors, lr=0.03, **options)
    for step in range(3):
        for tensor in tensors:
            tensor.grad = torch.randn_like(tensor)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
