"""The tasks of the tuning study: small enough for seconds on one CPU thread, split into those that the rule may see.

Tasks and seeds A fit the rule, tasks and seeds B judge it; see ``tuning_plan.md``. Data come with scikit-learn, with
Python itself (its library's source text), or from ``--data-dir``: MNIST as torchvision keeps it, CIFAR-10 as
``cifar10/cifar10_jpeg.npz`` or as torchvision keeps it, and ``tinyshakespeare.txt``. A task without data is skipped.
"""

import io
import itertools
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn

CONTEXT, HEADS = 32, 4  # of the character GPT
NOISE = 0.2  # share of training labels that are drawn anew
PART = tuple[Tensor, Tensor]  # inputs and targets


class Data(NamedTuple):
    """What trains, what chooses, what is reported."""

    train: PART
    validation: PART
    test: PART


class Task(NamedTuple):
    """A network, its data, and how long it trains."""

    name: str
    group: str  # "A" fits the rule, "B" judges it
    metric: str  # what is reported: "accuracy" or "loss"
    steps: int
    batch: int
    network: Callable[[], nn.Module]
    data: Callable[[Path | None, int], Data]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, or the mean square where targets are no classes."""
        if targets.is_floating_point():
            return nn.functional.mse_loss(outputs[:, 0], targets)
        return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Residual(nn.Module):
    """x + f(x) with two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(4, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


class Block(nn.Module):
    """One layer of the character GPT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Two layers over characters."""

    def __init__(self, width: int, characters: int = 128) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks, self.norm = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, characters: Tensor) -> Tensor:  # noqa: D102
        x = self.token(characters) + self.place.weight
        return self.head(self.norm(self.blocks(x)))


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def conv_net(strides: tuple[int, ...], normalized: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after, stride in zip((3, 16, 32, 32), (16, 32, 32, 64), strides, strict=True):
        layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=not normalized))
        layers += [nn.BatchNorm2d(after), nn.ReLU()] if normalized else [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))


