"""The paper's tasks: data, network, schedule, and the rates of the optimizers that it compares Layca with."""

from collections.abc import Callable
from dataclasses import dataclass

import networks
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """A rate that is multiplied by ``factor`` when each of ``drops`` epochs is over."""

    epochs: int
    drops: tuple[int, ...] = ()
    factor: float = 0.2


@dataclass(frozen=True)
class Rival:
    """An optimizer without Layca, as the paper tuned it.

    ``l2`` is the paper's: the loss grows by l2 times the sum of squares, so that torch's ``weight_decay`` is twice it.
    """

    base: str
    lr: float
    schedule: Schedule
    l2: float = 0.0


@dataclass(frozen=True)
class Task:
    """What is learned, by which network, for how long.

    ``selects_best`` tests the weights of the best validation epoch, as the paper's code does for two of its tasks.
    """

    dataset: str
    network: Callable[[], nn.Module]
    schedule: Schedule
    sgd: Rival | None = None
    sgd_l2: Rival | None = None
    adaptive: Rival | None = None
    batch_size: int = 128
    per_class: int | None = None
    validation_share: float = 0.1
    augment: bool = False
    standardize: bool = True
    nesterov: bool = False
    selects_best: bool = False
    decays_output: bool = True
    norm_momentum: float = 0.01


_CNN1 = Schedule(100, (80, 90, 97))
_RESNET = Schedule(100, (70, 90, 97), 0.1)
_TINY = Schedule(80, (70,))
_LONG = Schedule(250, (100, 170, 220))
_HALVED = Schedule(250, tuple(range(25, 250, 25)), 0.5)
_WIDE = Schedule(200, (60, 120, 160))

TASKS = {
    "C10-CNN1": Task(
        dataset="CIFAR-10",
        network=lambda: networks.vgg([(6, 32), (6, 64), (6, 128), (6, 256)], 10),
        schedule=_CNN1,
        sgd=Rival("SGD", 3**-1, _CNN1),
        sgd_l2=Rival("SGD", 3**-1, _CNN1, l2=1e-3),
        adaptive=Rival("RMSprop", 3**-6, _CNN1),
    ),
    "C100-resnet": Task(
        dataset="CIFAR-100",
        network=lambda: networks.resnet(32, 100),
        schedule=_RESNET,
        sgd=Rival("SGD", 3**-1, _RESNET),
        sgd_l2=Rival("SGD", 3**-1, _RESNET, l2=1e-3),
        adaptive=Rival("Adam", 3**-5, _RESNET),
        selects_best=True,
        decays_output=False,
    ),
    "tiny-CNN": Task(
        dataset="Tiny ImageNet",
        network=lambda: networks.vgg([(2, 32), (2, 64), (2, 128), (2, 256), (2, 512)], 200),
        schedule=_TINY,
        sgd=Rival("SGD", 3**-1, _TINY),
        sgd_l2=Rival("SGD", 3**-1, Schedule(100, (70, 90, 97)), l2=1e-3),
        adaptive=Rival("Adagrad", 3**-4, _TINY),
        selects_best=True,
        norm_momentum=0.1,
    ),
    "C10-CNN2": Task(
        dataset="CIFAR-10",
        network=lambda: networks.torch_blog_vgg(10),
        schedule=_LONG,
        sgd=Rival("SGD", 3**-1, _LONG),
        sgd_l2=Rival("SGD", 0.5, _HALVED, l2=5e-4),
        adaptive=Rival("RMSprop", 3e-4, _HALVED, l2=5e-4),
        augment=True,
    ),
    "C100-WRN": Task(
        dataset="CIFAR-100",
        network=lambda: networks.wide_resnet(28, 10, 0.3, 100),
        schedule=_LONG,
        sgd=Rival("SGD", 3**-2, _LONG),
        sgd_l2=Rival("SGD", 0.1, _WIDE, l2=5e-4),
        adaptive=Rival("Adam", 3e-4, _WIDE, l2=5e-4),
        augment=True,
        nesterov=True,
    ),
    "C10-resnet110": Task(
        dataset="CIFAR-10",
        network=lambda: networks.resnet(110, 10),
        schedule=_WIDE,
        sgd_l2=Rival("SGD", 3**-1, _WIDE, l2=1e-3),
        augment=True,
        decays_output=False,
    ),
    "MNIST": Task(
        dataset="MNIST",
        network=networks.perceptron,
        schedule=Schedule(100),  # the study says when each rate drops
        batch_size=2048,
        per_class=1000,
        validation_share=0.0,
    ),
    "C10-example": Task(
        dataset="CIFAR-10",
        network=lambda: networks.six_convolutions(10),
        schedule=Schedule(100, (70, 90)),
        batch_size=32,
        validation_share=0.0,
        standardize=False,
    ),
}
PAPER_TASKS = tuple(list(TASKS)[:5])
