"""Layer rotation in Lightning Fabric, without a Trainer: the metric, the optimizer and the history by hand.

    uv run --no-dev --extra examples examples/fabric.py

A small network on scikit-learn's digits (1,797 real scans that ship with the package) in bfloat16, twenty epochs of
Layca under a cosine. Three lines of the loop are ours: make the optimizer, make the metric, call it. You should see:
the three layers end at a rotation of 0.74, 0.85 and 0.46, with a validation accuracy of 98.0 %.
The page with the curves is fabric.html. The same lines serve a loop without Fabric.
"""

import argparse
from pathlib import Path

import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from pl_layer_rotation import LayerRotation, RotationHistory, layca_optimizers
from pl_layer_rotation.report.page import write_page


def digits() -> tuple[DataLoader, DataLoader]:
    data = load_digits()
    dataset = TensorDataset(torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target))
    train, validation = random_split(dataset, [1297, 500], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=500)


def accuracy(model: nn.Module, batches: DataLoader) -> float:
    with torch.no_grad():
        correct: list[Tensor] = [(model(images).argmax(1) == labels).float().mean() for images, labels in batches]
    return float(torch.stack(correct).mean())


def train(epochs: int, precision: str = "bf16-true") -> tuple[RotationHistory, float]:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.seed_everything(1, verbose=False)
    train_batches, validation_batches = fabric.setup_dataloaders(*digits())
    net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    net.append(nn.Linear(128, 10))
    optimizer = layca_optimizers(net, lr=3**-3, momentum=0.9)["optimizer"]
    model, optimizer = fabric.setup(net, optimizer)
    steps = epochs * len(train_batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rotation = LayerRotation(model)
    history = RotationHistory(rotation.layer_names)
    for _ in range(epochs):
        for images, labels in train_batches:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            schedule.step()
            if schedule.last_epoch % 5 == 0 or schedule.last_epoch == steps:
                history.append(schedule.last_epoch, rotation=list(rotation(model).values()))
    return history, accuracy(model, validation_batches)


def main() -> None:
    parser = argparse.ArgumentParser(description="Layer rotation in Lightning Fabric.")
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("fabric.html"), help="file of the page")
    arguments = parser.parse_args()
    history, validated = train(arguments.max_epochs)
    for layer, value in history.final().items():
        print(f"layer {layer}: final rotation {value:.2f}")
    print(f"validation accuracy: {validated:.1%}")
    write_page(arguments.output, {"Layca in Fabric": history})
    print(f"The page, to open in any browser: {arguments.output.resolve()}")


if __name__ == "__main__":
    main()
