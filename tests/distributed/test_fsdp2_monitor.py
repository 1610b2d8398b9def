"""The monitor under FSDP2 (ModelParallelStrategy): the curves of one process, through checkpoints too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Net, batches, trainer
from processes import launch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from pl_layer_rotation import LayerRotationMonitor, layca_optimizers

OPTIMIZERS = {
    "layca": lambda module: layca_optimizers(module, lr=0.05, momentum=0.9),
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
}


class Sharded(Net):
    """Rows of 6 and 3 over two processes: the last layer is cut unevenly."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for module in (self.body[0], self.head, self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])


def fit(
    rank: int, world: int, epochs: int, path: str | None, resume: bool, whole_files: bool, optimizer: str = "layca"
) -> dict[str, Any]:
    monitor = LayerRotationMonitor(report=False)
    strategy: Any = "auto"
    if world > 1:
        strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=not whole_files)
    run = trainer(monitor, devices=world, strategy=strategy, max_epochs=epochs, use_distributed_sampler=False)
    arguments = {"ckpt_path": path, "weights_only": False} if resume else {}
    run.fit(Sharded(OPTIMIZERS[optimizer]), batches(identical=True), **arguments)
    if path and not resume:
        run.save_checkpoint(path)
    values = {quantity: monitor.history.values(quantity).tolist() for quantity in monitor.history.quantities}
    mean = run.callback_metrics["layer_rotation_stats/mean"].item()
    return {"steps": monitor.history.steps, **values, "mean": mean}


def same_curves(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours["steps"] == expected["steps"]
    for quantity in ("rotation", "angular_update", "norm_ratio"):
        np.testing.assert_allclose(ours[quantity], expected[quantity], rtol=1e-5, atol=1e-7)


def test_two_processes_read_what_one_reads() -> None:
    first, second = launch(fit, 2, 2, None, False, False)
    assert first == second
    same_curves(first, fit(0, 1, 2, None, False, False))


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "whole_files", "optimizer"),
    # From one process Lightning finds optimizer states by the order of the module's parameters: no groups there.
    [(2, 2, False, "layca"), (2, 2, True, "layca"), (2, 1, True, "layca"), (1, 2, True, "sgd")],
    ids=["distributed checkpoint", "one file", "to one process", "from one process"],
)
def test_resumed_curves_equal_the_uninterrupted_ones(
    tmp_path: Path, saved_by: int, resumed_by: int, whole_files: bool, optimizer: str
) -> None:
    path = str(tmp_path / "half.ckpt")
    launch(fit, saved_by, 1, path, False, whole_files, optimizer, world=saved_by)
    resumed = launch(fit, resumed_by, 2, path, True, whole_files, optimizer, world=resumed_by)
    assert all(result == resumed[0] for result in resumed)
    same_curves(resumed[0], fit(0, 1, 2, None, False, False, optimizer))
