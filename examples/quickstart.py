"""See layer rotation in two minutes: one small network, real data, three optimizers.

    uv run --no-dev --extra examples examples/quickstart.py

Trains a convolutional network on scikit-learn's digits (1,797 real scans that ship with the package) with SGD at a much
too small learning rate, with AdamW, and with Layca. You should see: under SGD the layers hardly leave their
initialization and the accuracy is poor; under AdamW and Layca they turn far and it is high, and Layca turns every
layer further. The page puts the three side by side. Nothing leaves your machine unless you pass --online.
"""

import argparse
import logging
import os
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.loggers import WandbLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from pl_layer_rotation import LayerRotationMonitor, RotationHistory, layca_optimizers
from pl_layer_rotation.report.page import write_page

RUNS = ("SGD, lr too small", "AdamW", "Layca")


class Digits(pl.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv3, self.norm3 = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.fc1, self.fc2 = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm1(self.conv1(images)).relu()
        features = nn.functional.max_pool2d(self.norm2(self.conv2(features)).relu(), 2)
        features = self.norm3(self.conv3(features)).relu().mean((2, 3))
        return self.fc2(self.fc1(features).relu())

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        correct = (self(images).argmax(1) == labels).float()
        self.log("val_acc", correct.mean(), prog_bar=True)

    def configure_optimizers(self):
        if self.optimizer == "Layca":
            return layca_optimizers(self, lr=3**-3, momentum=0.9, schedule="cosine")
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=3e-3)
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def digits() -> tuple[DataLoader, DataLoader]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    dataset = TensorDataset(images, torch.tensor(data.target))
    train, validation = random_split(dataset, [1297, 500], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=500)


def fit(optimizer: str, arguments: argparse.Namespace) -> RotationHistory:
    pl.seed_everything(1, verbose=False)
    logger = WandbLogger(
        name=optimizer,
        project="layer-rotation-quickstart",
        save_dir=arguments.output,
        mode="online" if arguments.online else "offline",
    )
    monitor = LayerRotationMonitor(every_n_steps=5, log_quantities=["rotation", "angular_update"], report=False)
    trainer = pl.Trainer(
        max_epochs=arguments.max_epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(optimizer), *digits())
    wandb.finish()
    return monitor.history


def print_comparison(histories: dict[str, RotationHistory]) -> None:
    width = max(map(len, RUNS))
    print("\nfinal rotation".ljust(20), *(name.rjust(width) for name in histories))
    for layer in next(iter(histories.values())).layer_names:
        print(layer.ljust(19), *(f"{h.final()[layer]:{width}.2g}" for h in histories.values()))
    accuracies = (f"{history.facts['metrics']['val_acc']:{width}.1%}" for history in histories.values())
    print("validation accuracy".ljust(19), *accuracies)


def main() -> None:
    parser = argparse.ArgumentParser(description="Layer rotation of three optimizers on scikit-learn's digits.")
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--online", action="store_true", help="send the runs to Weights & Biases (needs an account)")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for the page and the runs")
    arguments = parser.parse_args()
    # The three runs' progress is what matters here, not what the libraries say about themselves.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    arguments.output.mkdir(parents=True, exist_ok=True)
    histories = {}
    for optimizer in RUNS:
        print(f"\n{optimizer}")
        histories[optimizer] = fit(optimizer, arguments)
    print_comparison(histories)
    page = arguments.output / "layer_rotation.html"
    write_page(page, histories)
    print(f"\nThe page, to open in any browser: {page.resolve()}")
    if not arguments.online:
        print(f"The W&B runs: {arguments.output.resolve() / 'wandb'}")
        print(f"  upload them with `uv run wandb sync {arguments.output}/wandb/offline-run-*`")
        print(f"  or look at one without an account: `uv run wandb leet {arguments.output}/wandb/latest-run`")


if __name__ == "__main__":
    main()
