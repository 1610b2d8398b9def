"""Find the learning rate from a few short probes: where the path of the weights is least straight.

    uv run --no-dev --extra examples examples/tune.py

``tune`` takes two functions, one that makes your module for a rate and one that makes your Trainer. It trains the first
tenth of a run at about nine rates around the one that you start from, reads how straight the layers moved, and trains
in full where the path was least straight and at a tenth of that rate; the run that validates better is yours. You
should see, on the network of the quickstart and from a rate a thousand times too low: straightness that falls and
rises again, and a rate near its lowest point that validates as well as the best of a ladder (``--ladder`` trains that
too). How it was tested, and where it fails: ``docs/tuning.md``.
"""

import argparse
import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from quickstart import Digits, digits
from torch import Tensor, nn

from pl_layer_rotation import LayerRotationMonitor

NEXT = 10 ** (1 / 3)  # factor between the finest rates that are told apart
STILL = 1e-8  # rotation of a layer that hardly moved: its straightness is noise


@dataclass
class Tuned:
    """What :func:`tune` found.

    Attributes:
        lr: the rate to use.
        straightness: by rate, of the probes.
        scores: by rate, of the whole runs.
        module: the module that was trained at ``lr``.

    """

    lr: float
    straightness: dict[float, float]
    scores: dict[float, float] = field(default_factory=dict)
    module: pl.LightningModule | None = None


def tune(
    make_module: Callable[[float], pl.LightningModule],
    make_trainer: Callable[[list[pl.Callback]], pl.Trainer],
    *fit_arguments: Any,
    lr: float = 1e-3,
    monitor: str = "val_loss",
    mode: str = "min",
    share: float = 0.1,
    seed: int = 0,
    **fit_options: Any,
) -> Tuned:
    """Probe, train twice, keep the better run: the steps of about three runs.

    Args:
        make_module: the module for a learning rate.
        make_trainer: the Trainer of a whole run, with these callbacks besides its own. Probes are stopped by one of
            them, so that schedules stay those of the whole run.
        *fit_arguments: what ``Trainer.fit`` gets after the module: loaders or a data module.
        lr: the rate in the middle of the first probes, which span two decades to either side.
        monitor: metric of ``callback_metrics`` by which whole runs are compared.
        mode: ``"min"`` or ``"max"``.
        share: part of a run that a probe trains.
        seed: of every probe and run.
        **fit_options: named arguments of ``Trainer.fit``.

    """

    def fit(rate: float, *callbacks: pl.Callback) -> tuple[pl.Trainer, pl.LightningModule]:
        pl.seed_everything(seed, verbose=False)
        module, trainer = make_module(rate), make_trainer(list(callbacks))
        trainer.fit(module, *fit_arguments, **fit_options)
        return trainer, module

    def probe(place: int) -> float:
        if place not in seen:
            watch = LayerRotationMonitor(report=False)
            fit(lr * NEXT**place, watch, StopAfter(share))
            seen[place] = straightness(watch)
        return seen[place]

    def lowest() -> int:
        return min(seen, key=lambda place: (seen[place], place))

    seen: dict[int, float] = {}
    for place in range(-6, 7, 2):
        probe(place)
    while (bottom := lowest()) in (min(seen), max(seen)) and len(seen) < 20:
        probe(bottom - 2 if bottom == min(seen) else bottom + 2)
    probe(bottom + 1 if probe(bottom + 2) < probe(bottom - 2) else bottom - 1)
    valley = lr * NEXT ** lowest()
    tuned = Tuned(valley, {lr * NEXT**place: seen[place] for place in sorted(seen)})
    for rate in (valley, valley / 10):
        trainer, module = fit(rate)
        score = float(trainer.callback_metrics[monitor])
        best = (min if mode == "min" else max)([*tuned.scores.values(), score])
        tuned.scores[rate] = score
        if score == best:
            tuned.lr, tuned.module = rate, module
    return tuned


class StopAfter(pl.Callback):
    """Ends a training after a share of its steps; schedules go on as if it went to the end."""

    def __init__(self, share: float) -> None:
        self.share = share

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= int(self.share * trainer.estimated_stepping_batches):
            trainer.should_stop = True


def straightness(monitor: LayerRotationMonitor) -> float:
    """Median over the layers that moved; infinite where nothing can be read."""
    rotation, kappa = (monitor.history.final(quantity) for quantity in ("rotation", "straightness"))
    moved = [kappa[name] for name, value in rotation.items() if value >= STILL and math.isfinite(kappa[name])]
    return statistics.median(moved) if moved else math.inf


class Net(Digits):
    """The network of the quickstart with a rate, and the loss that runs are compared by."""

    def __init__(self, lr: float) -> None:
        super().__init__("AdamW")
        self.lr = lr

    def validation_step(self, batch: list[Tensor]) -> None:
        super().validation_step(batch)
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def ladder(make_trainer: Callable[[list[pl.Callback]], pl.Trainer], rates: list[float]) -> dict[float, float]:
    """Validation loss of whole runs at these rates."""
    losses = {}
    for rate in rates:
        pl.seed_everything(0, verbose=False)
        trainer = make_trainer([])
        trainer.fit(Net(rate), *digits())
        losses[rate] = float(trainer.callback_metrics["val_loss"])
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="The learning rate of the quickstart's network by straightness.")
    parser.add_argument("--lr", type=float, default=1e-5, help="where to start")
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--ladder", action="store_true", help="also train whole runs at all rates, to compare")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|logging interval).*")

    def make_trainer(callbacks: list[pl.Callback]) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=arguments.max_epochs,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    tuned = tune(Net, make_trainer, *digits(), lr=arguments.lr)
    print("learning rate  straightness of a probe")
    for rate, kappa in tuned.straightness.items():
        print(f"{rate:13.3g}  {kappa:.2f}{'  <- lowest' if kappa == min(tuned.straightness.values()) else ''}")
    for rate, loss in tuned.scores.items():
        print(f"whole run at {rate:.3g}: validation loss {loss:.4f}")
    print(f"learning rate: {tuned.lr:.3g}")
    losses: dict[float, float] = {}
    if arguments.ladder:
        losses = ladder(make_trainer, [arguments.lr * NEXT**place for place in range(0, 15)])
        for rate, loss in losses.items():
            print(f"ladder, {rate:.3g}: validation loss {loss:.4f}")
        print(f"best of the ladder: {min(losses, key=losses.__getitem__):.3g}")
    if arguments.output:
        options = f"--lr {arguments.lr:g} --max-epochs {arguments.max_epochs}{' --ladder' * arguments.ladder}"
        versions = {"torch": torch.__version__, "pytorch-lightning": pl.__version__}
        tables = {"straightness": tuned.straightness, "scores": tuned.scores, "ladder": losses}
        numbers = {
            "lr": float(f"{tuned.lr:.3g}"),
            **{
                name: {f"{rate:.3g}": rounded(value) for rate, value in table.items()} for name, table in tables.items()
            },
        }
        report = {"command": f"examples/tune.py {options}", "seed": 0, "device": "cpu", "versions": versions, **numbers}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def rounded(value: float) -> float | None:
    """For the file, which knows no infinity."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


if __name__ == "__main__":
    main()
