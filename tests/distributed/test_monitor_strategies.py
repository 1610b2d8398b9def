"""The monitor through Lightning's Trainer, strategy by strategy: the curves of one process, also across checkpoints.

What is compared with is no reading of the monitor but a float64 computation from the weights of one process. The table
of what was seen: ``pytest tests/distributed/test_monitor_strategies.py -k table``.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from processes import launch
from test_layca_strategies import FOLDERS, FORMS, HYBRID, STRATEGIES, WORLDS, Net, Route, SaveHalf, describe, train
from test_layca_strategies import pytestmark as STRATEGY_MARKS

from pl_layer_rotation import LayerRotationMonitor

# Largest absolute difference to the float64 computation: the monitor's fp32 products, and float32 trainings whose sums
# come in another order (TP).
SAME = 1e-7
LAYERS = {"body.0": (8, 7), "body.2": (5, 8), "head": (1, 5)}
STEPS, HALF = 6, 3
# A history as `RotationHistory.state_dict` gives it, and the weights to measure from as a checkpoint would carry them.
Seen = tuple[dict[str, Any], dict[str, list[list[float]]]]


class OneGroup(Net):
    """One group: Lightning then loads the optimizer's state of one process also under FSDP."""

    def __init__(self, strategy: str, momentum: bool = True) -> None:
        super().__init__(strategy, optimizer="")
        self.momentum = momentum

    def configure_optimizers(self) -> Any:
        if self.momentum:
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SavedWeights(pl.Callback):
    """The layers' weights before training and after every batch, in float64."""

    def __init__(self) -> None:
        self.snapshots: list[list[np.ndarray]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = pl_module.state_dict()
        self.snapshots.append([weights[f"{name}.weight"].double().flatten().numpy().copy() for name in LAYERS])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.on_train_start(trainer, pl_module)


def fit(
    strategy: str,
    world: int,
    *callbacks: pl.Callback,
    save: dict[bool, str] | None = None,
    resume: str | None = None,
    momentum: bool = True,
) -> Seen:
    """What the monitor saw of a training, or of one that goes on from a checkpoint."""
    monitor = LayerRotationMonitor(every_n_steps=1, report=False)
    train(OneGroup(strategy, momentum), strategy, world, SaveHalf(save or {}), monitor, *callbacks, resume=resume)
    state = monitor.state_dict()
    for fact in ("epochs", "metrics"):
        # How the training ended: the first process notes it, which reports.
        state["history"]["facts"].pop(fact, None)
    return state["history"], {name: weight.tolist() for name, weight in state["reference"].items()}


def file(folder: str, strategy: str, sharded: bool) -> str:
    return f"{folder}/{strategy}, {'sharded' if sharded else 'full'}.ckpt"


def fit_and_resume(rank: int, strategy: str, world: int, folder: str) -> tuple[Seen, dict[bool, Seen]]:
    """What an uninterrupted training saw, and one resumed from each form of its checkpoint."""
    paths = {sharded: file(folder, strategy, sharded) for sharded in FORMS[strategy]}
    straight = fit(strategy, world, save=paths)
    return straight, {sharded: fit(strategy, world, resume=path) for sharded, path in paths.items()}


def only_resume(rank: int, paths: list[str], strategy: str, world: int) -> list[Seen]:
    return [fit(strategy, world, resume=path) for path in paths]


def resume_without_state(rank: int, strategy: str, world: int, path: str) -> None:
    fit(strategy, world, save={False: path}, momentum=False)
    fit(strategy, world, resume=path, momentum=False)


def weights_of_one_process(rank: int) -> list[list[list[float]]]:
    saved = SavedWeights()
    fit("one process", 1, saved)
    return [[weight.tolist() for weight in snapshot] for snapshot in saved.snapshots]


def angle(first: list[float], second: list[float]) -> float:
    one, other = (np.array(weight) / np.linalg.norm(weight) for weight in (first, second))
    return float(2 * np.arcsin(np.linalg.norm(one - other) / 2))


def by_hand(snapshots: list[list[list[float]]]) -> dict[str, np.ndarray]:
    """What the monitor should have recorded, from the definitions; ``(steps, layers)`` each."""
    start, later = snapshots[0], snapshots[1:]

    def each(function: Any, others: Any) -> np.ndarray:
        return np.array(
            [[function(w, o) for w, o in zip(new, old, strict=True)] for new, old in zip(later, others, strict=True)]
        )

    turned = each(angle, [start] * len(later))
    steps = each(angle, snapshots[:-1])
    squares = (steps**2).cumsum(0)
    # The walk's factor for the momentum 0.9 that AdamW's first beta is.
    walk = np.arccos(np.exp(-0.5 * (1 + 0.9) / (1 - 0.9) * squares))
    return {
        "rotation": 2 * np.sin(turned / 2) ** 2,
        "norm_ratio": each(lambda w, o: np.linalg.norm(w) / np.linalg.norm(o), [start] * len(later)),
        "angular_update": steps,
        "path": steps.cumsum(0),
        "path_square": squares,
        "straightness": turned / walk,
        "peak": np.maximum.accumulate(steps),
    }


def curves(history: dict[str, Any], rows: int = STEPS) -> dict[str, np.ndarray]:
    """The first readings by quantity; of every step and layer, or this is an error."""
    assert [row["step"] for row in history["rows"]] == list(range(1, STEPS + 1))
    assert {layer["name"]: tuple(layer["shape"]) for layer in history["layers"]} == LAYERS
    quantities = [quantity for quantity in history["rows"][0] if quantity != "step"]
    return {quantity: np.array([row[quantity] for row in history["rows"][:rows]]) for quantity in quantities}


def difference(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest absolute one in all expected quantities; NaN, which passes no test, where a value is missing."""
    return float(np.max([np.abs(ours[quantity] - values) for quantity, values in expected.items()]))


def largest(differences: Iterable[float]) -> float:
    # Not `max`, which may lose a NaN.
    return float(np.max(list(differences)))


class Runs:
    """Trainings by strategy, each done once, with their checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.of = functools.cache(self._of)
        self.going_on = functools.cache(self._going_on)
        (snapshots,) = launch(weights_of_one_process, world=1, timeout=30)
        self.expected = by_hand(snapshots)
        self.start = {
            name: np.reshape(weight, shape).tolist()
            for (name, shape), weight in zip(LAYERS.items(), snapshots[0], strict=True)
        }

    def _of(self, strategy: str) -> list[tuple[Seen, dict[bool, Seen]]]:
        """By process, of all that is asked of a strategy alone: one launch."""
        world = WORLDS.get(strategy, 2)
        return launch(fit_and_resume, strategy, world, self.folder, world=world, timeout=60)

    def values(self, strategy: str) -> float:
        """Largest difference of any process's history to the float64 computation."""
        return largest(difference(curves(history), self.expected) for (history, _), _ in self.of(strategy))

    def processes(self, strategy: str) -> float:
        """Largest difference of any process's history to the first one's, over all quantities."""
        histories = [curves(history) for (history, _), _ in self.of(strategy)]
        return largest(difference(history, histories[0]) for history in histories)

    def resume(self, strategy: str, sharded: bool) -> float:
        """Largest difference of a resumed training's history to the uninterrupted one's, over all quantities."""
        results = [(resumed[sharded][0], straight[0]) for straight, resumed in self.of(strategy)]
        return largest(difference(curves(resumed), curves(straight)) for resumed, straight in results)

    def _going_on(self, target: str, world: int) -> dict[Route, list[Seen]]:
        """By process, of all trainings that go on under this strategy: one launch."""
        routes = [route for route in ROUTES if route[2:4] == (target, world)]
        return self.launched(routes, target, world)

    def launched(self, routes: list[Route], target: str, world: int) -> dict[Route, list[Seen]]:
        for source, first, _, _, _ in routes:
            assert len(self.of(source)) == first
        paths = [file(self.folder, source, sharded) for source, _, _, _, sharded in routes]
        results = launch(only_resume, paths, target, world, world=world, timeout=60)
        return {route: [result[i] for result in results] for i, route in enumerate(routes)}

    def resharded(self, route: Route) -> float:
        """Largest difference to the float64 computation of a training that goes on under another strategy."""
        return largest(difference(curves(history), self.expected) for history, _ in self.going_on(*route[2:4])[route])


# Strategy and number of processes that save, and that go on; whether the checkpoint is a folder.
ROUTES: list[Route] = [
    ("DDP", 2, "one process", 1, False),
    ("FSDP1 FULL_SHARD", 2, "one process", 1, False),
    ("FSDP1 SHARD_GRAD_OP", 2, "one process", 1, False),
    ("FSDP1 HYBRID_SHARD", 4, "one process", 1, False),
    ("FSDP2", 2, "one process", 1, False),
    ("TP", 2, "one process", 1, False),
    ("FSDP2 × TP", 4, "one process", 1, False),
    ("HSDP", 4, "one process", 1, False),
    ("one process", 1, "DDP", 2, False),
    ("FSDP1 FULL_SHARD by layer", 2, "DDP", 2, False),
    ("FSDP1 NO_SHARD", 2, "DDP", 2, False),
    ("FSDP2", 2, "DDP", 2, False),
    ("DDP", 2, "DDP", 4, False),
    ("one process", 1, "FSDP1 FULL_SHARD", 2, False),
    ("DDP", 2, "FSDP1 FULL_SHARD", 2, False),
    ("FSDP1 FULL_SHARD by layer", 2, "FSDP1 FULL_SHARD", 2, True),
    ("FSDP1 NO_SHARD", 2, "FSDP1 FULL_SHARD", 2, True),
    ("FSDP1 HYBRID_SHARD", 4, "FSDP1 FULL_SHARD", 2, True),
    ("FSDP2", 2, "FSDP1 FULL_SHARD", 2, False),
    ("DDP", 2, "FSDP1 FULL_SHARD by layer", 4, False),
    ("FSDP1 FULL_SHARD by layer", 2, "FSDP1 FULL_SHARD by layer", 4, False),
    ("FSDP1 FULL_SHARD by layer", 2, "FSDP1 FULL_SHARD by layer", 4, True),
    ("FSDP1 HYBRID_SHARD", 4, "FSDP1 FULL_SHARD by layer", 4, False),
    ("DDP", 2, "FSDP1 HYBRID_SHARD", 4, False),
    ("FSDP1 FULL_SHARD", 2, "FSDP1 HYBRID_SHARD", 4, False),
    ("one process", 1, "FSDP2", 2, False),
    ("DDP", 2, "FSDP2", 2, False),
    ("FSDP1 FULL_SHARD", 2, "FSDP2", 2, False),
    ("FSDP2 × TP", 4, "FSDP2", 2, True),
    ("HSDP", 4, "FSDP2", 2, True),
    ("FSDP2", 2, "FSDP2", 4, False),
    ("FSDP2", 2, "FSDP2", 4, True),
    ("one process", 1, "TP", 2, False),
    ("FSDP2", 2, "TP", 4, True),
    ("TP", 2, "TP", 4, True),
    ("DDP", 2, "FSDP2 × TP", 4, False),
    ("FSDP2", 2, "FSDP2 × TP", 4, False),
    ("FSDP2", 2, "FSDP2 × TP", 4, True),
    ("TP", 2, "FSDP2 × TP", 4, True),
    ("DDP", 2, "HSDP", 4, False),
    ("FSDP2", 2, "HSDP", 4, True),
]
NAMES = "the folders of FSDPStrategy and of ModelParallelStrategy name the weights differently"
IMPOSSIBLE: dict[Route, str] = {
    ("FSDP1 FULL_SHARD", 2, "one process", 1, True): FOLDERS,
    ("FSDP2", 2, "DDP", 2, True): FOLDERS,
    ("FSDP1 FULL_SHARD", 2, "FSDP2", 2, True): NAMES,
    ("FSDP2", 2, "FSDP1 FULL_SHARD", 2, True): NAMES,
    ("FSDP1 HYBRID_SHARD", 4, "FSDP1 HYBRID_SHARD", 4, True): HYBRID,
    ("FSDP1 FULL_SHARD by layer", 2, "FSDP1 HYBRID_SHARD", 4, True): HYBRID,
}
# What is seen; where nothing is raised, the training goes another way.
SYMPTOMS = {FOLDERS: "IsADirectoryError", NAMES: "Missing key in checkpoint", HYBRID: None}
STATELESS = "Lightning asks for the first entry of the optimizer's state, and SGD without momentum has none"

# The same strategies warn of the same things, and here too the first test of one trains it.
pytestmark = STRATEGY_MARKS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("strategies"))


@pytest.mark.contract("C1")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_curves_equal_a_float64_computation_from_the_weights_of_one_process(runs: Runs, strategy: str) -> None:
    assert runs.values(strategy) <= SAME


@pytest.mark.contract("C20")
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "one process"])
def test_processes_see_the_same(runs: Runs, strategy: str) -> None:
    assert runs.processes(strategy) == 0
    first, *others = [straight for straight, _ in runs.of(strategy)]
    assert all(other == first for other in others)


