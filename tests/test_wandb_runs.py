"""A monitored training with a WandbLogger, its offline run read back from disk."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import wandb
from nets import Net, batches, trainer
from offline_runs import OfflineRun, read_offline_run
from pytorch_lightning.loggers import WandbLogger
from torch import nn

from pl_layer_rotation import LayerRotationMonitor, RotationHistory

KEYS = {"body.0": "layer_rotation/000_body_0", "head": "layer_rotation/001_head"}


def as_namespace(namespace: str) -> Any:
    """Net as a LightningModule of the other namespace."""
    package = importlib.import_module(namespace)
    if namespace == "pytorch_lightning":
        return package, Net()
    members = {
        name: vars(Net)[name] for name in ("forward", "training_step", "validation_step", "configure_optimizers")
    }
    module = type("Net", (package.LightningModule,), members)()
    source = Net()
    module.make_optimizer, module.body, module.head = source.make_optimizer, source.body, source.head
    return package, module


@pytest.fixture(scope="module", params=["pytorch_lightning", "lightning.pytorch"])
def recorded(request: Any, tmp_path_factory: Any) -> tuple[RotationHistory, OfflineRun, str]:
    folder: Path = tmp_path_factory.mktemp("run")
    package, module = as_namespace(request.param)
    logger = importlib.import_module(f"{request.param}.loggers").WandbLogger(
        project="test", save_dir=folder, mode="offline", prefix="" if request.param == "pytorch_lightning" else "net"
    )
    monitor = LayerRotationMonitor(every_n_steps=2, log_quantities=["rotation", "angular_update"])
    run = package.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=logger, callbacks=[monitor], log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(module, batches(), batches())
    kept = logger.experiment.dir
    wandb.finish()
    return monitor.history, read_offline_run(kept), "" if not logger._prefix else f"{logger._prefix}-"


def test_one_series_a_layer_at_lightnings_steps(recorded: Any) -> None:
    history, run, prefix = recorded
    for column, (layer, key) in enumerate(KEYS.items()):
        values = history.values("rotation")[:, column].tolist()
        assert history.layer_names[column] == layer
        assert run.series(prefix + key) == [(step - 1, v) for step, v in zip(history.steps, values, strict=True)]


def test_aggregates_are_series_and_the_last_one_is_the_summary(recorded: Any) -> None:
    history, run, prefix = recorded
    for name in ("mean", "min", "max"):
        expected = getattr(history.values("rotation"), "amin" if name == "min" else "amax" if name == "max" else name)(
            1
        )
        series = run.series(f"{prefix}layer_rotation_stats/{name}")
        assert [value for _, value in series] == pytest.approx(expected.tolist(), rel=1e-12)
        assert run.summary[f"{prefix}layer_rotation_stats/{name}"] == pytest.approx(expected[-1].item(), rel=1e-12)
    assert len(run.series(f"{prefix}layer_angular_update_stats/mean")) == 8


def test_charts_are_sent_while_training_goes_on_and_at_its_end(recorded: Any) -> None:
    history, run, prefix = recorded
    for chart in ("rotation", "final_rotation", "heatmap"):
        # Of 16 steps read in pairs: after a tenth, a quarter, a half, three quarters, and the last.
        assert [step for step, _ in run.series(f"{prefix}layer_rotation_charts/{chart}")] == [1, 3, 7, 11, 15]
    last = json.loads(run.media(f"{prefix}layer_rotation_charts/rotation")[-1].read_text(encoding="utf-8"))
    drawn = [float(f"{value:.4g}") for value in history.values("rotation")[:, 0].tolist()]
    assert [float(f"{value:.4g}") for value in last["data"][0]["y"]] == drawn


def test_config_lists_the_layers_and_says_how_the_run_is_trained(recorded: Any) -> None:
    _, run, prefix = recorded
    facts = {key: run.config["layer_rotation"][key] for key in ("optimizer", "learning_rate", "total_steps")}
    assert facts == {"optimizer": "SGD", "learning_rate": 0.1, "total_steps": 16}
    layers = run.config["layer_rotation"]["layers"]
    assert [(entry["name"], entry["shape"]) for entry in layers] == [("body.0", [6, 7]), ("head", [3, 6])]
    assert [entry["key"] for entry in layers] == [prefix + key for key in KEYS.values()]


class Deep(Net):
    """So many layers, of which two are used."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.others = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(layers - 2))


@pytest.mark.parametrize(("layers", "logged"), [(1000, 1000), (1001, 0)])
def test_a_thousand_layers_open_no_panel_of_their_own(tmp_path: Path, layers: int, logged: int) -> None:
    logger = WandbLogger(project="test", save_dir=tmp_path, mode="offline")
    monitor = LayerRotationMonitor(every_n_steps=8, report=False)
    trainer(monitor, logger=logger).fit(Deep(layers), batches())
    wandb.finish()
    run = read_offline_run(logger.experiment.dir)
    single = [key for key in run.metrics if key.startswith("layer_rotation/")]
    rows = [row for row in run.rows if "layer_rotation_stats/mean" in row]
    assert len(single) == logged
    assert all(run.metrics[key].options.hidden for key in single)
    assert [len([key for key in row if key.startswith("layer_rotation/")]) for row in rows] == [logged]
    assert run.config["layer_rotation"]["n_layers"] == layers
    chart = json.loads(run.media("layer_rotation_charts/rotation")[-1].read_text(encoding="utf-8"))
    assert len([line for line in chart["data"] if ">depth " in line.get("hovertemplate", "")]) == layers
