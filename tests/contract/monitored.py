"""What the contract's tests of the monitor share: trainings, saved weights, and what should have been recorded of them."""

import math
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from nets import Net, batches, trainer
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_layer_rotation import LayerRotationMonitor, RotationHistory

STATISTICS = ("mean", "min", "max")


class Weights(pl.Callback):
    """The layers' weights at the start of training and after each step that Lightning counted, in float64."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, np.ndarray]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        # Batches that only accumulate come before the one that steps, and under the same number.
        self._save(pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped + 1)

    def _save(self, module: nn.Module, step: int) -> None:
        self.at[step] = {
            _clean(name): weight.detach().double().flatten().numpy().copy()
            for name, weight in module.named_parameters()
            if not is_lazy(weight) and weight.dim() > 1
        }


def _clean(name: str) -> str:
    # Pruning by torch moves the weights to `weight_orig`.
    return name.replace("_orig_mod.", "").removesuffix("_orig").removesuffix(".weight")


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine distance, from the difference of the unit vectors: no digit is lost for small angles."""
    first, second = (v.astype(np.longdouble) / np.linalg.norm(v.astype(np.longdouble)) for v in (first, second))
    return float(((first - second) ** 2).sum() / 2)


def by_hand(weights: Weights, names: list[str], steps: list[int]) -> dict[str, np.ndarray]:
    """What a history of these layers and steps should hold, each layer measured from where it was first seen."""
    start: dict[str, np.ndarray] = {}
    for step in sorted(weights.at):
        start = {**weights.at[step], **start}

    def each(function: Any) -> np.ndarray:
        return np.array([[function(step, name) for name in names] for step in steps])

    def turned(step: int, name: str) -> float:
        return 2 * math.asin(math.sqrt(distance(weights.at[step][name], weights.at[step - 1][name]) / 2))

    return {
        "rotation": each(lambda step, name: distance(weights.at[step][name], start[name])),
        "norm_ratio": each(
            lambda step, name: np.linalg.norm(weights.at[step][name]) / np.linalg.norm(start[name]),
        ),
        "angular_update": each(turned),
    }


def assert_true(
    history: RotationHistory, weights: Weights, rtol: float = 1e-6, atol: float = 1e-13, leave_out: str = ""
) -> None:
    """The history holds what a float64 computation from the saved weights gives, reading by reading."""
    assert history.steps
    expected = by_hand(weights, history.layer_names, history.steps)
    if history.values("angular_update")[-1].isnan().all():
        # The last step is read whether or not it is due, and then without an angle of its own.
        expected["angular_update"][-1] = np.nan
    for quantity in set(expected) - {leave_out}:
        ours, theirs = history.values(quantity).numpy(), expected[quantity]
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=quantity)


def fit(
    *callbacks: pl.Callback, module: pl.LightningModule | None = None, data: Any = None, **options: Any
) -> pl.Trainer:
    run = trainer(*callbacks, **options)
    run.fit(Net() if module is None else module, batches() if data is None else data)
    return run


def quiet(**options: Any) -> LayerRotationMonitor:
    """A monitor that reads after every step and leaves no file."""
    return LayerRotationMonitor(**{"every_n_steps": 1, "report": False, **options})


def ours(metrics: Any) -> list[str]:
    return [key for key in metrics if key.startswith("layer_")]


class Memory(Logger):
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to keep."""

    def steps(self, key: str) -> list[int | None]:
        return [step for step, metrics in self.logged if key in metrics]

    def keys(self) -> set[str]:
        return {key for _, metrics in self.logged for key in metrics}


class LogsLoss(Net):
    """Logs its loss as users do."""

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        loss = super().training_step(batch)
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss


class Each(pl.Callback):
    """Calls a function with trainer and module after every batch of training."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.function(trainer, pl_module)


class StopsAt(pl.Callback):
    """Raises before the batch of this number, once."""

    def __init__(self, batch: int, error: BaseException | type[BaseException]) -> None:
        self.batch, self.error, self.done = batch, error, False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and not self.done:
            self.done = True
            raise self.error


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)
