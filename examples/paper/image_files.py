"""Readers of the published files; each gives bytes and classes of the training and of the test images."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from errors import InputError
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms.functional import pil_to_tensor

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
T = TypeVar("T")


def read_mnist(folder: Path, download: bool) -> Parts:
    where = f"MNIST's four files in {folder / 'MNIST' / 'raw'}"
    train, test = (
        _read(lambda train=train: MNIST(folder, train=train, download=download), where, folder / "MNIST", download)
        for train in (True, False)
    )
    return train.data[:, None], train.targets, test.data[:, None], test.targets


def read_cifar(dataset: str, folder: Path, download: bool) -> Parts:
    kind = CIFAR10 if dataset == "CIFAR-10" else CIFAR100
    unpacked = folder / kind.base_folder
    train, test = (
        _read(
            lambda train=train: kind(folder, train=train, download=download),
            f"{dataset}'s python version in {unpacked}",
            unpacked,
            download,
        )
        for train in (True, False)
    )
    return (
        _channels_first(train.data),
        torch.tensor(train.targets),
        _channels_first(test.data),
        torch.tensor(test.targets),
    )


def read_folders(folder: Path) -> Parts:
    """``train`` and ``test`` with a folder of image files for each class."""
    where = f"`train` and `test` with a folder of images for each class in {folder}"
    train, test = (
        _read(lambda part=part: ImageFolder(folder / part), where, folder, False) for part in ("train", "test")
    )
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(f"{where} must have the same classes, got {different} in one of them only. Unpack them again.")
    return (*_decode(train.samples), *_decode(test.samples))


def read_tiny_imagenet(folder: Path) -> Parts:
    """The 200 classes of 64×64 images. Its test labels are not public: the validation images serve as test set."""
    listed, annotations = folder / "wnids.txt", folder / "val" / "val_annotations.txt"
    if not listed.is_file() or not annotations.is_file():
        raise InputError(
            f"`--data-dir` must hold Tiny ImageNet in a folder tiny-imagenet-200 with wnids.txt and "
            f"val/val_annotations.txt, got {folder}. torchvision cannot download it: get tiny-imagenet-200.zip from "
            "cs231n.stanford.edu and unpack it there."
        )
    names = {name: number for number, name in enumerate(sorted(listed.read_text(encoding="utf-8").split()))}
    train = [(str(f), label) for n, label in names.items() for f in sorted((folder / "train" / n / "images").glob("*"))]
    counts = torch.tensor([label for _, label in train], dtype=torch.int64).bincount(minlength=len(names))
    rows = [line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines()]
    test = [(str(folder / "val" / "images" / row[0]), names[row[1]]) for row in rows]
    short = [name for name, label in names.items() if counts[label] < counts.max()]
    missing = [Path(file).name for file, _ in test if not Path(file).is_file()]
    if short or missing or not train:
        raise InputError(
            f"{folder} must hold the same number of images for each class and all of the validation images, got "
            f"fewer for {short[:3] or list(names)[:3]} and {len(missing)} missing {missing[:3]}. Unpack the zip again."
        )
    return (*_decode(train), *_decode(test))


def _read(read: Callable[[], T], what: str, found: Path, download: bool) -> T:
    try:
        return read()
    except Exception as error:  # what torchvision raises depends on how much of a file is there
        if download:
            mend = "Try again, or put the files there yourself."
        elif found.exists():
            mend = f"Delete {found} and add --download."
        else:
            mend = "Name the folder that holds it, or add --download."
        raise InputError(f"`--data-dir` must hold {what}, complete; reading it failed: {error}. {mend}") from error


def _decode(samples: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    images = []
    for file, _ in samples:
        try:
            images.append(pil_to_tensor(default_loader(file)))
        except OSError as error:
            raise InputError(f"{file} must be an image, got an error: {error}. Unpack the data again.") from error
    return torch.stack(images), torch.tensor([label for _, label in samples])


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
