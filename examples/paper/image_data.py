"""The images of MNIST, CIFAR-10, CIFAR-100 and Tiny ImageNet, as their publishers pack them, and batches of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from errors import InputError
from image_files import read_cifar, read_folders, read_mnist, read_tiny_imagenet
from plans import Plan
from tasks import Task
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

_SHIFT = 4  # pixels: an eighth of 32


class Images(NamedTuple):
    """Images as bytes (n, channels, height, width) and their classes, and how they were packed."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    source: str


def load_images(dataset: str, data_dir: Path, download: bool = False) -> Images:
    """Read a data set from the folder that holds it, or get it first where torchvision can.

    MNIST is read from its IDX files (``MNIST/raw``), CIFAR from its python pickles (``cifar-10-batches-py``,
    ``cifar-100-python``; CIFAR-10 also from class folders, ``cifar10/train`` and ``cifar10/test``), Tiny ImageNet from
    ``tiny-imagenet-200``, whose validation images serve as test set.

    Args:
        dataset: ``"MNIST"``, ``"CIFAR-10"``, ``"CIFAR-100"`` or ``"Tiny ImageNet"``.
        data_dir: the folder.
        download: whether to get what is missing from the net.

    Raises:
        InputError: If the folder or the data are not there, or not whole.

    """
    if not data_dir.is_dir() and not download:
        raise InputError(
            f"`--data-dir` must be a folder that holds {dataset}, got {data_dir}, which does not exist. "
            "Name the right folder, or add --download."
        )
    if dataset == "MNIST":
        return Images(*read_mnist(data_dir, download), "IDX files")
    if dataset == "Tiny ImageNet":
        return Images(*read_tiny_imagenet(data_dir / "tiny-imagenet-200"), "folder of JPEG files")
    if dataset == "CIFAR-10" and (data_dir / "cifar10").is_dir():
        return Images(*read_folders(data_dir / "cifar10"), "class folders of image files")
    return Images(*read_cifar(dataset, data_dir, download), "python pickles")


class ImageData(pl.LightningDataModule):
    """Batches of a task's images: the plan's number of them, drawn by the seed; scaled, augmented where the task says.

    The order of an epoch depends on seed and epoch alone, so that a resumed training sees what it would have seen.

    Args:
        images: the whole data set.
        task: what is learned.
        plan: how many images, and how many in a batch.
        seed: which images, and in which order.

    """

    def __init__(self, images: Images, task: Task, plan: Plan, seed: int) -> None:
        super().__init__()
        self.images, self.task, self.plan, self.seed = images, task, plan, seed
        self.mean, self.spread = 0.0, 255.0
        if task.standardize:
            self.mean, self.spread = _mean_and_spread(images.train)

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.images.train), generator=generator)
        if self.task.per_class is not None:
            order = _first_of_each_class(order, self.images.train_labels, self.task.per_class)
            order = order[torch.randperm(len(order), generator=generator)]
        held_out, chosen = order.split([self.plan.validation_images, len(order) - self.plan.validation_images])
        self.train = self._subset(chosen[: self.plan.train_images])
        self.validation = self._subset(held_out)
        tested = torch.randperm(len(self.images.test), generator=generator)[: self.plan.test_images]
        self.test = TensorDataset(self.images.test[tested], self.images.test_labels[tested])

    def train_dataloader(self) -> DataLoader[Any]:
        return _loader(self.train, _EpochBatches(len(self.train), self.plan.batch_size, self.seed, self._epoch))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return _loader(self.validation, _Blocks(len(self.validation))) if len(self.validation) else []

    def test_dataloader(self) -> DataLoader[Any]:
        return _loader(self.test, _Blocks(len(self.test)))

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        images = (images.float() - self.mean) / self.spread
        trainer = self.trainer
        if self.task.augment and trainer is not None and trainer.training:
            images = shifted_and_mirrored(images)
        return images, labels

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

    def _subset(self, chosen: Tensor) -> TensorDataset:
        return TensorDataset(self.images.train[chosen], self.images.train_labels[chosen])


def shifted_and_mirrored(images: Tensor) -> Tensor:
    """Each image moved by up to 4 pixels both ways, reflected at the edges, and mirrored with even chance."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (_SHIFT,) * 4, mode="reflect")
    corner = torch.randint(2 * _SHIFT + 1, (2, count, 1), device=images.device)
    rows = corner[0] + torch.arange(height, device=images.device)
    columns = corner[1] + torch.arange(width, device=images.device)
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    number = torch.arange(count, device=images.device)[:, None, None]
    return padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class _EpochBatches(Sampler[list[int]]):
    """Shuffled batches of indices, in an order of its own for each epoch."""

    def __init__(self, count: int, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, epoch

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # Asked with the first batch: a resumed training makes its iterator before it knows its epoch, and calls no
        # hook at the start of that epoch. Augmentation and dropout follow the same seed, so that they go on as well.
        torch.manual_seed(self.seed * 100_000 + self.epoch())
        for block in torch.randperm(self.count).split(self.batch_size):
            yield block.tolist()


class _Blocks(Sampler[list[int]]):
    """Everything in its order."""

    def __init__(self, count: int, size: int = 500) -> None:
        self.blocks = list(torch.arange(count).split(size))

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[list[int]]:
        return (block.tolist() for block in self.blocks)


def _loader(data: TensorDataset, batches: Sampler[list[int]]) -> DataLoader[Any]:
    # Whole batches of indices at once: the images lie in memory, collecting them one by one would cost more.
    return DataLoader(data, sampler=batches, batch_size=None)


def _mean_and_spread(images: Tensor) -> tuple[float, float]:
    """Over all pixels, from how often each of the 256 values occurs: as floats a large data set fills the memory."""
    counts = torch.stack([block.flatten().bincount(minlength=256) for block in images.split(1000)]).sum(0).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts * values).sum() / counts.sum()
    return mean.item(), ((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt().item()


def _first_of_each_class(order: Tensor, labels: Tensor, count: int) -> Tensor:
    shuffled = labels[order]
    return torch.cat([order[shuffled == label][:count] for label in labels.unique()])
