"""Metric, history and Layca without a Trainer: in a bare loop and in Lightning Fabric."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from readings import assert_reads
from test_examples import EXAMPLES, run
from torch import Tensor, nn

from pl_layer_rotation import Layca, LayerRotation, RotationHistory, layer_rotation

LR = 0.05
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
Weights = dict[str, np.ndarray]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 30))


def optimizer_of(module: nn.Module) -> Layca:
    return Layca(module.parameters(), lr=LR, momentum=0.9)


def steps(
    module: nn.Module,
    optimizer: Any,
    rotation: LayerRotation,
    history: RotationHistory,
    numbers: range,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> list[Weights]:
    """The loop of a user; returns the layers' weights in float64 after every step."""
    seen = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        loss = (module(torch.randn(4, 8, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        history.append(number, rotation=list(rotation(module).values()))
        seen.append(weights(module))
    return seen


def weights(module: nn.Module) -> Weights:
    state = module.state_dict()
    return {name: state[f"{name}.weight"].double().numpy().copy() for name in ("0", "3")}


def distance(now: np.ndarray, start: np.ndarray) -> float:
    chord = now / np.linalg.norm(now) - start / np.linalg.norm(start)
    return float((chord**2).sum() / 2)


def assert_records(history: RotationHistory, start: Weights, seen: list[Weights]) -> None:
    assert history.steps == list(range(1, len(seen) + 1))
    expected = [[distance(now[name], start[name]) for name in start] for now in seen]
    np.testing.assert_allclose(history.values("rotation").numpy(), expected, rtol=1e-5)


@pytest.mark.contract("C31")
def test_a_bare_loop_turns_by_the_angle_and_records_the_rotation() -> None:
    module = network()
    start, rotation, history = weights(module), LayerRotation(module), RotationHistory(["0", "3"])
    seen = steps(module, optimizer_of(module), rotation, history, range(1, 6))
    assert_records(history, start, seen)
    for before, after in zip([start, *seen], seen, strict=False):
        for name in start:
            turned = 2 * math.asin(math.sqrt(distance(after[name], before[name]) / 2))
            assert turned == pytest.approx(math.atan(LR), rel=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.contract("C31")
def test_fabric_trains_measures_and_records(precision: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    net = network()
    module, optimizer = fabric.setup(net, optimizer_of(net))
    assert net[0].weight.dtype == PRECISIONS[precision]
    start, rotation, history = weights(module), LayerRotation(module), RotationHistory(["0", "3"])
    assert rotation.layer_names == ["0", "3"]
    seen = steps(module, optimizer, rotation, history, range(1, 6), fabric.backward)
    assert_records(history, start, seen)
    # bfloat16 rounds some of a step of 0.05 rad away.
    angle = 2 * math.asin(math.sqrt(distance(seen[0]["3"], start["3"]) / 2))
    assert angle == pytest.approx(math.atan(LR), rel=1e-4 if precision == "32-true" else 1e-2)


def fresh(fabric: Fabric) -> tuple[Any, Any]:
    net = network()
    return fabric.setup(net, optimizer_of(net))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.contract("C31")
def test_fabric_saves_and_loads_a_training_that_goes_on_bit_by_bit(tmp_path: Path, precision: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    module, optimizer = fresh(fabric)
    reference = copy.deepcopy(module.state_dict())
    rotation, history = LayerRotation(module), RotationHistory(["0", "3"])
    steps(module, optimizer, rotation, history, range(1, 4), fabric.backward)
    state = {"model": module, "optimizer": optimizer, "history": history.state_dict(), "reference": reference}
    fabric.save(tmp_path / "half.ckpt", state)
    straight = steps(module, optimizer, rotation, history, range(4, 7), fabric.backward)
    module, optimizer = fresh(fabric)
    rest = fabric.load(tmp_path / "half.ckpt", {"model": module, "optimizer": optimizer}, weights_only=True)
    resumed, again = (
        RotationHistory.from_state_dict(rest["history"]),
        LayerRotation(module, reference=rest["reference"]),
    )
    went_on = steps(module, optimizer, again, resumed, range(4, 7), fabric.backward)
    assert resumed == history
    assert all(np.array_equal(one[n], other[n]) for one, other in zip(straight, went_on, strict=True) for n in one)


@pytest.mark.contract("C31")
def test_the_state_dict_of_a_fabric_module_is_a_reference() -> None:
    """Fabric leaves the name of its wrapper out of it."""
    module, _ = fresh(Fabric(accelerator="cpu", devices=1))
    start = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        module.module[3].weight.add_(0.1)
    expected = float(layer_rotation(module.module[3].weight, start["3.weight"]))
    assert_reads(LayerRotation(module, reference=start)(module), {"0": 0.0, "3": expected})


@pytest.mark.contract("C31")
def test_the_example_trains_and_writes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    printed = run(str(EXAMPLES / "fabric.py"), "--max-epochs", "1", "--output", str(page), cwd=tmp_path)
    assert [line.split(":")[0] for line in printed.splitlines()[:3]] == ["layer 0", "layer 3", "layer 5"]
    assert "Layca in Fabric" in page.read_text(encoding="utf-8")
