"""A sweep over learning rates that stops a run as soon as its layers move too straight.

    uv run --no-dev --extra examples examples/sweep.py            # on this machine, in half a minute
    uv run --no-dev --extra examples examples/sweep.py --online   # the same as a W&B sweep (needs an account)

`layer_straightness_stats/median` says how much straighter than a random walk the layers move. Above 1.7 the learning
rate is too low, and that shows long before the end of the training. On this machine Lightning's EarlyStopping ends such
runs; online, W&B's hyperband keeps at each bracket the half of the runs that moves least straight. A low straightness
is no quality mark by itself (rates that are too high have it too): among the runs that were trained to their end, the
validation accuracy decides.

You should see: of six rates from 0.001 to 0.3 the four lowest are stopped after three or four of the 20 epochs. 0.1 and
0.3 go on to the end with a straightness near 1; 0.1 reaches 97 %, 0.3 is unsteady and ends below it.
"""

import argparse
import logging
import warnings
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import WandbLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from pl_layer_rotation import LayerRotationMonitor

RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
AGGREGATE = "layer_straightness_stats/median"
TOO_STRAIGHT = 1.7
READ_EVERY = 5  # steps; an epoch has 21


class Digits(pl.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("val_acc", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def digits() -> tuple[DataLoader, DataLoader]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    dataset = TensorDataset(images, torch.tensor(data.target))
    train, validation = random_split(dataset, [1297, 500], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=500)


def fit(lr: float, max_epochs: int, logger: Any, *callbacks: pl.Callback) -> pl.Trainer:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=logger,
        # First: EarlyStopping then finds the aggregate of the epoch that ends.
        callbacks=[LayerRotationMonitor(every_n_steps=READ_EVERY, report=False), *callbacks],
        log_every_n_steps=READ_EVERY,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(lr), *digits())
    return trainer


def sweep_here(rates: list[float], max_epochs: int) -> None:
    print("learning rate   epochs   straightness   validation accuracy")
    for lr in rates:
        # Ends a run above the threshold; `patience` for anything else is the whole training.
        stop = EarlyStopping(
            AGGREGATE,
            mode="min",
            divergence_threshold=TOO_STRAIGHT,
            patience=max_epochs,
            check_on_train_epoch_end=True,
            verbose=False,
        )
        trainer = fit(lr, max_epochs, False, stop)
        straightness, accuracy = (float(trainer.callback_metrics[key]) for key in (AGGREGATE, "val_acc"))
        ending = "stopped: too straight" if straightness > TOO_STRAIGHT else ""
        print(f"{lr:<15g} {trainer.current_epoch:>6} {straightness:>14.2f} {accuracy:>21.1%}   {ending}".rstrip())


def sweep_online(rates: list[float], max_epochs: int, project: str) -> None:
    configuration = {
        "name": "learning rates by straightness",
        "method": "grid",
        "metric": {"name": AGGREGATE, "goal": "minimize"},
        "parameters": {"lr": {"values": rates}},
        # In values of the metric, of which an epoch logs four: the first bracket ends with the second epoch.
        "early_terminate": {"type": "hyperband", "min_iter": 8, "eta": 2},
    }
    sweep = wandb.sweep(configuration, project=project)
    wandb.agent(sweep, partial(run_of_the_sweep, max_epochs), project=project, count=len(rates))


def run_of_the_sweep(max_epochs: int) -> None:
    with wandb.init() as run:
        fit(run.config["lr"], max_epochs, WandbLogger(experiment=run))


def main() -> None:
    parser = argparse.ArgumentParser(description="A sweep that stops runs whose learning rate is too low.")
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--online", action="store_true", help="as a W&B sweep (needs an account)")
    parser.add_argument("--project", default="layer-rotation-sweep", help="W&B project of the sweep")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a network as small as this one is no faster on more
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    if arguments.online:
        sweep_online(arguments.rates, arguments.max_epochs, arguments.project)
    else:
        sweep_here(arguments.rates, arguments.max_epochs)


if __name__ == "__main__":
    main()
