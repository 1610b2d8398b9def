"""Contract C1 to C6: what the monitor measures, after which steps, and who gets it."""

import math
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import STATISTICS, LogsLoss, Memory, Weights, assert_true, by_hand, fit, ours, quiet
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from pl_layer_rotation import LayerRotationMonitor, layca_optimizers


class SteadyGradient(pl.LightningModule):
    """Every step sees the same gradient: Layca turns each layer along one great circle."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.layers = nn.ModuleList([nn.Linear(50, 40, bias=False), nn.Conv2d(4, 8, 3, bias=False)])
        self.gradients = [torch.randn_like(layer.weight, dtype=torch.float64) for layer in self.layers]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum((layer.weight * g).sum() for layer, g in zip(self.layers, self.gradients, strict=True))

    def configure_optimizers(self) -> Any:
        return layca_optimizers(self, lr=self.lr)


@pytest.mark.contract("C1")
@pytest.mark.parametrize(("precision", "rtol"), [("32-true", 1e-6), ("64-true", 1e-12)])
@pytest.mark.parametrize("lr", [0.1, 0.01])
def test_known_steps_of_layca_add_up_to_the_angle(lr: float, precision: str, rtol: float) -> None:
    monitor = quiet()
    fit(monitor, module=SteadyGradient(lr), precision=precision)
    steps = np.arange(1, 9)[:, None]
    expected = np.repeat(1 - np.cos(steps * math.atan(lr)), 2, axis=1)
    # Rounding of float32 weights turns a layer by itself, all the more of the angle where that is small.
    np.testing.assert_allclose(monitor.history.values("rotation").numpy(), expected, rtol=rtol / lr)
    np.testing.assert_allclose(monitor.history.values("angular_update").numpy(), math.atan(lr), rtol=rtol / lr)
    np.testing.assert_allclose(monitor.history.values("norm_ratio").numpy(), 1.0, rtol=1e-6)


@pytest.mark.contract("C2")
@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        (1, {"max_steps": 10, "max_epochs": -1}, list(range(1, 11))),
        (3, {"max_steps": 10, "max_epochs": -1}, [3, 6, 9, 10]),
        (5, {"max_epochs": 3}, [5, 10, 15, 20, 24]),
        (None, {"max_epochs": 2, "log_every_n_steps": 6}, [6, 12, 16]),
        (None, {"log_every_n_steps": 0}, []),
    ],
)
def test_rows_stand_at_the_multiples_and_at_the_end(
    every: int | None, options: dict[str, Any], expected: list[int]
) -> None:
    monitor, saved, memory = LayerRotationMonitor(every_n_steps=every, report=False), Weights(), Memory()
    fit(monitor, saved, logger=memory, **options)
    assert monitor.history.steps == expected
    assert memory.steps("layer_rotation/000_body_0") == [step - 1 for step in expected]
    if expected:
        assert_true(monitor.history, saved)


@pytest.mark.contract("C2")
def test_a_barebones_training_is_not_read_on_the_cadence_that_it_does_not_have() -> None:
    monitor = LayerRotationMonitor()
    run = pl.Trainer(callbacks=[monitor], barebones=True, max_epochs=1, accelerator="cpu", devices=1)
    run.fit(Net(), batches())
    assert (run.global_step, monitor.history.steps, ours(run.callback_metrics)) == (8, [], [])


@pytest.mark.contract("C3")
@pytest.mark.parametrize("count", [4, 5])
def test_accumulated_batches_count_as_one_step_and_none_comes_before_the_first(count: int) -> None:
    monitor, saved, memory = quiet(), Weights(), Memory()
    fit(monitor, saved, data=batches(count), accumulate_grad_batches=2, logger=memory)
    steps = list(range(1, math.ceil(count / 2) + 1))
    assert monitor.history.steps == steps
    assert memory.steps("layer_rotation_stats/mean") == [step - 1 for step in steps]
    assert_true(monitor.history, saved)


@pytest.mark.contract("C3", "C24")
def test_a_schedule_of_accumulation_changes_what_a_step_is() -> None:
    monitor, saved = quiet(), Weights()
    run = fit(monitor, saved, GradientAccumulationScheduler({0: 4, 1: 1, 2: 3}), max_epochs=3)
    assert monitor.history.steps == list(range(1, 2 + 8 + 3 + 1)) == list(range(1, run.global_step + 1))
    assert_true(monitor.history, saved)


class SkipsBatches(Net):
    """Gives no loss for two batches: Lightning counts a step all the same, with no gradient in it."""

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor | None:
        return None if batch_idx in (0, 4) else super().training_step(batch)


class Overflows(Net):
    """In two batches the loss is so large that the gradient scaler skips the step, which Lightning counts."""

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        return super().training_step(batch).float() * (1e38 if batch_idx in (0, 4) else 1.0)


def plain(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def layca(module: nn.Module) -> Any:
    """Without momentum, with which a layer may turn though nothing pulls at it."""
    return layca_optimizers(module, lr=0.05)["optimizer"]


@pytest.mark.contract("C3")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("optimizer", [plain, layca])
@pytest.mark.parametrize("skips", ["no loss", "overflow"])
@pytest.mark.parametrize("every", [1, 5])
def test_a_step_that_lightning_counts_but_nothing_took_is_read_as_an_angle_of_zero(
    every: int, skips: str, optimizer: Any
) -> None:
    monitor, saved = quiet(every_n_steps=every), Weights()
    if skips == "no loss":
        fit(monitor, saved, module=SkipsBatches(optimizer))
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        fit(monitor, saved, module=Overflows(optimizer), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
        assert scaler.get_scale() == 2.0**6
    assert_true(monitor.history, saved, rtol=1e-5)
    skipped = [step in (1, 5) for step in monitor.history.steps]
    assert monitor.history.values("angular_update").eq(0).all(1).tolist() == skipped
    walked = by_hand(saved, ["body.0", "head"], list(range(1, 9)))["angular_update"].sum(0)
    np.testing.assert_allclose(monitor.history.values("path")[-1].numpy(), walked, rtol=1e-5)


class TwoOptimizers(Net):
    """Steps by hand: both optimizers in every batch, or each in its own batches."""

    def __init__(self, steps_in: Any, make_optimizer: Any = plain) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization, self.steps_in = False, steps_in

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> None:
        for number, optimizer in enumerate(self.optimizers()):
            if self.steps_in(number, batch_idx):
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(part) for part in (self.body, self.head)]


@pytest.mark.contract("C4")
@pytest.mark.parametrize("optimizer", [plain, layca])
@pytest.mark.parametrize(("every", "expected"), [(1, list(range(1, 13))), (3, [3, 6, 9, 12])])
@pytest.mark.parametrize("both", [True, False], ids=["both in a batch", "in turn"])
def test_two_optimizers_are_read_by_batch(both: bool, every: int, expected: list[int], optimizer: Any) -> None:
    monitor, saved = quiet(every_n_steps=every), Weights()
    module = TwoOptimizers(lambda number, batch: both or batch % 2 == number, optimizer)
    run = fit(monitor, saved, module=module, data=batches(12))
    assert run.global_step == (24 if both else 12)
    assert monitor.history.steps == expected
    assert_true(monitor.history, saved, rtol=1e-5)
    if not both:
        moved = monitor.history.values("angular_update").ne(0).tolist()
        assert moved == [[step % 2 == 1, step % 2 == 0] for step in expected]


@pytest.mark.contract("C3", "C4")
def test_batches_in_which_no_optimizer_steps_have_no_row() -> None:
    """Lightning numbers every batch under manual optimization: a step is called after the batch that made it."""
    monitor, saved, memory = quiet(), Weights(), Memory()
    module = TwoOptimizers(lambda number, batch: batch in (1, 4) and number == 0)
    fit(monitor, saved, module=module, logger=memory)
    assert monitor.history.steps == [2, 5]
    assert memory.steps("layer_rotation_stats/mean") == [1, 4]
    assert_true(monitor.history, saved)


class Looks(pl.Callback):
    """What another callback finds in `callback_metrics` after each validation, and the step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: float(trainer.callback_metrics[f"layer_rotation_stats/{name}"]) for name in STATISTICS}
        self.seen.append((trainer.global_step, metrics))


