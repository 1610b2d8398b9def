"""The paper's MNIST study: how far the first layer turns decides how an MLP generalizes, at equal training accuracy.

    uv run --no-dev --extra examples examples/mnist.py

A 784-784-10 network with batch normalization learns 1,000 images of each digit for 100 epochs under Layca at four
rotation rates (arXiv 1806.01603). You should see: every rate fits the training set, the first layer ends at a cosine
distance of about 0.90, 0.60, 0.30 and 0.11, and the test accuracy falls with it. Takes about five minutes on two cores.
Downloads MNIST through torchvision unless --data-dir already holds it.
"""

import argparse
import json
import logging
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

from pl_layer_rotation import LayerRotationMonitor, RotationHistory, layca_optimizers
from pl_layer_rotation.report.page import write_page

# Rotation rate -> first-layer cosine distance and test accuracy (percent) that the paper reports.
PAPER = {
    "3^-2": (3**-2, 0.90, 96.75),
    "3^-2.5": (3**-2.5, 0.60, 96.60),
    "3^-3": (3**-3, 0.30, 96.54),
    "3^-4": (3**-4, 0.11, 95.81),
}


class Perceptron(pl.LightningModule):
    def __init__(self, lr: float, drop_epoch: int) -> None:
        super().__init__()
        self.lr, self.drop_epoch = lr, drop_epoch
        self.hidden = nn.Linear(784, 784)
        self.norm = nn.BatchNorm1d(784)
        self.output = nn.Linear(784, 10)
        for layer in (self.hidden, self.output):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.norm(self.hidden(images)).relu())

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.log("train_acc", (logits.argmax(1) == labels).float().mean(), on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, labels)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("test_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        config = layca_optimizers(self, lr=self.lr)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(config["optimizer"], [self.drop_epoch], gamma=0.2)
        return {**config, "lr_scheduler": scheduler}


def load(data_dir: Path, train: bool, per_class: int | None = None) -> TensorDataset:
    """Images as rows of numbers in [0, 1]; of the training set, the first ``per_class`` of each digit."""
    dataset = MNIST(data_dir, train=train, download=True)
    images, labels = dataset.data.flatten(1).float() / 255, dataset.targets
    if per_class is not None:
        chosen = torch.cat([(labels == digit).nonzero().flatten()[:per_class] for digit in range(10)])
        images, labels = images[chosen], labels[chosen]
    return TensorDataset(images, labels)


def fit(name: str, arguments: argparse.Namespace) -> RotationHistory:
    pl.seed_everything(arguments.seed, verbose=False)
    train = DataLoader(load(arguments.data_dir, True, 1000), batch_size=2048, shuffle=True)
    test = DataLoader(load(arguments.data_dir, False), batch_size=10_000)
    monitor = LayerRotationMonitor(every_n_steps=5, report=False)
    trainer = pl.Trainer(
        max_epochs=arguments.max_epochs,
        accelerator=arguments.accelerator,
        devices=1,
        callbacks=[monitor],
        logger=False,
        log_every_n_steps=5,
        check_val_every_n_epoch=arguments.max_epochs,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Perceptron(PAPER[name][0], round(0.9 * arguments.max_epochs)), train, test)
    return monitor.history


def main() -> None:
    parser = argparse.ArgumentParser(description="The MNIST study of arXiv 1806.01603.")
    parser.add_argument("--max-epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that holds or gets MNIST")
    parser.add_argument("--output", type=Path, default=Path("mnist"), help="folder for the page and the results")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    histories, rows = {}, []
    for name, (lr, distance, accuracy) in PAPER.items():
        print(f"\nLayca, lr {name}")
        history = fit(name, arguments)
        histories[f"Layca, lr {name}"] = history
        metrics = history.facts["metrics"]
        rows.append(
            {
                "lr": name,
                "rate": lr,
                "first_layer_distance": round(history.final()["hidden"], 4),
                "output_layer_distance": round(history.final()["output"], 4),
                "train_accuracy": round(100 * metrics["train_acc"], 2),
                "test_accuracy": round(100 * metrics["test_acc"], 2),
                "paper_first_layer_distance": distance,
                "paper_test_accuracy": accuracy,
            }
        )
    print("\nlr       first layer (paper)   test accuracy (paper)   training accuracy")
    for row in rows:
        print(
            f"{row['lr']:8} {row['first_layer_distance']:11.3f} ({row['paper_first_layer_distance']:.2f})"
            f" {row['test_accuracy']:15.2f} ({row['paper_test_accuracy']:.2f}) {row['train_accuracy']:19.2f}"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "examples/mnist.py "
        + " ".join(
            f"--{k.replace('_', '-')} {v}" for k, v in vars(arguments).items() if k not in ("data_dir", "output")
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": pl.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        if arguments.accelerator == "cpu"
        else torch.cuda.get_device_name(),
        "runs": rows,
    }
    (arguments.output / "mnist.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_page(arguments.output / "layer_rotation.html", histories)
    print(f"\nThe page: {(arguments.output / 'layer_rotation.html').resolve()}")


if __name__ == "__main__":
    sys.exit(main())
