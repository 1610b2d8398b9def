"""The monitor under FSDP1 (FSDPStrategy): the curves of one process, through checkpoints too."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_fsdp import DEPRECATIONS, CPUFSDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer
from processes import launch
from torch import nn

from pl_layer_rotation import LayerRotationMonitor, layca_optimizers

pytestmark = pytest.mark.filterwarnings(*DEPRECATIONS)

STRATEGIES: dict[str, dict[str, Any]] = {
    "FULL_SHARD": {"auto_wrap_policy": {nn.Linear}},
    "SHARD_GRAD_OP": {},
    "NO_SHARD": {},
}


def fit(rank: int, strategy: str | None, epochs: int, path: str | None = None, resume: bool = False) -> dict[str, Any]:
    """Curves of a training that saves, or resumes from, a checkpoint at ``path``."""
    monitor = LayerRotationMonitor(report=False)
    run = trainer(
        monitor,
        devices=2 if strategy else 1,
        strategy=CPUFSDPStrategy(sharding_strategy=strategy, **STRATEGIES[strategy]) if strategy else "auto",
        max_epochs=epochs,
        use_distributed_sampler=False,
    )
    arguments = {"ckpt_path": path, "weights_only": False} if resume else {}
    net = Net(lambda module: layca_optimizers(module, lr=0.05, momentum=0.9))
    # Validation leaves the gathered weights in the modules under SHARD_GRAD_OP.
    run.fit(net, batches(identical=True), batches(), **arguments)
    if path and not resume:
        run.save_checkpoint(path)
    history = monitor.history
    values = {quantity: history.values(quantity).tolist() for quantity in history.quantities}
    return {"steps": history.steps, "shapes": list(map(tuple, history.layer_shapes)), **values}


def same_curves(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {key: ours[key] for key in ("steps", "shapes")} == {key: expected[key] for key in ("steps", "shapes")}
    for quantity in ("rotation", "angular_update", "norm_ratio"):
        np.testing.assert_allclose(ours[quantity], expected[quantity], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_read_what_one_reads(strategy: str) -> None:
    first, second = launch(fit, strategy, 2)
    assert first == second
    same_curves(first, fit(0, None, 2))


@pytest.mark.parametrize("to_one", [False, True], ids=["to two processes", "to one process"])
def test_resumed_curves_equal_the_uninterrupted_ones(tmp_path: Path, to_one: bool) -> None:
    path = str(tmp_path / "half.ckpt")
    launch(fit, "FULL_SHARD", 1, path)
    for resumed in launch(fit, None if to_one else "FULL_SHARD", 2, path, True, world=1 if to_one else 2):
        same_curves(resumed, fit(0, None, 2))


def fit_one_flat_parameter(rank: int, optimizer: bool) -> tuple[str, int]:
    strategy = CPUFSDPStrategy(use_orig_params=False)
    run = trainer(*([] if optimizer else [LayerRotationMonitor(report=False)]), devices=2, strategy=strategy)

    class Flat(Net):
        def configure_optimizers(self) -> Any:
            return layca_optimizers(self) if optimizer else torch.optim.SGD(self.trainer.model.parameters(), lr=0.1)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            run.fit(Flat(), batches())
        except MisconfigurationException as error:
            return str(error), run.global_step
    return " ".join(
        str(warning.message) for warning in seen if "LayerRotation" in str(warning.message)
    ), run.global_step


MEND = "Use FSDPStrategy with `use_orig_params=True`"


def test_the_optimizer_refuses_one_parameter_for_all_and_names_the_mend() -> None:
    for message, steps in launch(fit_one_flat_parameter, True):
        assert MEND in message
        assert steps == 0


def test_the_monitor_says_that_one_parameter_for_all_cannot_be_measured_and_training_goes_on() -> None:
    (message, steps), (other_message, other_steps) = launch(fit_one_flat_parameter, False)
    assert "layers cannot be measured, and training goes on without: `module` must keep its parameters" in message
    assert MEND in message
    assert (other_message, steps, other_steps) == ("", 4, 4)
