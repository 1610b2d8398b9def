"""Readings of layers as tensors: the path that accelerators take gives the CPU's numbers and waits once."""

import math
from typing import Any

import pytest
import torch
from contract.cases import angle
from test_turning import WAITING, nothing_waits
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation import _measuring
from pl_layer_rotation._measuring import Measured, Measuring
from pl_layer_rotation._reference import References

SHAPES = {"conv": (8, 3, 3, 3), "wide": (300, 600), "last": (5, 2)}


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take tensors on the CPU for tensors on an accelerator."""
    monkeypatch.setattr(_measuring, "on_host", lambda tensor: False)


def layers(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def move(weights: dict[str, Tensor], step: int, size: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights.values():
        weight.add_(size * torch.randn(weight.shape, generator=generator))


def measured(weights: dict[str, Tensor]) -> tuple[Measuring, Measured]:
    """Three steps whose angles are read, the last one with everything else."""
    measuring = Measuring(References())
    for name, weight in weights.items():
        measuring.references.take(name, weight, first=True)
    for step in (1, 2, 3):
        measuring.copy(weights)
        move(weights, step)
        if step < 3:
            measuring.read_angles(weights, step)
    return measuring, measuring.read(weights, 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-11)])
def test_both_paths_read_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float) -> None:
    _, expected = measured(layers(dtype))
    monkeypatch.setattr(_measuring, "on_host", lambda tensor: False)
    _, ours = measured(layers(dtype))
    assert ours.values.keys() == expected.values.keys() >= {"rotation", "norm_ratio", "angular_update", "path"}
    for quantity, values in expected.values.items():
        assert ours.values[quantity].tolist() == pytest.approx(values.tolist(), rel=tolerance)


def test_what_is_read_are_the_angles_of_the_weights() -> None:
    weights, turned = layers(torch.float64), []
    start = {name: weight.clone() for name, weight in weights.items()}
    for step in (1, 2, 3):
        before = {name: weight.clone() for name, weight in weights.items()}
        move(weights, step)
        turned.append([angle(before[name], weight) for name, weight in weights.items()])
    _, reading = measured(layers(torch.float64))
    assert reading.values["angular_update"].tolist() == pytest.approx(turned[-1], rel=1e-9)
    assert reading.values["path"].tolist() == pytest.approx([sum(column) for column in zip(*turned, strict=True)])
    rotations = [1 - math.cos(angle(start[name], weight)) for name, weight in weights.items()]
    assert reading.values["rotation"].tolist() == pytest.approx(rotations, rel=1e-9)


@pytest.mark.usefixtures("accelerator")
def test_nothing_waits_between_readings_and_a_reading_waits_once() -> None:
    weights, waits = layers(), []

    class Counts(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = (resolve_name(func) or "").rsplit(".", 1)[-1]
            # What is on the host is not waited for.
            if name in WAITING and not waits:
                waits.append(name)
            return func(*args, **(kwargs or {}))

    measuring, _ = measured(weights)
    with nothing_waits():
        measuring.copy(weights)
        move(weights, 4)
        measuring.read_angles(weights, 4)
        measuring.take_turned(["conv"], torch.tensor([0.1]), 5)
    with Counts():
        measuring.read(weights, 5)
    assert waits == ["cpu"]


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("size", [1e-6, 1e18])
def test_sums_that_lost_their_digits_are_taken_again(size: float) -> None:
    """A motion along the weights that outweighs the turn by far, and squares that overflow in fp32."""
    weights = {name: weight * size if size > 1 else weight for name, weight in layers().items()}
    measuring = Measuring(References())
    for name, weight in weights.items():
        measuring.references.take(name, weight, first=True)
    start = {name: weight.double().clone() for name, weight in weights.items()}
    move(weights, 1, size=1e-4 * size if size > 1 else size)
    for weight in weights.values():
        weight.mul_(1.5)
    reading = measuring.read(weights, 1)
    exact = torch.stack(list(geometry.cosine_distance(sums_of(weights, start))))
    assert reading.values["rotation"].tolist() == pytest.approx(exact.tolist(), rel=1e-3)
    assert reading.values["norm_ratio"].tolist() == pytest.approx([1.5] * 3, rel=1e-3)


def sums_of(weights: dict[str, Tensor], start: dict[str, Tensor]) -> Tensor:
    doubles = [weight.double() for weight in weights.values()]
    return geometry.rotation_sums(doubles, [start[name] for name in weights], [True] * len(weights))[0]


def test_memory_of_the_copies_is_kept_until_it_is_given_back() -> None:
    weights = layers()
    measuring, _ = measured(weights)
    held = {name: copy.data_ptr() for name, copy in measuring._before.items()}
    measuring.copy(weights)
    assert {name: copy.data_ptr() for name, copy in measuring._before.items()} == held
    weights["last"] = torch.randn(5, 3)
    measuring.copy({name: weights[name] for name in ("wide", "last")})
    assert measuring._before.keys() == {"wide", "last"}
    assert torch.equal(measuring._before["last"], weights["last"])
    measuring.free()
    assert not measuring._before
    assert not measuring.waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_reports_no_synchronization_between_readings() -> None:
    weights = {name: weight.cuda() for name, weight in layers().items()}
    measuring = Measuring(References())
    for name, weight in weights.items():
        measuring.references.take(name, weight, first=True)
    for step in (1, 2, 3):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            measuring.copy(weights)
            torch._foreach_mul_(list(weights.values()), 1.01)
            measuring.read_angles(weights, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert measuring.read(weights, 3).values["norm_ratio"].tolist() == pytest.approx([1.01**3] * 3, rel=1e-5)
