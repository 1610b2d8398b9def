"""The monitor when loggers fail, disks fill up and weights turn NaN: a warning, and the training goes on."""

import contextlib
import ctypes
import re
import resource
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import Each, Memory, Weights, by_hand, fit
from nets import Net
from processes import launch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from pl_layer_rotation import LayerRotationMonitor, RotationHistory


class FailsToLog(CSVLogger):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("the server is gone")


class FailsToOpen(CSVLogger):
    """What it writes to is gone once training starts: the graph is the last that Lightning asks for before."""

    gone = False

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self.gone = True

    @property
    def experiment(self) -> Any:
        if self.gone:
            raise ConnectionError("the server is gone")
        return super().experiment

    def save(self) -> None:
        """There is nothing to save."""

    def finalize(self, status: str) -> None:
        """There is nothing to close."""


class WandbLogger(FailsToOpen):
    """By its name one that gets charts too."""

    _prefix = ""


def said(caught: Any) -> list[str]:
    """What the monitor warned of."""
    texts = [str(warning.message) for warning in caught]
    return [text.removeprefix("LayerRotationMonitor: ") for text in texts if text.startswith("LayerRotationMonitor")]


@pytest.mark.contract("C6", "C13")
@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (FailsToLog, ["logging to FailsToLog"]),
        (FailsToOpen, ["logging to FailsToOpen"]),
        (WandbLogger, ["the preparation of W&B", "logging to WandbLogger", "the charts for W&B"]),
    ],
    ids=["log_metrics", "experiment", "experiment of W&B"],
)
def test_a_logger_that_fails_costs_a_warning_a_kind_and_others_are_served(
    kind: type[CSVLogger], parts: list[str], order: int, tmp_path: Path
) -> None:
    monitor, other = LayerRotationMonitor(every_n_steps=1), Memory()
    loggers = [kind(tmp_path / "failing"), other][::order]
    with pytest.warns(UserWarning, match="LayerRotationMonitor") as caught:
        run = fit(monitor, logger=loggers, default_root_dir=tmp_path)
    texts = said(caught)
    assert len(texts) == len(set(texts))
    assert all(text.endswith(" failed and is left out: ConnectionError: the server is gone.") for text in texts)
    warned = [text.split(" failed")[0] for text in texts]
    # W&B may get more than what is listed here.
    assert parts == [part for part in warned if part in parts or "W&B" not in part]
    assert run.state.finished
    assert other.steps("layer_rotation/001_head") == list(range(8))
    assert len(monitor.history) == 8


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A file system of 16 kB, which vanishes with the process: only that has it among its mounts."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000) != 0:  # CLONE_NEWNS
        raise PermissionError("no mount for us here")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], check=True)
    yield


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A file system that is mounted read-only, which holds for root too."""
    with full_disk(folder):
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield


@contextlib.contextmanager
def small_files(folder: Path) -> Iterator[None]:
    """The process may write no file of more than 4 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def file_instead(folder: Path) -> Iterator[None]:
    """A file stands where the folder should be."""
    folder.rmdir()
    folder.write_text("not a folder", encoding="utf-8")
    yield


def trains_where_writing_fails(rank: int, limit: Any, folder: Path) -> Any:
    """Whether it finished, its warnings, how many rows it has, those on the disk, and the names of the files there."""
    try:
        with limit(folder), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            monitor = LayerRotationMonitor(every_n_steps=1)
            run = fit(monitor, default_root_dir=folder, max_epochs=10)
            left = [file.name for file in folder.iterdir()] if folder.is_dir() else []
            kept = RotationHistory.load(folder / "layer_rotation.jsonl").steps if "layer_rotation.jsonl" in left else []
    except PermissionError as error:
        return str(error)
    return run.state.finished, said(caught), len(monitor.history), kept, left


