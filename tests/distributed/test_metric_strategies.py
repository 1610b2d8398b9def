"""The metric under every strategy of Lightning: what float64 computes from the weights of one process.

The table of what was seen: ``pytest tests/distributed/test_metric_strategies.py -k table``.
"""

import functools
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from processes import launch
from test_layca_strategies import STRATEGIES, WORLDS, Net, train
from test_layca_strategies import pytestmark as STRATEGY_MARKS
from torch import Tensor

from pl_layer_rotation import LayerRotation

# Rows of 8, 5 and 1: uneven pieces, empty ones, and under tensor parallelism a head that every process holds whole.
LAYERS = {"body.0": (8, 7), "body.2": (5, 8), "head": (1, 5)}
# Largest absolute difference; fp32 trainings under another strategy sum their gradients in another order.
SAME = {torch.float64: 1e-9, torch.float32: 1e-7}
Readings = list[dict[str, float]]

pytestmark = STRATEGY_MARKS


class Measured(Net):
    """In any dtype, and with one optimizer that works everywhere."""

    def __init__(self, strategy: str, dtype: torch.dtype) -> None:
        super().__init__(strategy, optimizer="")
        self.to(dtype)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([tensor.to(self.body[0].weight.dtype) for tensor in batch], batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Read(pl.Callback):
    """What the metric reads before training and after every batch."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rotation = LayerRotation(pl_module)
        self.readings = [self.rotation(pl_module)]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.readings.append(self.rotation(pl_module))


class Save(pl.Callback):
    """The layers' weights at the same moments."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.snapshots: list[dict[str, list[float]]] = []
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        state = pl_module.state_dict()
        self.snapshots.append({name: state[f"{name}.weight"].double().flatten().tolist() for name in LAYERS})


def read(rank: int, strategy: str, world: int, dtype: torch.dtype) -> Readings:
    callback = Read()
    train(Measured(strategy, dtype), strategy, world, callback, resume=None)
    return [{name: float(value) for name, value in reading.items()} for reading in callback.readings]


def save(rank: int, dtype: torch.dtype) -> list[dict[str, list[float]]]:
    callback = Save()
    train(Measured("one process", dtype), "one process", 1, callback, resume=None)
    return callback.snapshots


@functools.cache
def by_hand(dtype: torch.dtype) -> Readings:
    """Cosine distances of one process's weights by numpy."""
    (snapshots,) = launch(save, dtype, world=1)

    def distance(now: list[float], start: list[float]) -> float:
        chord = np.array(now) / np.linalg.norm(now) - np.array(start) / np.linalg.norm(start)
        return float(chord @ chord / 2)

    return [{name: distance(now[name], snapshots[0][name]) for name in LAYERS} for now in snapshots]


@functools.cache
def deviation(strategy: str, dtype: torch.dtype) -> float:
    """Largest difference of any process's readings."""
    world = WORLDS.get(strategy, 2)
    expected = by_hand(dtype)
    worst = 0.0
    for readings in launch(read, strategy, world, dtype, world=world, timeout=60):
        assert [list(reading) for reading in readings] == [list(LAYERS)] * 7
        pairs = zip(readings, expected, strict=True)
        worst = max(worst, *(abs(ours[name] - theirs[name]) for ours, theirs in pairs for name in LAYERS))
    return worst


# Lightning makes a module fp32 under FSDP1; `test_metric_groups` reads float64 there.
CASES = [(name, dtype) for name in STRATEGIES for dtype in SAME if dtype == torch.float32 or "FSDP1" not in name]


@pytest.mark.parametrize(("strategy", "dtype"), CASES, ids=str)
@pytest.mark.contract("M1", "M2")
def test_readings_are_those_of_the_weights_of_one_process(strategy: str, dtype: torch.dtype) -> None:
    assert min(by_hand(dtype)[-1].values()) > 1e-4
    assert deviation(strategy, dtype) < SAME[dtype]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    def cell(name: str, dtype: torch.dtype) -> str:
        return f"{deviation(name, dtype):8.0e}" if (name, dtype) in CASES else f"{'':8}"

    lines = [f"{name:27}" + "".join(f"  {cell(name, dtype)}" for dtype in SAME) for name in STRATEGIES]
    with capsys.disabled():
        print("\n" + "\n".join([f"{'':27}  {'float64':>8}  {'fp32':>8}", *lines]))