def residual_net(width: int = 16) -> nn.Module:
    stem, blocks = nn.Conv2d(3, width, 3, stride=2, padding=1), (Residual(width) for _ in range(3))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def split(inputs: Tensor, targets: Tensor, sizes: tuple[int, int, int], seed: int) -> Data:
    """Parts of these sizes, drawn with the seed."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    parts = torch.split(order[: sum(sizes)], list(sizes))
    return Data(*((inputs[part], targets[part]) for part in parts))


def digits(folder: Path | None, seed: int, noise: float = 0.0) -> Data:
    pixels, labels = datasets.load_digits(return_X_y=True)
    data = split(torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(labels), (1000, 300, 497), seed)
    if not noise:
        return data
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = data.train
    drawn = torch.randint(10, targets.shape, generator=generator)
    wrong = torch.rand(len(targets), generator=generator) < noise
    return data._replace(train=(inputs, torch.where(wrong, drawn, targets)))


def generated_table(folder: Path | None, seed: int) -> Data:
    rows, labels = datasets.make_classification(
        n_samples=6000, n_features=30, n_informative=12, n_classes=4, n_clusters_per_class=3, random_state=0
    )
    return split(*_standard(rows, labels), (2000, 1000, 3000), seed)


def noisy_table(folder: Path | None, seed: int) -> Data:
    rows, labels = datasets.make_classification(
        n_samples=5000, n_features=20, n_informative=8, n_classes=3, flip_y=0.3, random_state=0
    )
    return split(*_standard(rows, labels), (300, 700, 4000), seed)


def friedman(folder: Path | None, seed: int) -> Data:
    return split(*_standard(*datasets.make_friedman1(5000, noise=1.0, random_state=0)), (1500, 1000, 2500), seed)


def cancer(folder: Path | None, seed: int) -> Data:
    return split(*_standard(*datasets.load_breast_cancer(return_X_y=True)), (269, 100, 200), seed)


def diabetes(folder: Path | None, seed: int) -> Data:
    return split(*_standard(*datasets.load_diabetes(return_X_y=True)), (242, 100, 100), seed)


def mnist(folder: Path | None, seed: int) -> Data:
    from torchvision.datasets import MNIST

    needed = _present(folder, "MNIST")
    images = [MNIST(needed, train=train) for train in (True, False)]
    scaled = [(part.data[:, None].float() / 127.5 - 1, part.targets) for part in images]
    known = split(*scaled[0], (2000, 1000, 0), seed)
    return known._replace(test=split(*scaled[1], (4000, 0, 0), seed).train)


def cifar(folder: Path | None, seed: int) -> Data:
    (images, labels), test = _cifar(folder)
    known = split(images, labels, (3000, 1000, 0), seed)
    return known._replace(test=split(*test, (2000, 0, 0), seed).train)


def python_text(folder: Path | None, seed: int) -> Data:
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "calendar", "difflib", "doctest", "inspect", "mailbox", "pickle", "tarfile", "typing")
    return _text("".join(library.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in names), seed)


def shakespeare(folder: Path | None, seed: int) -> Data:
    return _text((_present(folder, "tinyshakespeare.txt") / "tinyshakespeare.txt").read_text(encoding="utf-8"), seed)


TASKS = {
    task.name: task
    for task in (
        Task("digits", "A", "accuracy", 300, 32, lambda: mlp(64, 64, 64, 10), digits),
        Task("digits, long", "A", "accuracy", 1200, 64, lambda: mlp(64, 128, 64, 10, activation=nn.Tanh), digits),
        Task("generated table", "A", "accuracy", 400, 128, lambda: mlp(30, 64, 64, 4), generated_table),
        Task("small noisy table", "A", "accuracy", 300, 32, lambda: mlp(20, 64, 64, 3), noisy_table),
        Task("Friedman regression", "A", "loss", 500, 32, lambda: mlp(10, 64, 64, 1, activation=nn.Tanh), friedman),
        Task("CIFAR conv, BatchNorm", "A", "accuracy", 200, 64, lambda: conv_net((1, 2, 1, 2), True), cifar),
        Task("GPT, Python source", "A", "loss", 250, 16, lambda: GPT(64), python_text),
        Task(
            "digits, label noise",
            "B",
            "accuracy",
            500,
            64,
            lambda: mlp(64, 128, 128, 10),
            lambda f, s: digits(f, s, NOISE),
        ),
        Task("MNIST", "B", "accuracy", 400, 64, lambda: mlp(784, 64, 64, 10), mnist),
        Task("breast cancer", "B", "accuracy", 300, 32, lambda: mlp(30, 64, 64, 2), cancer),
        Task("diabetes regression", "B", "loss", 300, 32, lambda: mlp(10, 64, 64, 1), diabetes),
        Task("CIFAR conv", "B", "accuracy", 250, 32, lambda: conv_net((2, 1, 2, 1), False), cifar),
        Task("CIFAR residual", "B", "accuracy", 200, 32, residual_net, cifar),
        Task("GPT, Shakespeare, long", "B", "loss", 400, 8, lambda: GPT(48), shakespeare),
    )
}
OPTIMIZERS = ("SGD", "AdamW", "Layca(SGD)", "Layca(AdamW)")
SEEDS = {"A": (0, 1, 2), "B": (10, 11, 12)}


def _standard(rows: Any, targets: Any) -> PART:
    """Columns, and targets that are numbers, with mean 0 and variance 1."""
    scaled = torch.tensor((rows - rows.mean(0)) / rows.std(0), dtype=torch.float32)
    if targets.dtype.kind == "f":
        return scaled, torch.tensor((targets - targets.mean()) / targets.std(), dtype=torch.float32)
    return scaled, torch.tensor(targets, dtype=torch.int64)


def _present(folder: Path | None, name: str) -> Path:
    if folder is None or not (folder / name).exists():
        raise FileNotFoundError(f"no {name} in --data-dir {folder}")
    return folder


@cache
def _cifar(folder: Path | None) -> tuple[PART, PART]:
    """10,000 training and 4,000 test images at 16×16, drawn once, so that seeds split what is in memory."""
    packed = folder / "cifar10" / "cifar10_jpeg.npz" if folder else None
    parts = []
    for name, count in (("train", 10_000), ("test", 4_000)):
        generator = torch.Generator().manual_seed(0)
        if packed is not None and packed.exists():
            with np.load(packed) as file:
                stream, offsets, labels = (file[f"{name}_{key}"] for key in ("jpeg", "offsets", "labels"))
            chosen = torch.randperm(len(labels), generator=generator)[:count].tolist()
            images = np.stack([_decode(stream[offsets[i] : offsets[i + 1]]) for i in chosen])
        else:
            from torchvision.datasets import CIFAR10

            stored = CIFAR10(_present(folder, "cifar-10-batches-py"), train=name == "train")
            chosen = torch.randperm(len(stored), generator=generator)[:count].tolist()
            images, labels = stored.data[chosen], np.array(stored.targets)
        small = nn.functional.avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 63.75 - 2, 2)
        parts.append((small, torch.from_numpy(np.asarray(labels)[chosen].astype(np.int64))))
    return parts[0], parts[1]


def _decode(jpeg: Any) -> Any:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(jpeg.tobytes())))


def _text(text: str, seed: int) -> Data:
    """Windows of characters and their successors; other windows validate and test for each seed."""
    codes = torch.tensor([min(ord(character), 127) for character in text])
    cut = int(0.8 * len(codes))
    windows = codes[:cut].unfold(0, CONTEXT + 1, 1)
    # Held-out windows do not overlap.
    rest = codes[cut:].unfold(0, CONTEXT + 1, CONTEXT + 1)
    held = split(rest[:, :-1], rest[:, 1:], (400, 400, 0), seed)
    return Data((windows[:, :-1], windows[:, 1:]), held.train, held.validation)
