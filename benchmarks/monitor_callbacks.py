"""The callbacks of monitor.py: clocks on the hooks of monitors and rivals, and the allocator's record of them."""

import gc
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from contenders import Evictor
from optimizer import _AllocationRecord
from torch import nn

from pl_layer_rotation import LayerRotationMonitor, select_layers

# The length of training that the trainer is told: a thousand dense steps. It ends after a few.
STEPS = 10_000
EVERYTHING, ANGLES, NOTHING = "everything", "angles only", "nothing"
ROTATION, COSINE, ITEMS, WATCH = "rotation alone", "F.cosine_similarity", "three .item()", "wandb.watch"
STEP = "step"


class Times:
    """Seconds by contender, one row a step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.row: dict[str, float] = {}
        self.evict = Evictor("cpu")

    def add(self, name: str, seconds: float) -> None:
        """Count these seconds of the running step."""
        self.row[name] = self.row.get(name, 0.0) + seconds

    def take(self, name: str, action: Callable[..., Any], *arguments: Any) -> None:
        """Do it and count its seconds."""
        self.evict()
        start = time.process_time()
        action(*arguments)
        self.add(name, time.process_time() - start)

    def close(self) -> None:
        """End the row."""
        self.rows.append(self.row)
        self.row = {}


class First(pl.Callback):
    """Stops the step's own clock before the contenders' turn."""

    def __init__(self, times: Times) -> None:
        self.times, self.start = times, 0.0

    def go_on(self) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def stop(self) -> None:
        """Count the time since the start."""
        self.times.add(STEP, time.process_time() - self.start)

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: D102
        self.go_on()

    def on_before_optimizer_step(self, *_: Any) -> None:  # noqa: D102
        self.stop()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:  # noqa: D102
        self.stop()


class Last(pl.Callback):
    """Starts the step's own clock again, and ends the fit."""

    def __init__(self, first: First, steps: int) -> None:
        self.first, self.steps = first, steps

    def on_before_optimizer_step(self, *_: Any) -> None:  # noqa: D102
        self.first.go_on()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:  # noqa: D102
        self.first.times.close()
        trainer.should_stop = len(self.first.times.rows) >= self.steps


class Timed(LayerRotationMonitor):
    """The monitor with a clock on its hooks, for one kind of step."""

    def __init__(self, kind: str, times: Times) -> None:
        super().__init__(every_n_steps=1 if kind == EVERYTHING else STEPS, report=False)
        self.kind, self.times = kind, times

    @property
    def state_key(self) -> str:  # noqa: D102
        return self.kind

    def on_train_start(self, *arguments: Any) -> None:  # noqa: D102
        super().on_train_start(*arguments)
        if self.kind == NOTHING:
            self._cadence = self._cadence._replace(dense_until=0)

    def on_before_optimizer_step(self, *arguments: Any) -> None:  # noqa: D102
        self.times.take(self.kind, super().on_before_optimizer_step, *arguments)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:  # noqa: D102
        self.times.take(self.kind, super().on_train_batch_end, trainer, pl_module, *rest)
        if self.kind == NOTHING:
            self.times.take(ROTATION, self.on_validation_start, trainer, pl_module)


class Watched(nn.Module):
    """Holds a network where `wandb.watch` finds it, so that its hook runs when asked to and not in the step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self) -> None:  # noqa: D102
        return None


class Rivals(pl.Callback):
    """What people write themselves, and the histograms of wandb."""

    def __init__(self, times: Times, run: Any) -> None:
        self.times, self.run = times, run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        self.pairs = [(weight, weight.detach().clone()) for weight in select_layers(pl_module).values()]
        if self.run:
            self.watched = Watched(pl_module.net)
            self.run.watch(self.watched, log="parameters", log_freq=1)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:  # noqa: D102
        self.times.take(COSINE, self.cosine)
        self.times.take(ITEMS, self.items)
        if self.run:
            self.times.take(WATCH, self.watch)

    def on_train_end(self, *_: Any) -> None:  # noqa: D102
        if self.run:
            self.run.unwatch(self.watched)

    def cosine(self) -> list[float]:
        """One line a layer."""
        return [1 - nn.functional.cosine_similarity(w.flatten(), o.flatten(), dim=0).item() for w, o in self.pairs]

    def items(self) -> list[float]:
        """A product and two norms a layer."""
        return [
            1 - torch.dot(w.flatten(), o.flatten()).item() / (w.norm().item() * o.norm().item()) for w, o in self.pairs
        ]

    def watch(self) -> None:
        """Histograms, and the step that they belong to."""
        self.watched()
        self.run.log({})


class Recorded(LayerRotationMonitor):
    """The monitor with the allocator's record of its start and of its hooks in the first step."""

    def __init__(self, kind: str) -> None:
        super().__init__(every_n_steps=1 if kind == EVERYTHING else STEPS, report=False)
        self.bytes: dict[str, dict[str, int]] = {}

    def record(self, name: str, action: Callable[..., Any], *arguments: Any) -> None:
        """Do it and keep what the allocator gave."""
        gc.collect()
        with _AllocationRecord("cpu") as record:
            action(*arguments)
        self.bytes[name] = {"lasting": record.lasting, "peak": record.peak}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        self.unit = sum(weight.nbytes for weight in select_layers(pl_module).values())
        self.record("start", super().on_train_start, trainer, pl_module)

    def on_before_optimizer_step(self, *arguments: Any) -> None:  # noqa: D102
        self.record("copy", super().on_before_optimizer_step, *arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:  # noqa: D102
        self.record("read", super().on_train_batch_end, *arguments)


class Stop(pl.Callback):
    """Ends the fit after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:  # noqa: D102
        trainer.should_stop = trainer.global_step >= self.steps
