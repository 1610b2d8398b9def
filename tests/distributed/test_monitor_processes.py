"""The monitor on several processes: one collective a reading, and the same curves whatever each of them does."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import Each, Weights, assert_true, quiet, sgd
from nets import Net, batches, trainer
from processes import launch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from pl_layer_rotation import LayerRotationMonitor, RotationHistory

QUANTITIES = ("rotation", "norm_ratio", "angular_update")


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
