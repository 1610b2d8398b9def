r"""Layer rotation from LightningCLI: the monitor, Layca, its base and its schedule stand in a YAML file.

    uv run --no-dev --extra examples --with "jsonargparse[signatures]" \
        examples/cli.py fit --config examples/cli.yaml

`cli.yaml` names the optimizer by class path and needs no line of code for it; all parameters of the network then share
one group. With `cli_module.yaml` in its place, the network itself returns `layca_optimizers(self, ...)`, which gives
biases and normalizations a rate of their own, and its rate, base and schedule are hyper-parameters. Any value can be
set from the command line too: `--optimizer.lr=0.01`, `--model.init_args.rate=0.01`.

A small network learns scikit-learn's digits (1,797 real scans that ship with the package) in a few seconds. You should
see a table in which the three layers end at rotations of about 0.73, 0.84 and 0.60 with norms as they were, and a
validation accuracy of 98 %. Metrics, configuration and `layer_rotation.html` land in `lightning_logs/`.
"""

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import ArgsType, LightningCLI, OptimizerCallable
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from pl_layer_rotation import layca_optimizers


class Digits(pl.LightningDataModule):
    """Scikit-learn's digits as rows of 64 numbers in [0, 1].

    Args:
        batch_size: images a step.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        data = load_digits()
        dataset = TensorDataset(torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target))
        self.train, self.validation = random_split(dataset, [1297, 500], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=500)


class Net(pl.LightningModule):
    """Three linear layers. Its optimizer comes from the YAML file.

    Args:
        width: units of the hidden layers.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.fc1, self.norm1 = nn.Linear(64, width), nn.LayerNorm(width)
        self.fc2, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width)
        self.fc3 = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm1(self.fc1(images)).relu()
        return self.fc3(self.norm2(self.fc2(features)).relu())

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)


class RotatingNet(Net):
    """The same network with Layca built in: layers rotate, everything else takes plain steps of the base.

    Args:
        rate: tangent of the angle by which each layer turns in a step.
        base: optimizer that gives the direction.
        schedule: of the rate.
        plain_lr: learning rate of biases and normalizations; null takes one that suits the base.
        width: units of the hidden layers.
    """

    def __init__(
        self,
        rate: float = 3**-3,
        base: OptimizerCallable = torch.optim.SGD,
        schedule: Literal["constant", "cosine"] = "cosine",
        plain_lr: float | None = None,
        width: int = 128,
    ) -> None:
        super().__init__(width)
        self.rate, self.base, self.schedule, self.plain_lr = rate, base, schedule, plain_lr

    def configure_optimizers(self) -> Any:
        return layca_optimizers(self, lr=self.rate, base=self.base, plain_lr=self.plain_lr, schedule=self.schedule)


def main(args: ArgsType = None) -> LightningCLI:
    # By subclass: the YAML file says which of the two networks.
    return LightningCLI(Net, Digits, subclass_mode_model=True, args=args)


if __name__ == "__main__":
    main()
