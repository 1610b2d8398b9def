"""Layca over any optimizer: AdamW, Muon and Lion give the direction, Layca sets how far each layer turns.

    uv run --no-dev --extra examples --with pytorch-optimizer examples/any_optimizer.py

One small network on scikit-learn's digits (1,797 real scans that ship with the package) under three bases, one line
each in `configure_optimizers` and one rate for all. You should see: the angle per step is the same for every layer
under every base, 0.0370 rad = atan(3⁻³) in the first step and half of it half-way through the cosine. The bases only
differ in where they take the layers: after 20 epochs the first layer ends at a rotation of 0.81 (AdamW), 0.88 (Muon)
and 0.90 (Lion), with validation accuracies of 97.8, 98.2 and 97.6 %.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from pl_layer_rotation import LayerRotationMonitor, RotationHistory, layca_optimizers


def over_adamw(module: pl.LightningModule) -> Any:
    return layca_optimizers(module, lr=3**-3, schedule="cosine", base=torch.optim.AdamW)


def over_muon(module: pl.LightningModule) -> Any:
    # Muon takes matrices alone: biases and normalizations, which do not rotate anyway, take AdamW's plain steps.
    return layca_optimizers(module, lr=3**-3, schedule="cosine", base=torch.optim.Muon, plain_base="AdamW")


def over_lion(module: pl.LightningModule) -> Any:
    from pytorch_optimizer import Lion

    return layca_optimizers(module, lr=3**-3, schedule="cosine", base=Lion, plain_base="AdamW")


RUNS: dict[str, Callable[[pl.LightningModule], Any]] = {"AdamW": over_adamw, "Muon": over_muon, "Lion": over_lion}


def missing(base: str) -> str | None:
    """What must be installed for a base, or None."""
    if base == "Muon" and not hasattr(torch.optim, "Muon"):
        return f"torch.optim.Muon came with torch 2.9, this is {torch.__version__}: `uv pip install 'torch>=2.9'`"
    if base == "Lion" and find_spec("pytorch_optimizer") is None:
        return "Lion is not part of torch: `uv pip install pytorch-optimizer`"
    return None


class Net(pl.LightningModule):
    def __init__(self, make_optimizer: Callable[[pl.LightningModule], Any]) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.fc1, self.norm1 = nn.Linear(64, 128), nn.LayerNorm(128)
        self.fc2, self.norm2 = nn.Linear(128, 128), nn.LayerNorm(128)
        self.fc3 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm1(self.fc1(images)).relu()
        return self.fc3(self.norm2(self.fc2(features)).relu())

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


def digits() -> tuple[DataLoader, DataLoader]:
    data = load_digits()
    dataset = TensorDataset(torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target))
    train, validation = random_split(dataset, [1297, 500], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=500)


def fit(base: str, max_epochs: int) -> RotationHistory:
    pl.seed_everything(1, verbose=False)
    monitor = LayerRotationMonitor(every_n_steps=1, report=False)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[monitor],
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(RUNS[base]), *digits())
    return monitor.history


def print_table(histories: dict[str, RotationHistory]) -> None:
    layers = next(iter(histories.values())).layer_names
    print("\n                      final rotation    angle per step in rad, least and most turned layer")
    print("base   accuracy  ", *(f"{layer:>5}" for layer in layers), "  first step         half-way")
    for base, history in histories.items():
        rotation = (f"{history.final()[layer]:5.2f}" for layer in layers)
        angles = history.values("angular_update")
        turns = (f"  {row.min():.4f} to {row.max():.4f}" for row in (angles[0], angles[len(angles) // 2]))
        print(f"{base:7}{history.facts['metrics']['val_acc']:8.1%}  ", *rotation, *turns)


def main() -> None:
    parser = argparse.ArgumentParser(description="Layca over AdamW, Muon and Lion on scikit-learn's digits.")
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--bases", nargs="+", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    # The runs' progress is what matters here, not what the libraries say about themselves.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    histories = {}
    for base in arguments.bases:
        if reason := missing(base):
            print(f"\nSkipped: Layca over {base}. {reason}")
            continue
        print(f"\nLayca over {base}")
        histories[base] = fit(base, arguments.max_epochs)
    if not histories:
        sys.exit("None of the bases is there.")
    print_table(histories)


if __name__ == "__main__":
    main()
