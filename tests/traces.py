"""What a training of `nets.Net` leaves: its weights, saved on the way and made into curves by hand, and its CSV log."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from contract.monitored import distance
from torch import nn

LAYERS = {"body.0": "body.0.weight", "head": "head.weight"}


class SavedWeights(pl.Callback):
    """The layers' weights before training and after every batch, in float64."""

    def __init__(self) -> None:
        self.snapshots: list[dict[str, np.ndarray]] = []

    def _save(self, module: nn.Module) -> None:
        weights = module.state_dict()
        self.snapshots.append({name: weights[key].double().flatten().numpy() for name, key in LAYERS.items()})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._save(pl_module)


def by_hand(snapshots: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    start, steps = snapshots[0], range(1, len(snapshots))
    return {
        "rotation": np.array([[distance(snapshots[t][n], start[n]) for n in LAYERS] for t in steps]),
        "norm_ratio": np.array(
            [[np.linalg.norm(snapshots[t][n]) / np.linalg.norm(start[n]) for n in LAYERS] for t in steps]
        ),
        "angular_update": np.array(
            [
                [2 * math.asin(math.sqrt(distance(snapshots[t][n], snapshots[t - 1][n]) / 2)) for n in LAYERS]
                for t in steps
            ]
        ),
    }


def read_csv(folder: Path) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open(encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if row.get("layer_rotation_stats/mean")]
