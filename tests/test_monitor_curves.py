"""The monitor's curves and sums against values computed by hand from the saved weights, and which steps are read."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import fit
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from traces import LAYERS, SavedWeights, by_hand

from pl_layer_rotation import LayerRotationMonitor, layca_optimizers


@pytest.mark.contract("C1")
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Layca"])
def test_history_equals_a_computation_from_the_saved_weights(optimizer: str) -> None:
    make = {
        "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
        "Layca": lambda m: layca_optimizers(m, lr=0.05, momentum=0.9),
    }[optimizer]
    monitor, saved = LayerRotationMonitor(report=False), SavedWeights()
    fit(monitor, saved, module=Net(make), max_epochs=3)
    assert monitor.history.layer_names == list(LAYERS)
    assert monitor.history.steps == list(range(1, 25))
    for quantity, expected in by_hand(saved.snapshots).items():
        np.testing.assert_allclose(monitor.history.values(quantity).numpy(), expected, rtol=1e-6, atol=1e-14)


def sums_by_hand(angles: np.ndarray, read: list[int]) -> dict[str, np.ndarray]:
    """After the last step, where the angles of these steps (counted from 1) were read."""
    weights = np.diff([0, *read])[:, None]
    angles = angles[np.array(read) - 1]
    return {
        "path": (weights * angles).sum(0),
        "path_square": (weights * angles**2).sum(0),
        "peak": angles.max(0),
        "peak_step": np.array(read)[angles.argmax(0)],
    }


@pytest.mark.parametrize(
    ("every", "epochs", "read"),
    [
        (1, 3, list(range(1, 25))),
        (8, 3, list(range(1, 25))),  # 24 steps: fewer than 60 readings, so every step is read
        (40, 30, [*range(1, 25), *range(28, 241, 4)]),  # each of the first tenth, then 60 over the training
        (2, 30, [*range(1, 25), *range(26, 241, 2)]),
    ],
)
def test_sums_over_steps_equal_those_from_the_saved_weights(every: int, epochs: int, read: list[int]) -> None:
    monitor, saved = LayerRotationMonitor(every_n_steps=every, report=False), SavedWeights()
    module = Net(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    run = fit(monitor, saved, module=module, max_epochs=epochs)
    curves = by_hand(saved.snapshots)
    sums = sums_by_hand(curves["angular_update"], read)
    for quantity, expected in sums.items():
        np.testing.assert_allclose(monitor.history.values(quantity)[-1].numpy(), expected, rtol=1e-6)
    walk = np.arccos(np.exp(-0.5 * 19 * sums["path_square"]))
    kappa = np.arccos(1 - curves["rotation"][-1]) / walk
    np.testing.assert_allclose(monitor.history.values("straightness")[-1].numpy(), kappa, rtol=1e-5)
    median = run.callback_metrics["layer_straightness_stats/median"]
    assert float(median) == pytest.approx(float(np.sort(kappa)[0]), rel=1e-5)
    facts = monitor.history.facts
    assert (facts["angle_readings"], facts["momentum"], facts["constant_learning_rate"]) == (len(read), 0.9, True)


@pytest.mark.contract("C1")
def test_layca_angles_and_norms_are_as_requested() -> None:
    monitor = LayerRotationMonitor(report=False)
    fit(monitor, module=Net(lambda m: layca_optimizers(m, lr=0.05)))
    torch.testing.assert_close(
        monitor.history.values("angular_update"), torch.full((8, 2), math.atan(0.05)).double(), rtol=1e-5, atol=0.0
    )
    torch.testing.assert_close(
        monitor.history.values("norm_ratio"), torch.ones(8, 2, dtype=torch.float64), rtol=1e-6, atol=0.0
    )


@pytest.mark.contract("C2")
@pytest.mark.parametrize(
    ("every", "log_every", "expected"),
    [(1, 50, list(range(1, 17))), (3, 1, [3, 6, 9, 12, 15, 16]), (None, 5, [5, 10, 15, 16]), (None, 50, [16])],
)
def test_readings_follow_the_cadence_and_end_with_the_last_step(
    every: int | None, log_every: int, expected: list[int]
) -> None:
    monitor = LayerRotationMonitor(every_n_steps=every, report=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches")
        fit(monitor, max_epochs=2, log_every_n_steps=log_every)
    assert monitor.history.steps == expected


@pytest.mark.contract("C3")
def test_accumulated_batches_count_as_one_step() -> None:
    monitor, saved = LayerRotationMonitor(report=False), SavedWeights()
    fit(monitor, saved, data=batches(5), accumulate_grad_batches=2)
    assert monitor.history.steps == [1, 2, 3]
    after = [saved.snapshots[i] for i in (0, 2, 4, 5)]
    np.testing.assert_allclose(
        monitor.history.values("rotation").numpy(), by_hand(after)["rotation"], rtol=1e-6, atol=0
    )


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int = 0) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


@pytest.mark.contract("C4")
def test_manual_optimization_with_two_optimizers_counts_batches() -> None:
    monitor, saved = LayerRotationMonitor(every_n_steps=3, report=False), SavedWeights()
    fit(monitor, saved, module=TwoOptimizers())
    assert monitor.history.steps == [3, 6, 8]
    expected = by_hand(saved.snapshots)
    for quantity in ("rotation", "angular_update"):
        np.testing.assert_allclose(
            monitor.history.values(quantity)[:2].numpy(), expected[quantity][[2, 5]], rtol=1e-6, atol=0
        )


class EveryOther(TwoOptimizers):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int = 0) -> None:
        self.manual_backward(Net.training_step(self, batch))
        if batch_idx % 3 == 1:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.contract("C4")
def test_accumulating_by_hand_still_meets_the_cadence() -> None:
    monitor = LayerRotationMonitor(every_n_steps=3, report=False)
    fit(monitor, module=EveryOther(), data=batches(12))
    assert monitor.history.steps == [5, 8, 11]
    assert not monitor.history.values("angular_update").isnan().any()


@pytest.mark.contract("C7")
def test_other_loops_are_left_alone(tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(report=False)
    run = trainer(monitor, logger=CSVLogger(tmp_path))
    module = Net()
    run.validate(module, batches(), verbose=False)
    assert monitor.state_dict() == {}
    run.fit(module, batches())
    steps = list(monitor.history.steps)
    run.validate(module, batches(), verbose=False)
    assert monitor.history.steps == steps


@pytest.mark.contract("C26")
def test_measuring_leaves_training_as_it_is() -> None:
    def weights(*callbacks: pl.Callback) -> list[torch.Tensor]:
        module = Net(lambda m: layca_optimizers(m, lr=0.05, momentum=0.9))
        pl.seed_everything(7, verbose=False)
        fit(*callbacks, module=module)
        return [*module.parameters(), torch.rand(1)]

    monitored, alone = weights(LayerRotationMonitor(report=False)), weights()
    assert all(torch.equal(a, b) for a, b in zip(monitored, alone, strict=True))


@pytest.mark.contract("C25")
def test_weights_that_averaging_puts_in_are_never_measured() -> None:
    finals = []
    for callbacks in ([], [EMAWeightAveraging(decay=0.5)]):
        for order in (1, -1):
            monitor = LayerRotationMonitor(report=False)
            run = trainer(*[monitor, *callbacks][::order], max_epochs=2)
            run.fit(Net(), batches(), batches())
            finals.append(monitor.history.final())
    assert all(final == finals[0] for final in finals)
