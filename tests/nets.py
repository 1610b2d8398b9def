"""Small modules and data that many tests train."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def batches(count: int = 8, size: int = 4, identical: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Regression data; identical batches where an order of batches must not matter (resume, several processes)."""
    generator = torch.Generator().manual_seed(0)
    rows = 1 if identical else count * size
    inputs, targets = torch.randn(rows, 7, generator=generator), torch.randn(rows, 3, generator=generator)
    return DataLoader(TensorDataset(*(t.expand(count * size, -1) for t in (inputs, targets))), batch_size=size)


class Net(pl.LightningModule):
    """Two linear layers with a normalization between them; the optimizer is made by the function that is passed."""

    def __init__(self, make_optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.make_optimizer = make_optimizer or (lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        self.body = nn.Sequential(nn.Linear(7, 6), nn.LayerNorm(6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int = 0) -> None:
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet CPU trainer that writes nothing unless the test asks."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "max_epochs": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})
