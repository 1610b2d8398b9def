"""The monitor when processes die, disks fill up and loggers fail: the training and its curves survive."""

import contextlib
import ctypes
import functools
import os
import re
import resource
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import Each, Memory, StopsAt, Weights, assert_true, by_hand, fit, quiet, sgd
from nets import Net, batches, trainer
from processes import exit_codes, launch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from pl_layer_rotation import LayerRotationMonitor, RotationHistory

KILLED_AFTER, SAVED_EVERY, STEPS = 11, 4, 16
QUANTITIES = ("rotation", "norm_ratio", "angular_update")


class Killed(pl.Callback):
    """Kills these processes after a step, before its checkpoint could be written."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == KILLED_AFTER and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)


def mortal_fit(
    rank: int, folder: Path, killed: tuple[int, ...] = (), resume: Path | None = None
) -> list[dict[str, Any]]:
    monitor = LayerRotationMonitor(every_n_steps=1)
    keep = ModelCheckpoint(folder / "saved", every_n_train_steps=SAVED_EVERY, save_top_k=-1, filename="{step}")
    run = trainer(
        monitor,
        Killed(killed),
        keep,
        devices=2,
        strategy="ddp",
        max_epochs=2,
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_checkpointing=True,
    )
    module = Net(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(The dirpath has changed|Checkpoint directory)")
        run.fit(module, batches(identical=True), ckpt_path=resume, weights_only=True)
    return monitor.history.state_dict()["rows"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    first, second = launch(mortal_fit, tmp_path_factory.mktemp("whole"), timeout=60)
    assert first == second
    assert [row["step"] for row in first] == list(range(1, STEPS + 1))
    return first


@pytest.mark.contract("C11", "C15")
@pytest.mark.parametrize("killed", [(1,), (0,), (0, 1)], ids=["second killed", "first killed", "all killed"])
def test_a_killed_training_keeps_its_rows_and_resumes_to_the_uninterrupted_curves(
    killed: tuple[int, ...], tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    codes = exit_codes(mortal_fit, tmp_path, killed)
    # A survivor ends with the error of the group that lost a process.
    assert codes == [-signal.SIGKILL if rank in killed else 1 for rank in range(2)]
    left = RotationHistory.load(tmp_path / "layer_rotation.jsonl").state_dict()["rows"]
    assert len(left) >= KILLED_AFTER - 1
    assert left == uninterrupted[: len(left)]
    last = tmp_path / "saved" / "step=8.ckpt"
    assert sorted(last.parent.iterdir())[-1] == last
    for rows in launch(mortal_fit, tmp_path, (), last, timeout=60):
        assert rows == uninterrupted
    assert RotationHistory.load(tmp_path / "layer_rotation.jsonl").state_dict()["rows"] == uninterrupted


def fails_alone(rank: int, folder: Path) -> tuple[str, list[int]]:
    monitor = LayerRotationMonitor(every_n_steps=1)
    run = trainer(
        monitor,
        *([StopsAt(5, ValueError("only here"))] if rank == 1 else []),
        devices=2,
        strategy="ddp",
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    try:
        run.fit(Net(), batches(identical=True))
    except (ValueError, RuntimeError) as error:
        if rank == 1:
            # The group must not outlive this: the other process waits for a collective until then.
            torch.distributed.destroy_process_group()
        return f"{type(error).__name__}: {error}", monitor.history.steps
    return "", []


@pytest.mark.contract("C11", "C20")
def test_an_exception_on_one_process_is_reported_by_it_without_waiting_for_others(tmp_path: Path) -> None:
    # Not `launch`, which would have both wait for each other at the end.
    exit_codes(functools.partial(writes_result, fails_alone), tmp_path, timeout=60)
    first, second = ((tmp_path / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(2))
    assert second == str(("ValueError: only here", [1, 2, 3, 4, 5]))
    assert first.endswith("[1, 2, 3, 4, 5])")
    assert "RuntimeError" in first
    assert RotationHistory.load(tmp_path / "layer_rotation.jsonl").steps == [1, 2, 3, 4, 5]
    assert "</html>" in (tmp_path / "layer_rotation.html").read_text(encoding="utf-8")


def writes_result(function: Callable[..., Any], rank: int, folder: Path) -> None:
    (folder / f"{rank}.txt").write_text(str(function(rank, folder)), encoding="utf-8")


class Branches(Net):
    """Each process uses a layer of its own besides the common ones."""

    def __init__(self, uneven: bool) -> None:
        super().__init__()
        self.uneven = uneven
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs)
        for number, branch in enumerate(self.branches):
            if not self.uneven or number == self.global_rank:
                hidden = hidden + branch(hidden)
        return self.head(hidden)


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier")


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """The collectives that Python code calls, in order."""
    calls: list[str] = []

    def note(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(torch.distributed, name, note(name, getattr(torch.distributed, name)))
        yield calls


def ddp_fit(rank: int, folder: Path, uneven: bool, options: dict[str, Any]) -> dict[str, Any]:
    monitor, saved = quiet(), Weights()
    with noted() as calls:
        run = trainer(
            monitor,
            saved,
            devices=2,
            strategy=DDPStrategy(**options),
            use_distributed_sampler=False,
            logger=CSVLogger(folder) if rank == 0 else False,
        )
        run.fit(Branches(uneven), batches(identical=True))
    assert_true(monitor.history, saved)
    values = {quantity: monitor.history.values(quantity).tolist() for quantity in QUANTITIES}
    return {"names": monitor.history.layer_names, "calls": calls, **values}


DDP_OPTIONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain": (False, {}),
    "unused parameters": (True, {"find_unused_parameters": True}),
    "static graph": (False, {"static_graph": True}),
    "gradients as views": (False, {"gradient_as_bucket_view": True}),
}


@pytest.mark.contract("C1", "C20")
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
@pytest.mark.parametrize("kind", DDP_OPTIONS)
def test_processes_agree_whatever_they_use_log_or_are_told(kind: str, tmp_path: Path) -> None:
    uneven, options = DDP_OPTIONS[kind]
    first, second = launch(ddp_fit, tmp_path, uneven, options, timeout=60)
    assert first == second
    assert first["names"] == ["body.0", "head", "branches.0", "branches.1"]


class ShardedBranches(Branches):
    """Cut over the processes; nobody uses the branches, which never have a gradient."""

    def configure_model(self) -> None:
        for module in (self.body[0], *self.branches, self.head, self):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def sharded_fit(rank: int, folder: Path) -> tuple[list[str], list[int], list[list[float]]]:
    monitor, after_batches = quiet(), []
    with noted() as calls:
        run = trainer(
            monitor,
            Each(lambda *_: after_batches.append(calls.count("all_reduce"))),
            devices=2,
            strategy=ModelParallelStrategy(2, 1),
            use_distributed_sampler=False,
            logger=CSVLogger(folder) if rank == 0 else False,
        )
        run.fit(ShardedBranches(uneven=False), batches(identical=True))
    return calls, after_batches, monitor.history.values("rotation").tolist()


@pytest.mark.contract("C20")
def test_a_reading_is_one_collective_on_every_process_whatever_has_no_gradient_or_logs(tmp_path: Path) -> None:
    first, second = launch(sharded_fit, tmp_path, timeout=60)
    assert first == second
    _, after_batches, values = first
    assert np.diff(after_batches).tolist() == [1] * 7
    assert np.array(values)[:, 2:].max() == 0
    assert np.array(values)[:, :2].min() > 0


def trained_by(strategy: str, devices: int, folder: Path) -> tuple[pl.Trainer, RotationHistory]:
    monitor = LayerRotationMonitor(every_n_steps=1)
    run = trainer(monitor, devices=devices, strategy=strategy, default_root_dir=folder, use_distributed_sampler=False)
    run.fit(Net(sgd), batches(identical=True))
    return run, RotationHistory.load(folder / "layer_rotation.jsonl")


@pytest.mark.contract("C1", "C19", "C30")
@pytest.mark.timeout(300)  # every spawned process imports torch and Lightning anew
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_spawn"])
def test_strategies_that_start_processes_of_their_own_leave_the_curves_of_one_process(
    strategy: str, tmp_path: Path
) -> None:
    _, alone = trained_by("auto", 1, tmp_path / "alone")
    run, together = trained_by(strategy, 2, tmp_path / "together")
    assert together.steps == alone.steps == list(range(1, 9))
    for quantity in QUANTITIES:
        np.testing.assert_allclose(together.values(quantity).numpy(), alone.values(quantity).numpy(), rtol=1e-6)
    expected = float(together.values("rotation")[-1].mean())
    assert float(run.callback_metrics["layer_rotation_stats/mean"]) == pytest.approx(expected, rel=1e-6)


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


def interrupted(rank: int, folder: Path) -> None:
    fit(
        LayerRotationMonitor(every_n_steps=1),
        Each(lambda run, _: os.kill(os.getpid(), signal.SIGINT) if run.global_step == 5 else None),
        default_root_dir=folder,
    )


@pytest.mark.contract("C11")
def test_an_interrupt_from_the_keyboard_leaves_history_and_page(tmp_path: Path) -> None:
    assert exit_codes(interrupted, tmp_path, world=1) == [1]
    assert RotationHistory.load(tmp_path / "layer_rotation.jsonl").steps == [1, 2, 3, 4, 5]
    assert "</html>" in (tmp_path / "layer_rotation.html").read_text(encoding="utf-8")


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
