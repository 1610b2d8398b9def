"""Who gets the monitor's readings (loggers, callbacks, files, the console), and what happens where that fails."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import fit
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from traces import read_csv

from pl_layer_rotation import LayerRotationMonitor, RotationHistory, layca_optimizers


@pytest.mark.contract("C6")
def test_every_logger_gets_each_reading_at_lightnings_step(tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(every_n_steps=2, log_quantities=["rotation", "norm_ratio"], report=False)
    fit(monitor, logger=[CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")])
    for folder in ("a", "b"):
        rows = read_csv(tmp_path / folder)
        assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
        logged = [[float(row[f"layer_rotation/{key}"]) for key in ("000_body_0", "001_head")] for row in rows]
        np.testing.assert_allclose(logged, monitor.history.values("rotation").numpy(), rtol=1e-12)
        mean = [float(row["layer_norm_ratio_stats/mean"]) for row in rows]
        np.testing.assert_allclose(mean, monitor.history.values("norm_ratio").mean(1).numpy(), rtol=1e-12)


@pytest.mark.contract("C5")
def test_early_stopping_acts_on_an_aggregate_from_the_first_validation_on() -> None:
    stop = EarlyStopping(
        "layer_rotation_stats/mean", mode="max", stopping_threshold=1e-3, check_on_train_epoch_end=False
    )
    monitor = LayerRotationMonitor(every_n_steps=1000, report=False)
    run = trainer(stop, monitor, max_epochs=50, num_sanity_val_steps=1)
    run.fit(Net(), batches(), batches())
    assert 0 < run.current_epoch < 50
    mean = monitor.history.values("rotation").mean().item()
    assert run.callback_metrics["layer_rotation_stats/mean"].item() == pytest.approx(mean, rel=1e-6)
    assert mean >= 1e-3


@pytest.mark.contract("C5")
def test_model_checkpoint_keeps_the_epoch_with_the_largest_aggregate(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="layer_rotation_stats/max", mode="max", filename="{epoch}")
    fit(LayerRotationMonitor(report=False), keep, max_epochs=3, enable_checkpointing=True)
    assert keep.best_model_path.endswith("epoch=2.ckpt")


@pytest.mark.contract("C5")
def test_weights_that_are_not_finite_show_in_the_aggregates() -> None:
    run = fit(LayerRotationMonitor(report=False), module=Net(lambda m: torch.optim.SGD(m.parameters(), lr=1e30)))
    assert run.callback_metrics["layer_rotation_stats/mean"].isnan()


class FailingLogger(CSVLogger):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("layer_") for key in metrics):
            raise OSError(28, "No space left on device")
        super().log_metrics(metrics, step)


@pytest.mark.contract("C13")
def test_a_logger_that_fails_is_a_warning_and_other_loggers_are_served(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="logging to FailingLogger failed and is left out: OSError") as caught:
        run = fit(LayerRotationMonitor(report=False), logger=[FailingLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")])
    assert run.state.finished
    assert len([w for w in caught if "FailingLogger" in str(w.message)]) == 1
    assert len(read_csv(tmp_path / "b")) == 8


@pytest.mark.contract("C13")
def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.warns(
        UserWarning, match="writing the (page|history) failed and is left out: NotADirectoryError"
    ) as seen:
        run = fit(LayerRotationMonitor(), default_root_dir=tmp_path / "file" / "below")
    assert run.state.finished
    assert len([w for w in seen if "LayerRotationMonitor" in str(w.message)]) == 2


@pytest.mark.contract("C13")
def test_a_failed_measurement_is_a_warning_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = LayerRotationMonitor(report=False)
    calls = iter(range(100))

    def fails_later(*args: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError("no room for a copy")
        return original(*args)

    original = monitor._read
    monkeypatch.setattr(monitor, "_read", fails_later)
    with pytest.warns(UserWarning, match="measuring failed and stops here: MemoryError: no room for a copy"):
        run = fit(monitor)
    assert run.state.finished
    assert monitor.history.steps == [1, 2, 3]


@pytest.mark.contract("C11")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("boom")], ids=["Ctrl-C", "exception"])
def test_an_interrupted_training_still_reports(tmp_path: Path, error: Any) -> None:
    class Interrupts(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if args[-1] == 5:
                raise error

    monitor = LayerRotationMonitor()
    with pytest.raises((SystemExit, RuntimeError), match=r"1|boom"):
        fit(monitor, Interrupts(), default_root_dir=tmp_path)
    assert RotationHistory.load(tmp_path / "layer_rotation.jsonl").steps == [1, 2, 3, 4, 5]
    assert (tmp_path / "layer_rotation.html").stat().st_size > 10_000


def test_the_report_stands_next_to_the_logs_and_holds_the_history(tmp_path: Path, capsys: Any) -> None:
    monitor = LayerRotationMonitor()
    fit(monitor, logger=CSVLogger(tmp_path, name="run"), module=Net(lambda m: layca_optimizers(m, lr=0.05)))
    folder = tmp_path / "run" / "version_0"
    assert RotationHistory.load(folder / "layer_rotation.jsonl") == monitor.history
    printed = capsys.readouterr().out
    assert "Layer rotation after 8 steps" in printed
    assert "body.0" in printed
    assert "6 × 7" in printed
    facts = monitor.history.facts
    assert (facts["optimizer"], facts["learning_rate"], facts["devices"]) == ("Layca(SGD)", 0.05, 1)


class KilledAt(pl.Callback):
    """What is on the disk after so many steps, as a killed process would leave it."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder, self.text = step, folder, b""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.text = next(self.folder.rglob("layer_rotation.jsonl")).read_bytes()


def test_the_file_holds_all_readings_while_training_goes_on(tmp_path: Path) -> None:
    monitor, killed = LayerRotationMonitor(every_n_steps=1), KilledAt(5, tmp_path)
    fit(monitor, killed, default_root_dir=tmp_path)
    (tmp_path / "left.jsonl").write_bytes(killed.text)
    left = RotationHistory.load(tmp_path / "left.jsonl")
    assert left.steps == [1, 2, 3, 4, 5]
    assert torch.equal(left.values("rotation"), monitor.history.values("rotation")[:5])
    assert RotationHistory.load(next(tmp_path.rglob("layer_rotation.jsonl"))) == monitor.history


@pytest.mark.contract("C9", "C10")
@pytest.mark.parametrize(
    "option", [{"fast_dev_run": True}, {"barebones": True}, {"limit_train_batches": 0}, {"max_steps": 0}]
)
def test_trainings_that_write_nothing(tmp_path: Path, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"logger": None, "enable_checkpointing": None, "log_every_n_steps": None, **option}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fit(LayerRotationMonitor(), **options)
    assert run.state.finished
    assert list(tmp_path.rglob("layer_rotation*")) == []
