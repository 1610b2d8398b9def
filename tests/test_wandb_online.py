"""Monitored trainings with the real W&B client, against a server on the loopback interface."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import wandb
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from wandb_server import ServedRun, WandbServer, wandb_server

from pl_layer_rotation import LayerRotationMonitor, RotationHistory
from pl_layer_rotation._log_keys import log_keys

CHARTS = ("rotation", "final_rotation", "heatmap")
QUANTITIES = ["rotation", "angular_update", "norm_ratio", "straightness"]
STATISTICS = {"mean": lambda v: v.nanmean(1), "min": lambda v: v.amin(1), "max": lambda v: v.amax(1)}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    with wandb_server(monkeypatch, tmp_path / "client") as server:
        yield server


def fit(
    logger: Any, monitor: LayerRotationMonitor, *callbacks: Any, epochs: int = 2, module: Any = None, **options: Any
) -> pl.Trainer:
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = trainer(monitor, *callbacks, logger=logger, max_epochs=epochs, enable_checkpointing=checkpoints)
    run.fit(module or Net(), batches(identical=True), batches(identical=True), **options)
    wandb.finish()
    return run


def assert_same_curves(run: ServedRun, history: RotationHistory, prefix: str = "") -> None:
    """Every value of the history is in the run, at Lightning's step, and there is no other."""
    steps = [step - 1 for step in history.steps]
    for quantity in QUANTITIES:
        values = history.values(quantity)
        for key, column in zip(log_keys(history.layer_names, quantity), values.T.tolist(), strict=True):
            assert run.series(prefix + key) == list(zip(steps, column, strict=True))
        for name, statistic in STATISTICS.items():
            series = run.series(f"{prefix}layer_{quantity}_stats/{name}")
            assert [step for step, _ in series] == steps
            assert [v for _, v in series] == pytest.approx(statistic(values).tolist(), rel=1e-12)


def assert_same_end(run: ServedRun, history: RotationHistory, prefix: str = "") -> None:
    """The summary holds the last reading and the findings, the last charts the last values."""
    values = history.values("rotation")[-1]
    for name in STATISTICS:
        expected = STATISTICS[name](values[None])[0].item()
        assert run.summary[f"{prefix}layer_rotation_stats/{name}"] == pytest.approx(expected, rel=1e-12)
    lines = [str(finding) for finding in history.findings()] or ["No finding. This does not mean that the run is well"]
    assert run.summary[f"{prefix}layer_rotation_findings"].startswith("\n".join(lines))
    bars = json.loads(run.media(f"{prefix}layer_rotation_charts/final_rotation")[-1])["data"][0]["x"]
    assert bars == pytest.approx(values.tolist(), rel=1e-3)
    assert run.exit_code == 0


def test_online_run_is_the_history(server: WandbServer, tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(every_n_steps=2, log_quantities=QUANTITIES, report="wandb")
    fit(WandbLogger(project="digits", id="run", save_dir=tmp_path), monitor)
    run = server.runs["run"]
    assert_same_curves(run, monitor.history)
    assert_same_end(run, monitor.history)
    assert run.config["layer_rotation"]["value"]["optimizer"] == "SGD"
    assert {key.partition("/")[0] for key in run.metrics} == {
        *("trainer", *(f"layer_{quantity}" for quantity in QUANTITIES)),
        *(f"layer_{quantity}_stats" for quantity in QUANTITIES),
    }
    for chart in CHARTS:
        assert [step for step, _ in run.series(f"layer_rotation_charts/{chart}")] == [1, 3, 7, 11, 15]
        assert all(json.loads(content)["data"] for content in run.media(f"layer_rotation_charts/{chart}"))
    page = tmp_path / "digits" / "run" / "layer_rotation.html"
    assert run.media("layer_rotation_charts/page") == [page.read_bytes()]


def test_synchronized_offline_run_is_the_history(server: WandbServer, tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(every_n_steps=2, log_quantities=QUANTITIES, report=False)
    fit(WandbLogger(project="digits", id="run", save_dir=tmp_path, mode="offline"), monitor)
    assert server.runs == {}
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(folder)],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_curves(server.runs["run"], monitor.history)
    assert_same_end(server.runs["run"], monitor.history)
    assert len(server.runs["run"].media("layer_rotation_charts/heatmap")) == 5


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_run_goes_on_where_it_was(server: WandbServer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"project": "digits", "id": "run", "save_dir": tmp_path}
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    first = LayerRotationMonitor(every_n_steps=2, log_quantities=QUANTITIES, report=False)
    fit(WandbLogger(**options), first, keep, epochs=1)
    before = list(server.runs["run"].rows)
    second = LayerRotationMonitor(every_n_steps=2, log_quantities=QUANTITIES, report=False)
    path = {"ckpt_path": keep.last_model_path, "weights_only": True}
    fit(WandbLogger(**options, resume="must"), second, ModelCheckpoint(tmp_path / "kept"), epochs=3, **path)
    run = server.runs["run"]
    assert (run.rows[: len(before)], run.offsets[0], len(before) in run.offsets) == (before, 0, True)
    assert [row["_step"] for row in run.rows] == list(range(len(run.rows)))
    assert second.history.steps == list(range(2, 25, 2))
    assert_same_curves(run, second.history)
    assert_same_end(run, second.history)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "prefix": ({"prefix": "net.a"}, "net.a-"),
    "log_model": ({"log_model": True}, ""),
    "log_model all": ({"log_model": "all"}, ""),
    "anonymous": ({"anonymous": True}, ""),
    "name, group and tags": ({"name": "a/b", "group": "g", "tags": ["t"]}, ""),
}


