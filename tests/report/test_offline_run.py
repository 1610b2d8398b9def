"""A W&B run on this machine, read back, is the history that the monitor recorded."""

import importlib
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import wandb
from nets import Net, batches
from offline_runs import read_offline_run

from pl_layer_rotation import LayerRotationMonitor, RotationHistory
from pl_layer_rotation._log_keys import log_keys
from pl_layer_rotation.report.offline_run import OfflineRun, read_log, read_title, to_history
from pl_layer_rotation.report.runs import find_runs, read_run
from pl_layer_rotation.report.wandb_sink import run_config

STEP = "trainer/global_step"


@pytest.fixture(scope="module", params=["", "net"], ids=["no prefix", "prefix"])
def trained(request: Any, tmp_path_factory: Any) -> tuple[RotationHistory, Path, Path]:
    """What the monitor recorded, the log of the W&B run, and the folder that holds both."""
    folder: Path = tmp_path_factory.mktemp("logs")
    package = importlib.import_module("pytorch_lightning")
    logger = importlib.import_module("pytorch_lightning.loggers").WandbLogger(
        name="my run", project="test", save_dir=folder, mode="offline", prefix=request.param, config={"seed": 7}
    )
    monitor = LayerRotationMonitor(every_n_steps=2, log_quantities=["rotation", "angular_update"])
    trainer = package.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=logger, callbacks=[monitor], log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), batches(), batches())
    run_folder = Path(logger.experiment.dir).parent
    wandb.finish()
    read_offline_run(run_folder)  # waits until all of it is on disk
    return monitor.history, next(run_folder.glob("run-*.wandb")), folder


def run_of(*rows: dict[str, Any], layers: list[str], **config: Any) -> OfflineRun:
    return OfflineRun(config={**run_config(RotationHistory(layers)), **config}, rows=list(rows))


def log_of(*messages: bytes) -> bytes:
    log = b":W&B\xe1\xbe\x00"
    for message in messages:
        log += struct.pack("<IHB", zlib.crc32(message, zlib.crc32(b"\x01")), len(message), 1) + message
    return log


def test_every_logged_value_is_back_at_its_step(trained: Any) -> None:
    recorded, log, _ = trained
    history = to_history(read_log(log))
    assert history.layer_names == recorded.layer_names
    assert history.layer_shapes == recorded.layer_shapes
    assert history.steps == recorded.steps
    assert set(history.quantities) == {"rotation", "angular_update"}
    for quantity in history.quantities:
        assert history.values(quantity).tolist() == recorded.values(quantity).tolist()


def test_facts_are_config_last_metrics_and_median_straightness(trained: Any) -> None:
    recorded, log, _ = trained
    facts = to_history(read_log(log)).facts
    assert facts["seed"] == 7
    assert facts["median_straightness"] == recorded.values("straightness")[-1].median().item()
    assert facts["angle_readings"] == len(recorded.steps)
    assert facts["metrics"] == pytest.approx(recorded.facts["metrics"], rel=1e-12)


def test_run_with_a_history_beside_it_is_found_once_under_its_own_name(trained: Any) -> None:
    recorded, log, folder = trained
    (found,) = find_runs(folder)
    assert (found.file.name, found.title) == ("layer_rotation.jsonl", "my run")
    assert read_run(found).history == recorded
    (alone,) = find_runs(log.parent)
    (inside,) = find_runs(log.parent / "files")
    assert alone.file == inside.file == log
    assert (read_run(alone).title, read_run(alone).notes, read_title(log)) == ("my run", [], "my run")


def test_log_that_was_cut_gives_what_came_before(trained: Any, tmp_path: Path) -> None:
    recorded, log, _ = trained
    cut = tmp_path / "run-cut.wandb"
    cut.write_bytes(log.read_bytes()[: log.stat().st_size * 2 // 3])
    (found,) = find_runs(tmp_path)
    read = read_run(found)
    assert read.notes == ["The run did not end: it goes on, or was killed. Shown is what it had logged."]
    assert 0 < len(read.history) < len(recorded)
    assert read.history.steps == recorded.steps[: len(read.history)]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (b"no log", r"^it is no log of W&B\. Pass the folder of an offline run, or a layer_rotation\.jsonl\.$"),
        (log_of(b"\xff\xff\xff"), r"^it is damaged at byte 7\. Pass another copy\.$"),
        (log_of(b"") + b"\x00\x00\x00\x00\x01\x00\x01x", r"^it is damaged at byte 14\. Pass another copy\.$"),
    ],
    ids=["foreign", "no record", "wrong checksum"],
)
def test_foreign_and_damaged_logs_are_refused(log: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run-1.wandb"
    file.write_bytes(log)
    with pytest.raises(ValueError, match=message):
        read_log(file)


def test_record_over_several_blocks_is_one(tmp_path: Path) -> None:
    with wandb.init(mode="offline", dir=str(tmp_path), config={"long": "x" * 100_000}) as run:
        run.log({"a": 1})
    read_offline_run(run.dir)
    (log,) = Path(run.dir).parent.glob("run-*.wandb")
    assert read_log(log).config["long"] == "x" * 100_000


def test_run_without_our_layers_is_refused() -> None:
    message = r"^no layer rotation was logged in this W&B run\. Train with `LayerRotationMonitor\(\)`\.$"
    for config in ({}, {"layer_rotation": 3}, {"layer_rotation": {"layers": [1]}}, {"layer_rotation": {"layers": []}}):
        with pytest.raises(ValueError, match=message):
            to_history(OfflineRun(config=config))
    with pytest.raises(ValueError, match=message):
        to_history(run_of({"val_acc": 0.5, STEP: 3}, layers=["fc"]))


def test_run_with_more_layers_than_are_logged_is_refused() -> None:
    message = (
        r"^a W&B run has the curves of single layers only up to 1000 layers, and this one has 1001\. "
        r"Pass its layer_rotation\.jsonl\.$"
    )
    with pytest.raises(ValueError, match=message):
        to_history(run_of(layers=[f"layer{i}" for i in range(1001)]))


def test_rows_at_one_step_are_one_reading_and_an_earlier_step_replaces_later_ones() -> None:
    first, second = log_keys(["a", "b"])
    rows = [
        {first: 0.1, STEP: 9},
        {second: 0.2, STEP: 9},
        {first: 0.3, second: 0.4, STEP: 19},
        {first: 0.5, second: "Infinity", STEP: 14},
        {first: 0.6},
    ]
    history = to_history(run_of(*rows, layers=["a", "b"]))
    assert history.steps == [10, 15]
    assert history.values("rotation").tolist() == [[0.1, 0.2], [0.5, math.inf]]


def test_what_is_no_metric_stays_out_of_the_metrics() -> None:
    (key,) = log_keys(["fc"])
    row = {key: 0.1, STEP: 0, "_runtime": 2.0, "epoch": 1, "val_acc": 0.5, "flag": True, "text": "x", "bad": "NaN"}
    facts = to_history(run_of(row, {"val_acc": 0.75}, layers=["fc"], _wandb={}, lr=0.1)).facts
    assert facts == {"lr": 0.1, "metrics": {"val_acc": 0.75}}


@pytest.mark.parametrize(("readings", "codes"), [(29, []), (30, ["D"])])
def test_straightness_that_was_logged_speaks_in_the_findings(readings: int, codes: list[str]) -> None:
    (key,) = log_keys(["fc"])
    rows = [{key: 0.1, "layer_straightness_stats/median": 2.0, STEP: step} for step in range(readings)]
    history = to_history(run_of(*rows, layers=["fc"]))
    assert [finding.code for finding in history.findings()] == codes
