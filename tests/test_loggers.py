"""Loggers other than W&B's get the same scalars through `log_metrics` alone, each of them once."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
from nets import Net, batches, trainer
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pl_layer_rotation import LayerRotationMonitor, RotationHistory
from pl_layer_rotation._log_keys import log_keys

QUANTITIES = ["rotation", "norm_ratio"]
Series = dict[str, list[tuple[int, float]]]


class Service(Logger):
    """Keeps what it is sent, as MLflow's and Comet's loggers send it on: floats by key, at a step."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.sent: list[tuple[str, float, int | None]] = []

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return "1"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are not what this is about."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.sent += [(key, value, step) for key, value in metrics.items()]


def expected(history: RotationHistory) -> Series:
    """Every series of the monitor, from its history."""
    steps, series = [step - 1 for step in history.steps], {}
    for quantity in QUANTITIES:
        values = history.values(quantity)
        columns = dict(zip(log_keys(history.layer_names, quantity), values.T.tolist(), strict=True))
        columns |= {
            f"layer_{quantity}_stats/mean": values.mean(1).tolist(),
            f"layer_{quantity}_stats/min": values.amin(1).tolist(),
            f"layer_{quantity}_stats/max": values.amax(1).tolist(),
        }
        series.update({key: list(zip(steps, column, strict=True)) for key, column in columns.items()})
    median = history.values("straightness").median(1).values.tolist()
    series["layer_straightness_stats/median"] = [
        (s, v) for s, v in zip(steps, median, strict=True) if not math.isnan(v)
    ]
    return series


def assert_same(found: Series, wanted: Series, relative: float) -> None:
    assert found.keys() == wanted.keys()
    for key, series in wanted.items():
        assert [step for step, _ in found[key]] == [step for step, _ in series]
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in series], rel=relative)


def read_tensorboard(folder: str) -> Series:
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    keys = [key for key in events.Tags()["scalars"] if key.startswith("layer_")]
    assert events.Tags()["images"] == []
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in keys}


def read_csv(folder: str) -> Series:
    series: Series = {}
    with Path(folder, "metrics.csv").open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            for key, value in row.items():
                if key.startswith("layer_") and value:
                    series.setdefault(key, []).append((int(row["step"]), float(value)))
    return series


def read_service(logger: Service) -> Series:
    series: Series = {}
    for key, value, step in logger.sent:
        if key.startswith("layer_"):
            # MLflow takes numbers, and names of these characters only.
            assert isinstance(value, float)
            assert re.fullmatch(r"[/\w.\- ]+", key)
            assert step is not None
            series.setdefault(key, []).append((step, value))
    return series


def test_tensorboard_csv_and_services_get_every_value_once(tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(every_n_steps=2, log_quantities=QUANTITIES, report=False)
    board, table, services = TensorBoardLogger(tmp_path), CSVLogger(tmp_path), [Service("mlflow"), Service("comet")]
    run = trainer(monitor, logger=[board, table, *services], max_epochs=2)
    run.fit(Net(), batches(), batches())
    wanted = expected(monitor.history)
    assert len(wanted["layer_rotation/001_head"]) == 8
    # TensorBoard stores single precision.
    assert_same(read_tensorboard(board.log_dir), wanted, relative=1e-6)
    assert_same(read_csv(table.log_dir), wanted, relative=1e-12)
    for service in services:
        assert_same(read_service(service), wanted, relative=1e-12)