@pytest.mark.parametrize(("options", "prefix"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_logger(server: WandbServer, tmp_path: Path, options: dict[str, Any], prefix: str) -> None:
    monitor = LayerRotationMonitor(every_n_steps=4, log_quantities=QUANTITIES, report=False)
    logger = WandbLogger(project="digits", id="run", save_dir=tmp_path, **options)
    fit(logger, monitor, ModelCheckpoint(tmp_path / "kept"))
    assert_same_curves(server.runs["run"], monitor.history, prefix)
    assert_same_end(server.runs["run"], monitor.history, prefix)
    assert bool(server.artifacts) == bool(options.get("log_model"))


@pytest.mark.parametrize("handed_over", [True, False], ids=["WandbLogger(experiment=run)", "wandb.init before"])
@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")
def test_run_that_was_there_before_the_trainer(server: WandbServer, tmp_path: Path, handed_over: bool) -> None:
    run = wandb.init(project="digits", id="run", dir=tmp_path)
    run.log({"mine": 1.0})
    monitor = LayerRotationMonitor(every_n_steps=4, log_quantities=QUANTITIES, report=False)
    fit(WandbLogger(experiment=run) if handed_over else WandbLogger(), monitor)
    assert server.runs["run"].rows[0]["mine"] == 1.0
    assert_same_curves(server.runs["run"], monitor.history)
    assert_same_end(server.runs["run"], monitor.history)


def test_disabled_run_sends_nothing(server: WandbServer, tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(every_n_steps=4, report=False)
    fit(WandbLogger(project="digits", save_dir=tmp_path, mode="disabled"), monitor)
    assert (server.runs, len(monitor.history)) == ({}, 4)


HOSTILE = ["<script>alert(1)</script>", "a\"b'c`${x}{{y}}", "\u202etxet\u202c", "a/b\\c", "new\nline", "x" * 300]


class Hostile(Net):
    """Six layers with names that none should have."""

    def __init__(self) -> None:
        super().__init__()
        for name in HOSTILE:
            self.add_module(name, type(self.head)(6, 3))

    def forward(self, inputs: Any) -> Any:
        features = self.body(inputs)
        return self.head(features) + sum(getattr(self, name)(features) for name in HOSTILE)


def test_hostile_names_are_data(server: WandbServer, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>" + HOSTILE[1] + HOSTILE[2]
    monitor = LayerRotationMonitor(every_n_steps=4, log_quantities=QUANTITIES, report=False)
    fit(WandbLogger(project="digits", id="run", name=name, save_dir=tmp_path), monitor, module=Hostile())
    run = server.runs["run"]
    assert monitor.history.layer_names == ["body.0", "head", *HOSTILE]
    assert [layer["name"] for layer in run.config["layer_rotation"]["value"]["layers"]] == monitor.history.layer_names
    assert run.display_name == name
    assert_same_curves(run, monitor.history)
    keys = {key for row in run.rows for key in row if key.startswith("layer_")}
    assert all(re.fullmatch("[a-z_]+/[0-9A-Za-z_]+", key) for key in keys)
    charts = [json.loads(content) for chart in CHARTS for content in run.media(f"layer_rotation_charts/{chart}")]
    assert not re.search("<(?!/?b>|br>|extra>|/extra>)", json.dumps(charts, ensure_ascii=False))
