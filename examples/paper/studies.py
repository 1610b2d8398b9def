"""The paper's studies: which settings each of them trains on a task."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tasks import PAPER_TASKS, TASKS, Rival, Schedule, Task

# Layca's rates in the paper: bases that average gradients over steps turn straighter and take a smaller one.
LAYCA_RATE = 3**-3
LAYCA_RATE_AVERAGED = 3**-5


@dataclass(frozen=True)
class Setting:
    """One training: an optimizer with its rate and schedule.

    ``records`` keeps the rotation of every layer in every step, ``replays`` names the setting whose record Layca
    follows instead of ``lr``. ``averaged`` is momentum 0.9 in Adam's form, an average of gradients.
    """

    name: str
    base: str
    lr: float
    schedule: Schedule
    layca: bool = False
    l2: float = 0.0
    alpha: float = 0.0
    averaged: bool = False
    warmup_epochs: int = 0
    records: bool = False
    replays: str | None = None


@dataclass(frozen=True)
class Study:
    """A question, the tasks that it is asked on, and the settings that answer it."""

    title: str
    tasks: tuple[str, ...]
    settings: Callable[[Task], list[Setting]]


def power_of_three(exponent: float) -> str:
    return f"3^{exponent:g}"


def layca(task: Task, name: str, lr: float = LAYCA_RATE, **options: object) -> Setting:
    return Setting(name, "SGD", lr, task.schedule, layca=True, **options)  # type: ignore[arg-type]


def rival(name: str, given: Rival | None, **options: object) -> Setting:
    assert given is not None
    return Setting(name, given.base, given.lr, given.schedule, l2=given.l2, **options)  # type: ignore[arg-type]


def layca_rates(task: Task) -> list[Setting]:
    return [layca(task, power_of_three(e), 3.0**e) for e in range(-7, 1)]


def alphas(task: Task) -> list[Setting]:
    values = (-0.8, -0.6, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    return [layca(task, f"alpha_{value:+g}" if value else "alpha_0", alpha=value) for value in values]


def sgd_rates(task: Task) -> list[Setting]:
    return [Setting(power_of_three(e), "SGD", 3.0**e, task.schedule) for e in range(-4, 1)]


def sgd_with_l2(task: Task) -> list[Setting]:
    return [rival("SGD", task.sgd), rival("SGD+L2", task.sgd_l2)]


def adaptive(task: Task) -> list[Setting]:
    """The adaptive method with its L2 where it has one, and Layca over the same method."""
    without = rival(method_name(task.adaptive), task.adaptive)
    rate = LAYCA_RATE_AVERAGED if without.base == "Adam" else LAYCA_RATE
    return [without, Setting(f"{without.base}+Layca", without.base, rate, task.schedule, layca=True)]


def replay(task: Task) -> list[Setting]:
    """An adaptive method's rotations, and Layca over SGD that makes the same ones; SGD as tuned for comparison."""
    recorded = rival(method_name(task.adaptive), task.adaptive, records=True)
    follower = Setting(
        "Layca_replay",
        "SGD",
        1.0,
        recorded.schedule,
        layca=True,
        averaged=recorded.base == "Adam",
        replays=recorded.name,
    )
    return [recorded, follower, rival("SGD+L2", task.sgd_l2) if recorded.l2 else rival("SGD", task.sgd)]


def warmup(task: Task) -> list[Setting]:
    with_l2 = [rival(f"SGD+L2_warmup_{epochs}", task.sgd_l2, warmup_epochs=epochs) for epochs in (0, 5, 10, 15)]
    return [*with_l2, layca(task, "Layca")]


def mnist(task: Task) -> list[Setting]:
    """Each rate falls when the paper's did: late, so that the loss leaves its plateau, or never."""
    drops = {-2: (90,), -2.5: (95,), -3: (95,), -4: ()}
    return [
        layca(replace(task, schedule=replace(task.schedule, drops=when)), power_of_three(e), 3.0**e)
        for e, when in drops.items()
    ]


def method_name(given: Rival | None) -> str:
    assert given is not None
    return f"{given.base}+L2" if given.l2 else given.base


STUDIES = {
    "layca-rates": Study("Layca at rates from 3^-7 to 1", PAPER_TASKS, layca_rates),
    "alphas": Study("Layca 3^-3 with early (alpha > 0) or late (alpha < 0) layers slower", PAPER_TASKS, alphas),
    "sgd-rates": Study("SGD without regularization at rates from 3^-4 to 1", PAPER_TASKS, sgd_rates),
    "sgd-l2": Study("SGD at its best rate, without and with L2", PAPER_TASKS, sgd_with_l2),
    "adaptive": Study("adaptive methods without and with Layca", PAPER_TASKS, adaptive),
    "replay": Study("an adaptive method's rotations of every step, repeated by Layca over SGD", PAPER_TASKS, replay),
    "warmup": Study("a high rate on ResNet-110 after 0 to 15 epochs of warm-up", ("C10-resnet110",), warmup),
    "mnist": Study("first-layer features of an MLP by rotation rate", ("MNIST",), mnist),
    "example": Study(
        "the authors' example with six convolutions", ("C10-example",), lambda task: [layca(task, "3^-3")]
    ),
}


def settings_of(study: str, task: str) -> list[Setting]:
    return STUDIES[study].settings(TASKS[task])
