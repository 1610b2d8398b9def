"""Contract C7 to C14 and C16 to C19: the monitor from the first hook of a fit to whatever ends it."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import Each, LogsLoss, Memory, StopsAt, Weights, assert_true, fit, ours, quiet, sgd
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from pl_layer_rotation import LayerRotationMonitor, RotationHistory

FILES = "layer_rotation*"


class AllLoops(Net):
    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", super().training_step(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


@pytest.mark.contract("C7")
def test_other_loops_before_between_and_after_fits_log_nothing_of_ours(tmp_path: Path) -> None:
    monitor, saved, memory, module = LayerRotationMonitor(every_n_steps=1), Weights(), Memory(), AllLoops()
    run = trainer(monitor, saved, logger=memory, default_root_dir=tmp_path, num_sanity_val_steps=0)

    def others() -> None:
        run.validate(module, batches(), verbose=False)
        run.test(module, batches(), verbose=False)
        run.predict(module, batches())

    others()
    assert (monitor.state_dict(), list(tmp_path.rglob(FILES)), ours(memory.keys())) == ({}, [], [])
    for epochs in (1, 2):
        run.fit_loop.max_epochs = epochs
        run.fit(module, batches())
        logged = len(memory.steps("layer_rotation_stats/mean"))
        others()
        assert len(memory.steps("layer_rotation_stats/mean")) == logged == len(monitor.history) == 8 * epochs
    assert_true(monitor.history, saved)


@pytest.mark.contract("C8")
def test_a_fit_from_scratch_after_validating_a_checkpoint_measures_from_its_own_weights(tmp_path: Path) -> None:
    fit(quiet()).save_checkpoint(tmp_path / "a.ckpt")
    monitor, saved = quiet(), Weights()
    run = trainer(monitor, saved)
    for loop in (run.validate, run.test):
        loop(AllLoops(), batches(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    other = Net()
    nn.init.normal_(other.head.weight)
    run.fit(other, batches())
    assert monitor.history.steps == list(range(1, 9))
    assert_true(monitor.history, saved)


@pytest.mark.contract("C9", "C10")
@pytest.mark.filterwarnings("ignore:`Trainer.fit` stopped")
@pytest.mark.parametrize(
    ("option", "rows"),
    [
        ({"max_steps": 0}, []),
        ({"max_epochs": 0}, []),
        ({"limit_train_batches": 0}, []),
        ({"fast_dev_run": True}, [1]),
        ({"fast_dev_run": 3}, [1, 2, 3]),
        ({"barebones": True, "logger": None, "log_every_n_steps": None}, []),
    ],
    ids=str,
)
def test_trainings_that_are_none_leave_no_table_and_no_file(
    option: dict[str, Any], rows: list[int], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = LayerRotationMonitor()
    unset = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    run = trainer(monitor, **{**(unset if "barebones" in option else {}), **option})
    run.fit(Net(), batches())
    assert run.state.finished
    assert monitor.history.steps == rows
    assert "Layer rotation" not in capsys.readouterr().out
    assert list(tmp_path.rglob(FILES)) == []


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(7, generator=generator), torch.randn(3, generator=generator)


@pytest.mark.contract("C10")
@pytest.mark.parametrize(
    ("options", "data", "last"),
    [
        ({"overfit_batches": 2, "max_epochs": 3}, None, 6),
        ({"num_sanity_val_steps": 0}, None, 8),
        ({"max_steps": 5, "max_epochs": -1}, DataLoader(Endless(), batch_size=4), 5),
        ({"limit_train_batches": 5}, DataLoader(Endless(), batch_size=4), 5),
    ],
    ids=["overfit_batches", "no sanity check", "iterable by steps", "iterable by batches"],
)
def test_kinds_of_data_and_loops_are_measured_alike(options: dict[str, Any], data: Any, last: int) -> None:
    monitor, saved = quiet(), Weights()
    fit(monitor, saved, data=data, **options)
    assert monitor.history.steps == list(range(1, last + 1))
    assert_true(monitor.history, saved)


class Stopped(Exception):
    """An error with a value of its own, as users raise them."""


@pytest.mark.contract("C11")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped("at five", 5), SystemExit(3)], ids=repr)
def test_whatever_ends_a_training_the_history_is_whole_and_the_error_untouched(tmp_path: Path, error: Any) -> None:
    monitor, saved = LayerRotationMonitor(every_n_steps=1), Weights()
    raised = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
    with pytest.raises(raised, match=r"1|at five|3") as caught:
        fit(monitor, saved, StopsAt(5, error), default_root_dir=tmp_path)
    assert caught.value is error or isinstance(error, KeyboardInterrupt)
    assert RotationHistory.load(tmp_path / "layer_rotation.jsonl") == monitor.history
    assert monitor.history.steps == [1, 2, 3, 4, 5]
    assert_true(monitor.history, saved)
    assert "</html>" in (tmp_path / "layer_rotation.html").read_text(encoding="utf-8")


@pytest.mark.contract("C11")
def test_an_error_while_the_report_is_written_does_not_hide_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr("pl_layer_rotation.report.page.write_page", fails)
    error = Stopped("at five")
    with (
        pytest.warns(UserWarning, match="failed and is left out: OSError: disk is gone"),
        pytest.raises(Stopped, match="at five") as caught,
    ):
        fit(LayerRotationMonitor(), StopsAt(5, error), default_root_dir=tmp_path)
    assert caught.value is error


def rows(file: Path) -> list[int]:
    state = torch.load(file, weights_only=True)["callbacks"][quiet().state_key]
    assert state["reference"].keys() == {"body.0", "head"}
    return [row["step"] for row in state["history"]["rows"]]


@pytest.mark.contract("C12", "C15")
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize(
    "checkpoint",
    [lambda folder: ModelCheckpoint(folder, save_on_exception=True, save_top_k=0), OnExceptionCheckpoint],
    ids=["ModelCheckpoint", "OnExceptionCheckpoint"],
)
def test_a_checkpoint_of_an_exception_carries_our_state_and_resumes(tmp_path: Path, checkpoint: Any) -> None:
    """Lightning counts one step too many after a checkpoint between two batches, for all that is logged: so do we."""
    data, whole = batches(identical=True), quiet()
    fit(whole, data=data)
    with pytest.raises(Stopped, match="at five"):
        fit(quiet(), checkpoint(tmp_path), StopsAt(5, Stopped("at five")), data=data, enable_checkpointing=True)
    (file,) = tmp_path.glob("*.ckpt")
    assert rows(file) == [1, 2, 3, 4, 5]
    resumed, memory = quiet(), Memory()
    run = trainer(resumed, checkpoint(tmp_path), logger=memory, enable_checkpointing=True)
    run.fit(LogsLoss(), data, ckpt_path=file, weights_only=True)
    assert memory.steps("loss") == memory.steps("layer_rotation/001_head") == [6, 7, 8]
    assert resumed.history.steps == [1, 2, 3, 4, 5, 7, 8, 9]
    for quantity in ("rotation", "norm_ratio", "angular_update"):
        assert torch.equal(resumed.history.values(quantity), whole.history.values(quantity))


@pytest.mark.contract("C12")
def test_checkpoints_that_are_written_in_the_background_hold_the_rows_of_their_step(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(quiet(), keep, enable_checkpointing=True, plugins=[AsyncCheckpointIO()])
    kept = {file.stem: rows(file) for file in tmp_path.glob("*.ckpt")}
    assert kept == {f"step={step}": list(range(1, step + 1)) for step in (2, 4, 6, 8)}


@pytest.mark.contract("C12")
def test_a_state_that_was_handed_out_does_not_change_with_the_training() -> None:
    monitor, states = quiet(), []

    def keep(run: pl.Trainer, module: pl.LightningModule) -> None:
        states.append((monitor.state_dict(), copy.deepcopy(monitor.state_dict())))

    fit(monitor, Each(keep))
    assert len(states) == 8
    assert all(equal(state, at_that_time) for state, at_that_time in states)


def equal(first: Any, second: Any) -> bool:
    """Like `==`, with tensors in it, and NaN equal to itself."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second or first != first


