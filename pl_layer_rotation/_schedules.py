"""Schedules of the learning rate over a training whose length the trainer knows."""

import functools
import math
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "cosine", "steps")
# The paper's first task (C10-CNN1, arXiv 1806.01603): times 0.2 after epochs 80, 90 and 97 of 100.
_DROP_PERCENTS = (80, 90, 97)
_DROP_FACTOR = 0.2


class _Schedule(LambdaLR):
    """Rates times the share of a step; groups that callbacks add later follow by the same ratio.

    The share is no part of the state: a resumed training takes its rates and its place from the checkpoint and its
    length from the trainer, so that one that was made longer still ends where its schedule does.
    """

    def get_lr(self) -> list[float | torch.Tensor]:
        added = self.optimizer.param_groups[len(self.base_lrs) :]
        before, now = (self.lr_lambdas[0](step) for step in (self.last_epoch - 1, self.last_epoch))
        return [*super().get_lr(), *(group["lr"] * (now / before if before else 1.0) for group in added)]


def make_schedule(optimizer: Optimizer, module: nn.Module, schedule: str, warmup_steps: int) -> LambdaLR:
    """A scheduler that steps with the optimizer: linear warm-up, then one of ``SCHEDULES``.

    Raises:
        MisconfigurationException: If the training has no known length and the schedule needs one, or if it ends before
            the warm-up.

    """
    trainer = getattr(module, "_trainer", None)
    steps = math.inf
    if schedule != "constant":
        steps = training_steps(
            module,
            f"`schedule={schedule!r}`",
            "Pass a function that makes the scheduler: `lambda optimizer: CosineAnnealingLR(optimizer, steps)`.",
        )
    elif trainer is not None and _estimate(trainer) >= 0:
        steps = _estimate(trainer)
    # A trial of a few batches, or of none, must not fail for being short.
    is_trial = steps == 0 or (trainer is not None and trainer.fast_dev_run)
    if warmup_steps >= steps and not is_trial:
        raise MisconfigurationException(
            f"`warmup_steps` must be below the {steps} optimizer steps of the training, got {warmup_steps}. "
            "Warm up for fewer steps."
        )
    return _Schedule(optimizer, functools.partial(_share, schedule=schedule, steps=steps, warmup_steps=warmup_steps))


def training_steps(module: nn.Module, asking: str, instead: str) -> int:
    """Optimizer steps of the whole training, from the trainer that runs the module; 0 where it takes none.

    Raises:
        MisconfigurationException: If there is no trainer or it does not know; says who asks and what to do instead.

    """
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        raise MisconfigurationException(
            f"{asking} must know how long the training is, got a module without a trainer. {instead}"
        )
    steps = _estimate(trainer)
    if not 0 <= steps < math.inf:
        raise MisconfigurationException(
            f"{asking} must know how long the training is, got {steps} steps from the trainer. "
            f"Set `Trainer(max_steps=...)`, or `max_epochs` with data that has a length. {instead}"
        )
    return int(steps)


def _estimate(trainer: Any) -> float:
    """Optimizer steps of the whole training; infinite or negative where the trainer cannot tell."""
    # Where no batch is to be taken, Lightning takes the data for endless.
    return 0 if trainer.limit_train_batches == 0 else trainer.estimated_stepping_batches


def _share(step: int, schedule: str, steps: float, warmup_steps: int) -> float:
    """Share of the full rate that a step takes, counted from 0."""
    risen = min(1.0, (step + 1) / (warmup_steps + 1))
    if schedule == "cosine":
        done = (step - warmup_steps) / max(1.0, steps - warmup_steps)
        return risen * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    if schedule == "steps":
        return risen * _DROP_FACTOR ** sum(100 * step >= percent * steps for percent in _DROP_PERCENTS)
    return risen