RESUMES = [(name, sharded) for name in STRATEGIES for sharded in FORMS[name]]
RESUMES.remove(("FSDP1 HYBRID_SHARD", True))


@pytest.mark.contract("C15")
@pytest.mark.parametrize(("strategy", "sharded"), RESUMES, ids=lambda value: str(value))
def test_a_resumed_history_is_bitwise_the_uninterrupted_one(runs: Runs, strategy: str, sharded: bool) -> None:
    assert runs.resume(strategy, sharded) == 0
    for straight, resumed in runs.of(strategy):
        assert resumed[sharded] == straight


@pytest.mark.contract("C15")
@pytest.mark.parametrize("route", ROUTES, ids=describe)
def test_curves_go_on_under_another_strategy(runs: Runs, route: Route) -> None:
    assert runs.resharded(route) <= SAME


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_carry_the_weights_of_the_start(runs: Runs, strategy: str) -> None:
    """Bitwise and whole, whichever process writes them, also those of a run that was resumed elsewhere."""
    world = WORLDS.get(strategy, 2)
    carried = [seen for straight, resumed in runs.of(strategy) for seen in (straight, *resumed.values())]
    carried += [seen for results in runs.going_on(strategy, world).values() for seen in results]
    assert all(start == runs.start for _, start in carried)