@pytest.mark.contract("C5")
@pytest.mark.parametrize("every", [1, 2, 1000])
def test_aggregates_after_a_validation_are_those_of_the_weights_of_now(every: int) -> None:
    looks, saved = Looks(), Weights()
    run = trainer(looks, quiet(every_n_steps=every), saved, max_epochs=2, val_check_interval=3, num_sanity_val_steps=0)
    run.fit(Net(), batches(), batches())
    assert [step for step, _ in looks.seen] == [3, 6, 11, 14]
    for step, metrics in looks.seen:
        rotation = by_hand(saved, ["body.0", "head"], [step])["rotation"][0]
        expected = {"mean": np.mean(rotation), "min": min(rotation), "max": max(rotation)}
        assert metrics == pytest.approx(expected, rel=1e-6)


@pytest.mark.contract("C5", "C6")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["each batch", "accumulated"])
def test_every_logger_gets_readings_at_the_steps_of_other_metrics(options: dict[str, Any]) -> None:
    loggers, monitor = [Memory(), Memory()], LayerRotationMonitor(report=False)
    fit(monitor, module=LogsLoss(), logger=loggers, log_every_n_steps=2, **options)
    assert loggers[0].logged == loggers[1].logged
    steps = loggers[0].steps("layer_rotation/001_head")
    assert steps == loggers[0].steps("loss") == [step - 1 for step in monitor.history.steps]
    logged = [metrics.get("layer_rotation/001_head") for _, metrics in loggers[0].logged]
    assert [value for value in logged if value is not None] == monitor.history.values("rotation")[:, 1].tolist()