def failures(caught: Any) -> list[str]:
    """What the monitor said that it could not do, warning by warning."""
    texts = [str(warning.message) for warning in caught]
    return [text.split(": ")[1].split(" failed")[0] for text in texts if text.startswith("LayerRotationMonitor: ")]


@pytest.mark.contract("C13")
def test_a_report_that_cannot_be_made_is_one_warning_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    with pytest.warns(UserWarning, match="failed and is left out: OSError") as caught:
        run = fit(LayerRotationMonitor(every_n_steps=1), default_root_dir=tmp_path)
    assert run.state.finished
    assert sorted(failures(caught)) == ["writing the history", "writing the page"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.contract("C14")
def test_fits_of_the_same_trainer_go_on_and_others_start_anew() -> None:
    monitor, module, saved = quiet(), Net(), Weights()
    run = fit(monitor, saved, module=module)
    run.fit_loop.max_epochs = 2
    run.fit(module, batches())
    assert monitor.history.steps == list(range(1, 17))
    assert_true(monitor.history, saved)
    for other in (module, Net()):
        saved = Weights()
        fit(monitor, saved, module=other)
        assert monitor.history.steps == list(range(1, 9))
        assert_true(monitor.history, saved)


class Tunable(LogsLoss):
    """What the Tuner changes."""

    def __init__(self) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=module.lr))
        self.lr, self.batch_size = 0.1, 2

    def val_dataloader(self) -> Any:
        return batches()

    def train_dataloader(self) -> Any:
        return batches(8 // self.batch_size, self.batch_size)


@pytest.mark.contract("C17", "C18")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_a_fit_after_the_tuner_holds_no_rows_of_its_search(search: str, tmp_path: Path) -> None:
    monitor, saved, memory, module = LayerRotationMonitor(every_n_steps=1), Weights(), Memory(), Tunable()
    run = trainer(monitor, saved, logger=memory, default_root_dir=tmp_path, enable_checkpointing=True)
    options = {"num_training": 6} if search == "lr_find" else {"max_trials": 2, "steps_per_trial": 2}
    getattr(Tuner(run), search)(module, **options)
    assert (monitor.state_dict(), list(tmp_path.rglob(FILES)), ours(memory.keys())) == ({}, [], [])
    run.fit(module)
    assert monitor.history.steps == list(range(1, len(run.train_dataloader) + 1))
    assert_true(monitor.history, saved)


@pytest.mark.contract("C16")
def test_monitors_of_the_same_layers_share_a_key_and_others_do_not() -> None:
    options: list[dict[str, Any]] = [{}, {"include": "head"}, {"exclude": "head"}, {"include": ["head", "body*"]}]
    assert len({LayerRotationMonitor(**option).state_key for option in options}) == len(options)
    reads_otherwise = LayerRotationMonitor(
        include=["head"], every_n_steps=7, report=False, log_quantities=["norm_ratio"]
    )
    assert reads_otherwise.state_key == LayerRotationMonitor(include="head").state_key


def plain(value: Any) -> bool:
    """Whether a value holds nothing but what every loader of checkpoints takes."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return type(value) in (str, int, float, bool, type(None), Tensor)


@pytest.mark.contract("C17")
def test_the_state_is_empty_before_and_plain_during_a_training() -> None:
    monitor, states = quiet(), []
    assert monitor.state_dict() == {}
    fit(monitor, Each(lambda *_: states.append(monitor.state_dict())), logger=Memory())
    assert len(states) == 8
    assert all(map(plain, states))


@pytest.mark.contract("C19")
def test_copies_made_before_a_fit_measure_on_their_own() -> None:
    first = quiet(exclude="head", log_quantities=["norm_ratio"])
    for monitor in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
        saved, memory = Weights(), Memory()
        fit(monitor, saved, logger=memory)
        assert monitor.history.layer_names == ["body.0"]
        assert memory.keys() >= {"layer_norm_ratio/000_body_0"}
        assert_true(monitor.history, saved)
    assert first.state_dict() == {}


@pytest.mark.contract("C19")
def test_a_copy_made_during_a_fit_holds_no_trainer_module_or_logger_and_can_fit(tmp_path: Path) -> None:
    monitor, copies = LayerRotationMonitor(every_n_steps=1), []
    fit(
        monitor,
        Each(lambda *_: copies.append((pickle.dumps(monitor), copy.deepcopy(monitor)))),
        module=Net(sgd),
        logger=CSVLogger(tmp_path),
    )
    pickled, copied = copies[4]
    assert b"CSVLogger" not in pickled
    assert b"nets" not in pickled
    for twin in (pickle.loads(pickled), copied):
        assert twin.history.steps == [1, 2, 3, 4, 5]
        saved = Weights()
        fit(twin, saved, default_root_dir=tmp_path)
        assert_true(twin.history, saved)
