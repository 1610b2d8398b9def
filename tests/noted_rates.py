"""The learning rates of an optimizer's groups: by name, and in every step of a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from nets import Net, batches, trainer

from pl_layer_rotation import layca_optimizers


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(tuple(rates(optimizer).values()))


class At(pl.Callback):
    """Do something after an optimizer step."""

    def __init__(self, step: int, act: Callable[[pl.Trainer, pl.LightningModule], Any]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act(trainer, pl_module)


def rates_of_steps(
    make: Any, *callbacks: pl.Callback, ckpt_path: Path | None = None, **options: Any
) -> list[tuple[float, ...]]:
    """The rates of the groups in every optimizer step of a training."""
    seen = Rates()
    run = trainer(*callbacks, seen, **options)
    run.fit(Net(make), batches(), ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
    return seen.seen


def recipe(**options: Any) -> Any:
    return lambda module: layca_optimizers(module, lr=0.02, plain_lr=0.2, **options)
