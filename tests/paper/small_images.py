"""A few images of each task, in memory and in the files of their publishers."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_data import Images
from PIL import Image
from tasks import TASKS
from torchvision.datasets import CIFAR10, CIFAR100

CLASSES = {"MNIST": 10, "CIFAR-10": 10, "CIFAR-100": 100, "Tiny ImageNet": 200}
# Pixels a side, as few as the poolings of a network leave something of.
_SIDES = {"C10-CNN1": 8, "C100-resnet": 8, "tiny-CNN": 16, "C100-WRN": 8, "C10-resnet110": 8, "MNIST": 28}


def random_images(task: str, train: int = 24, test: int = 8) -> Images:
    """Noise of a task's kind; the networks that average over the image get smaller ones than the paper's."""
    side, generator = _SIDES.get(task, 32), torch.Generator().manual_seed(0)
    channels, classes = 1 if task == "MNIST" else 3, CLASSES[TASKS[task].dataset]

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
        return pixels, torch.arange(count) % classes

    return Images(*draw(train), *draw(test), "noise")


def pixels(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_mnist(folder: Path) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for number, (part, count) in enumerate({"train": 30, "t10k": 10}.items()):
        images = pixels(number, count, 28, 28)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(_idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(_idx(labels))


def write_cifar(folder: Path, kind: type[CIFAR10], monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of training and one of test images, whose checksums torchvision is told."""
    base = folder / kind.base_folder
    base.mkdir(parents=True)
    label = "fine_labels" if kind is CIFAR100 else "labels"
    names = {"train": "train", "test": "test"} if kind is CIFAR100 else {"train": "data_batch_1", "test": "test_batch"}
    for number, (part, name) in enumerate(names.items()):
        content = {"data": pixels(number, 20, 3 * 32 * 32), label: [n % 10 for n in range(20)]}
        monkeypatch.setattr(kind, f"{part}_list", [[name, _write(base / name, pickle.dumps(content))]])
    meta = {
        **kind.meta,
        "md5": _write(base / kind.meta["filename"], pickle.dumps({kind.meta["key"]: list("abcdefghij")})),
    }
    monkeypatch.setattr(kind, "meta", meta)


def write_folders(folder: Path) -> None:
    for part, count in {"train": 3, "test": 2}.items():
        for label in range(10):
            place = folder / "cifar10" / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels(10 * label + number, 32, 32, 3)).save(place / f"{number}.png")


def write_tiny_imagenet(folder: Path) -> None:
    """Two classes of two images, one of them grey as some of the real ones, and three validation images."""
    base = folder / "tiny-imagenet-200"
    (base / "val" / "images").mkdir(parents=True)
    (base / "wnids.txt").write_text("n02\nn01\n", encoding="utf-8")
    for label in ("n01", "n02"):
        (base / "train" / label / "images").mkdir(parents=True)
        for number in range(2):
            shape = (64, 64) if (label, number) == ("n02", 1) else (64, 64, 3)
            Image.fromarray(pixels(number, *shape)).save(base / "train" / label / "images" / f"{label}_{number}.JPEG")
    rows = []
    for number, label in enumerate(("n02", "n01", "n02")):
        Image.fromarray(pixels(number, 64, 64, 3)).save(base / "val" / "images" / f"val_{number}.JPEG")
        rows.append(f"val_{number}.JPEG\t{label}\t0\t0\t9\t9\n")
    (base / "val" / "val_annotations.txt").write_text("".join(rows), encoding="utf-8")


def _idx(values: np.ndarray[Any, Any]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def _write(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return hashlib.md5(content).hexdigest()
