"""One training of a study: the LightningModule, its optimizer, and what is kept of it."""

import functools
import math
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from errors import InputError
from image_data import ImageData, Images
from networks import set_norm_momentum
from plans import Plan, rate_factor
from pytorch_lightning.callbacks import ModelCheckpoint
from studies import Setting
from tasks import Task
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pl_layer_rotation import LayerRotationMonitor, RotationHistory, layca_optimizers, select_layers

# The options with which the paper's library differs from torch.
_BASE_OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "RMSprop": {"alpha": 0.9, "eps": 1e-7},
    "Adam": {"eps": 1e-7},
    "Adagrad": {"eps": 1e-7},
}
# Adam's form of momentum. Torch's first step weighs ten times as much as there, which Layca's angle does not see.
_AVERAGED = {"momentum": 0.9, "dampening": 0.9}
_NESTEROV = {"momentum": 0.9, "nesterov": True}


class Classifier(pl.LightningModule):
    """A task's network under one setting's optimizer.

    Args:
        task: what is learned.
        setting: optimizer, rate and schedule.
        plan: length of the training.
        seed: of the initial weights.
        rates: for a replay, the rate of every layer in every step.

    """

    def __init__(
        self, task: Task, setting: Setting, plan: Plan, seed: int, rates: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.task, self.setting, self.plan, self.rates = task, setting, plan, rates
        torch.manual_seed(seed)
        self.net = task.network()
        set_norm_momentum(self.net, plan.norm_momentum)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self._loss(batch, "train")
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._loss(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._loss(batch, "test")

    def configure_optimizers(self) -> dict[str, Any]:
        options = _BASE_OPTIONS[self.setting.base] | (_AVERAGED if self.setting.averaged else {})
        if self.setting.layca:
            multipliers: float | dict[str, float] | None = self.setting.alpha or None
            if self.rates is not None:
                multipliers = dict.fromkeys(select_layers(self), 1.0)  # a group for each layer
            return layca_optimizers(
                self,
                lr=1.0 if self.rates is not None else self.setting.lr,
                base=self.setting.base,
                schedule=self._schedule,
                layer_multipliers=multipliers,
                **options,
            )
        if self.setting.base == "SGD" and self.task.nesterov:
            options = options | _NESTEROV
        optimizer = getattr(torch.optim, self.setting.base)(self._decay_groups(), lr=self.setting.lr, **options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"}}

    def _decay_groups(self) -> list[dict[str, Any]]:
        """L2 adds l2·|w|² to the loss, torch's weight_decay half of its coefficient times |w|²."""
        decayed = dict.fromkeys(dict(self.named_parameters()), 2 * self.setting.l2)
        if not self.task.decays_output:
            decayed["net.output.weight"] = 0.0
        parameters = dict(self.named_parameters())
        return [
            {"params": [parameters[name] for name, decay in decayed.items() if decay == value], "weight_decay": value}
            for value in dict.fromkeys(decayed.values())
        ]

    def _schedule(self, optimizer: Optimizer) -> LambdaLR:
        if self.rates is None:
            return LambdaLR(optimizer, functools.partial(rate_factor, self.setting, steps=self.plan.steps))
        columns = [self.rates[group["name"].removeprefix("rotating/")] for group in optimizer.param_groups]
        # The scheduler asks once more after the last step.
        return LambdaLR(optimizer, [lambda step, c=column: c[min(step, len(c) - 1)].item() for column in columns])

    def _loss(self, batch: tuple[Tensor, Tensor], part: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        correct = (logits.argmax(1) == labels).float().mean()
        self.log(f"{part}_acc", correct, on_step=False, on_epoch=True, batch_size=len(labels))
        return nn.functional.cross_entropy(logits, labels)


class _LastEpoch(ModelCheckpoint):
    """Every epoch in the place of the one before, but for the last: one stopped after it would have no curves left."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            super().on_train_epoch_end(trainer, pl_module)


class Finished(NamedTuple):
    """What a training leaves: its network as it was tested, and where, its curves, its numbers."""

    model: Classifier
    device: torch.device
    history: RotationHistory
    metrics: dict[str, float]


def train(
    task: Task,
    setting: Setting,
    plan: Plan,
    images: Images,
    seed: int,
    checkpoint: Path,
    rates: Mapping[str, Tensor] | None = None,
    accelerator: str = "auto",
) -> Finished:
    """Train and test one setting; go on from its checkpoint if there is one.

    Args:
        task: what is learned.
        setting: optimizer, rate and schedule.
        plan: length of the training.
        images: the data.
        seed: of weights, choice and order of images, augmentation and dropout.
        checkpoint: file of the last whole epoch, in a folder of its own; where the best epoch counts, it is there too.
        rates: for a replay, the rate of every layer in every step.
        accelerator: Lightning's.

    Raises:
        InputError: If the checkpoint cannot be read.

    """
    started = time.perf_counter()
    model = Classifier(task, setting, plan, seed, rates)
    data = ImageData(images, task, plan, seed)
    monitor = LayerRotationMonitor(every_n_steps=1 if setting.records else plan.steps_per_epoch, report=False)
    best = ModelCheckpoint(
        dirpath=checkpoint.parent, filename="best", monitor="val_acc", mode="max", enable_version_counter=False
    )
    last = _LastEpoch(
        dirpath=checkpoint.parent,
        filename=checkpoint.stem,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        max_epochs=plan.epochs,
        accelerator=accelerator,
        devices=1,
        logger=False,
        callbacks=[monitor, last, *([best] if task.selects_best else [])],
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if plan.validation_images else 0,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        log_every_n_steps=plan.steps_per_epoch,
    )
    resumed_from = _finished_epochs(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        trainer.fit(model, data, ckpt_path=str(checkpoint) if resumed_from else None)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if not name.startswith("layer")}
    tested = trainer.test(model, data, ckpt_path=best.best_model_path if task.selects_best else None, verbose=False)
    metrics |= {"test_acc": tested[0]["test_acc"], "seconds": time.perf_counter() - started}
    if resumed_from:
        metrics["resumed_after_epoch"] = resumed_from
    return Finished(model, trainer.strategy.root_device, monitor.history, metrics)


def recorded_rates(history: RotationHistory, steps: int) -> dict[str, Tensor]:
    """The tangent of the angle by which each step turned each layer: Layca's rate that makes the same turn.

    Raises:
        InputError: If a step is missing, or the training diverged.

    """
    angles = history.values("angular_update")
    if history.steps != list(range(1, steps + 1)) or not torch.isfinite(angles).all():
        raise InputError(
            f"`history` must hold an angle of every layer in each of {steps} steps, got {len(history)} readings, "
            f"{int(torch.isnan(angles).sum())} of their angles undefined. The recorded training may have diverged."
        )
    return dict(zip(history.layer_names, angles.clamp(max=0.499 * math.pi).tan().float().T, strict=True))


def _finished_epochs(checkpoint: Path) -> int:
    if not checkpoint.is_file():
        return 0
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["epoch"]) + 1
    except Exception as error:
        raise InputError(
            f"{checkpoint} must be the checkpoint of a stopped training, got an unreadable file. Delete it and the "
            "training starts anew."
        ) from error
