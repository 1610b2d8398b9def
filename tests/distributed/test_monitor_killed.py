"""The monitor when processes are killed, raise or are interrupted: the curves survive and go on after a resume."""

import functools
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import Each, StopsAt, fit
from nets import Net, batches, trainer
from processes import exit_codes, launch
from pytorch_lightning.callbacks import ModelCheckpoint

from pl_layer_rotation import LayerRotationMonitor, RotationHistory

KILLED_AFTER, SAVED_EVERY, STEPS = 11, 4, 16


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
