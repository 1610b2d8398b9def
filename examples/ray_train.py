"""Layer rotation in Ray Train: two workers on this machine train with Layca, one page and one set of curves come out.

    uv run --no-dev --extra examples --group ray examples/ray_train.py

Ray's own Lightning integration, as its guide has it. The monitor stands before Ray's callback, which reports what is
measured by then: `layer_rotation_stats/mean` becomes a metric of the Ray run, next to the accuracy.
Everything stays on this machine: no dashboard, no usage statistics.

What you should see: two epochs (`--max-epochs 2`) took 99 seconds on two cores, 16 of them of computing, and ended at a
validation accuracy of 0.956, a mean rotation of 0.15 and a median straightness of 0.90. Ray itself says a lot.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before Ray is imported, and for the workers it starts.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Workers are to run in this environment, instead of one that each makes with uv again.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

if find_spec("ray") is None:
    sys.exit(
        "This example needs Ray (large): `uv run --no-dev --extra examples --group ray examples/ray_train.py`, "
        "or `uv pip install 'ray[train]'`."
    )

try:  # as Ray itself does: its strategies belong to this package where it is installed
    import lightning.pytorch as pl
except ModuleNotFoundError:
    import pytorch_lightning as pl

import ray
import torch
from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from pl_layer_rotation import LayerRotationMonitor, layca_optimizers


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
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
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return layca_optimizers(self, lr=3**-3, momentum=0.9, schedule="cosine")


def digits(batch_size: int) -> tuple[DataLoader, DataLoader]:
    data = load_digits()
    dataset = TensorDataset(torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target))
    train, validation = random_split(dataset, [1297, 500], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(validation, batch_size=250)


def train(config: dict[str, Any]) -> None:
    """What each worker runs."""
    pl.seed_everything(config["seed"], verbose=False)
    torch.set_num_threads(1)
    trainer = pl.Trainer(
        max_epochs=config["max_epochs"],
        accelerator="cpu",
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[LayerRotationMonitor(), RayTrainReportCallback()],
        default_root_dir=config["output"],
        logger=False,
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = prepare_trainer(trainer)
    trainer.fit(Net(), *digits(64 // ray.train.get_context().get_world_size()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Layer rotation in Ray Train on scikit-learn's digits.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("ray_train"), help="folder for page, curves, checkpoints")
    arguments = parser.parse_args()
    # Workers start in folders of their own.
    output = arguments.output.resolve()
    # Always a Ray of its own, never a cluster that happens to be there; a worker takes a whole core.
    ray.init(address="local", num_cpus=arguments.workers + 1, include_dashboard=False, log_to_driver=True)
    trainer = TorchTrainer(
        train,
        train_loop_config={"max_epochs": arguments.max_epochs, "seed": arguments.seed, "output": str(output)},
        scaling_config=ScalingConfig(num_workers=arguments.workers),
        run_config=RunConfig(
            name="digits", storage_path=str(output), checkpoint_config=CheckpointConfig(num_to_keep=1)
        ),
    )
    result = trainer.fit()
    ray.shutdown()
    for name in ("val_acc", "layer_rotation_stats/mean", "layer_straightness_stats/median"):
        print(f"{name}: {result.metrics[name]:.3f}")
    print(f"Open in any browser: {output / 'layer_rotation.html'}")


if __name__ == "__main__":
    main()