@pytest.mark.parametrize("route", IMPOSSIBLE, ids=describe)
def test_what_lightning_cannot_load(runs: Runs, route: Route) -> None:
    source, _, target, world, _ = route
    symptom = SYMPTOMS[IMPOSSIBLE[route]]
    if symptom is not None:
        with pytest.raises(AssertionError, match=symptom):
            runs.launched([route], target, world)
        return
    # Weights and curves are loaded, and the optimizer goes on with the numbers of other weights.
    (straight, _), *_ = runs.of(source)
    for history, start in runs.launched([route], target, world)[route]:
        assert difference(curves(history, HALF), curves(straight[0], HALF)) == 0
        assert difference(curves(history), runs.expected) > 1e-3
        assert start == runs.start


@pytest.mark.parametrize("strategy", ["FSDP1 FULL_SHARD", "FSDP2", "TP"])
def test_lightning_cannot_load_a_file_of_an_optimizer_without_state(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(AssertionError, match="IndexError: list index out of range"):
        launch(resume_without_state, strategy, 2, str(tmp_path / "half.ckpt"), timeout=30)


def test_table(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def cell(value: float) -> str:
        return "exact" if value == 0 else f"{value:.0e}"

    header = ("float64", "processes", "resume, file", "resume, folder", "elsewhere")
    lines = [f"{'':27}  {header[0]:>8}  {header[1]:>9}  {header[2]:>12}  {header[3]:>14}  {header[4]:>9}"]
    for name, world in ((name, WORLDS.get(name, 2)) for name in STRATEGIES):
        resumed = [
            "no (1)" if (name, world, name, world, sharded) in IMPOSSIBLE else cell(runs.resume(name, sharded))
            for sharded in FORMS[name]
        ]
        elsewhere = largest(runs.resharded(route) for route in ROUTES if route[0] == name)
        seen = f"{cell(runs.values(name)):>8}  {cell(runs.processes(name)):>9}  {resumed[0]:>12}"
        lines.append(f"{name:27}  {seen}  {(*resumed, '')[1]:>14}  {cell(elsewhere):>9}")
    lines += [
        "",
        "float64: difference to a float64 computation from the weights of one process; elsewhere: the largest such",
        "difference of trainings that go on from the strategy's checkpoints under another one",
        f"(1) not possible in Lightning: {HYBRID}",
        "",
        "resharded",
    ]
    lines += [f"{describe(route):70}  {cell(runs.resharded(route)):>8}" for route in ROUTES]
    lines += [f"{describe(route):70}  not possible in Lightning: {reason}" for route, reason in IMPOSSIBLE.items()]
    lines.append(f"{'FSDP1, FSDP2, TP: file of an optimizer without state':70}  not possible in Lightning: {STATELESS}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