@pytest.mark.contract("C13")
@pytest.mark.parametrize(
    ("limit", "error", "rows"),
    [
        (full_disk, "OSError: .*No space left on device.*", True),
        (small_files, "OSError: .*File too large.*", True),
        (read_only, "OSError: .*Read-only file system.*", False),
        (file_instead, "(FileExists|NotADirectory)Error: .*", False),
    ],
    ids=["full disk", "size limit", "read-only", "file in place of the folder"],
)
def test_a_disk_that_takes_no_more_costs_a_warning_a_file_and_keeps_the_rows_that_it_took(
    limit: Any, error: str, rows: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    (result,) = launch(trains_where_writing_fails, limit, folder, world=1, timeout=60)
    if isinstance(result, str):
        pytest.skip(result)
    finished, warned, count, kept, left = result
    assert finished
    assert count == 80
    assert len(warned) == 2
    for file, text in zip(("history", "page"), warned, strict=True):
        assert re.fullmatch(rf"writing the {file} failed and is left out: {error}\.", text)
    assert left == (["layer_rotation.jsonl"] if rows else [])
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) >= (5 if rows else 0)


def trains_through_an_outage(rank: int, folder: Path) -> tuple[list[str], list[int]]:
    """Rows on the disk ten steps after it took nothing for ten steps, the first of them cut in its middle."""
    file, found = folder / "layer_rotation.jsonl", []

    def change(run: pl.Trainer, _: Any) -> None:
        if run.global_step == 19:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, resource.RLIM_INFINITY))
        elif run.global_step == 29:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        elif run.global_step == 39:
            found.extend(RotationHistory.load(file).steps)

    with pytest.warns(UserWarning, match="writing the history failed") as caught:
        fit(LayerRotationMonitor(every_n_steps=1), Each(change), default_root_dir=folder, max_epochs=6)
    return said(caught), found


@pytest.mark.contract("C13")
def test_a_disk_that_was_full_for_a_while_has_all_rows_again_afterwards(tmp_path: Path) -> None:
    ((warned, found),) = launch(trains_through_an_outage, tmp_path, world=1, timeout=60)
    assert len(warned) == 1
    assert found == list(range(1, 40))


class Towers(Net):
    """Two networks side by side: a NaN in one does not reach the other."""

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        return (self.body(batch[0]) - 1).square().mean() + (self.head(batch[0][:, :6]) - batch[1]).square().mean()


class Poisons(pl.Callback):
    """One element of the head's gradient is NaN in the fifth step."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 4:
            pl_module.head.weight.grad[0, 0] = torch.nan


Poisoned = tuple[LayerRotationMonitor, Weights, Memory, pl.Trainer, Path]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    monitor, saved, memory = LayerRotationMonitor(every_n_steps=1), Weights(), Memory()
    folder = tmp_path_factory.mktemp("nan")
    run = fit(Poisons(), monitor, saved, module=Towers(), logger=memory, default_root_dir=folder)
    return monitor, saved, memory, run, folder


@pytest.mark.contract("C5", "C13")
def test_a_layer_that_turns_nan_has_no_values_from_then_on_and_others_go_on(poisoned: Poisoned) -> None:
    monitor, saved, memory, run, folder = poisoned
    body, head = monitor.history.values("rotation").T
    np.testing.assert_allclose(body.numpy(), by_hand(saved, ["body.0"], list(range(1, 9)))["rotation"][:, 0], rtol=1e-6)
    assert head.isnan().tolist() == [False] * 4 + [True] * 4
    assert memory.steps("layer_rotation/000_body_0") == list(range(8))
    assert memory.steps("layer_rotation/001_head") == list(range(4))
    assert run.callback_metrics["layer_rotation_stats/mean"].isnan()
    assert RotationHistory.load(next(folder.rglob("*.jsonl"))) == monitor.history


@pytest.mark.contract("C13")
def test_a_layer_that_turns_nan_is_named_with_its_step(poisoned: Poisoned) -> None:
    monitor, _, _, _, folder = poisoned
    (finding,) = [finding for finding in monitor.history.findings() if finding.code == "non-finite"]
    assert (finding.layers, finding.values) == (("head",), {"step": 4})
    assert finding.sentence.startswith("`head` had no finite weights after step 4")
    assert "had no finite weights after step 4" in next(folder.rglob("*.html")).read_text(encoding="utf-8")
