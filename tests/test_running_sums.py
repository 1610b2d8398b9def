"""Sums over the angles of single steps, and the straightness that they give."""

import math

import numpy as np
import pytest
import torch

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._running_sums import RunningSums, straightness


def added(readings: dict[int, list[float]]) -> RunningSums:
    sums = RunningSums()
    for step, angles in readings.items():
        sums.add(["a", "b"], torch.tensor(angles), step)
    return sums


def dense(sums: RunningSums, names: list[str]) -> float:
    return float(sums.rows(names)[:, -1].min())


def test_every_angle_stands_for_the_steps_since_the_one_before() -> None:
    values = added({1: [0.1, 0.2], 2: [0.3, 0.1], 6: [0.2, 0.0]}).values(["b", "a"])
    assert values["path"] == pytest.approx([0.3, 0.1 + 0.3 + 4 * 0.2])
    assert values["path_square"] == pytest.approx([0.05, 0.01 + 0.09 + 4 * 0.04])
    assert values["peak"] == pytest.approx([0.2, 0.3])
    assert values["peak_step"] == [1, 2]


def test_readings_are_counted_and_how_far_every_step_was_read() -> None:
    sums = added({1: [0.1, 0.2], 2: [0.3, 0.1], 6: [0.2, 0.0], 7: [0.1, 0.1]})
    assert (sums.readings, dense(sums, ["a", "b"])) == (4, 2)


def test_an_unknown_angle_counts_nothing_and_a_layer_never_read_has_no_sums() -> None:
    values = added({1: [0.1, math.nan]}).values(["a", "b", "c"])
    assert values["path"][:2] == pytest.approx([0.1, 0.0])
    assert all(math.isnan(values[quantity][2]) for quantity in values)


def test_a_step_that_was_read_already_counts_once() -> None:
    sums = added({5: [0.1, 0.2]})
    sums.add(["a", "b"], torch.tensor([1.0, 1.0]), 5)
    assert sums.values(["a"])["path"] == pytest.approx([0.5])


def test_steps_before_the_start_do_not_count() -> None:
    sums = RunningSums(100)
    sums.add(["a"], torch.tensor([0.1]), 101)
    sums.add(["a"], torch.tensor([0.2]), 104)
    assert sums.values(["a"])["path"] == pytest.approx([0.1 + 3 * 0.2])
    assert (sums.readings, dense(sums, ["a"])) == (2, 101)


def test_a_layer_that_is_forgotten_starts_again() -> None:
    sums = added({1: [0.1, 0.2], 2: [0.3, 0.1]})
    sums.forget("a")
    sums.add(["a", "b"], torch.tensor([0.5, 0.5]), 3)
    assert sums.values(["a", "b"])["path"] == pytest.approx([0.5, 0.2 + 0.1 + 0.5])
    sums.forget("c")


def test_sums_go_on_from_their_state() -> None:
    straight = added({1: [0.1, 0.2], 3: [0.3, 0.1], 4: [0.2, 0.1]})
    resumed = RunningSums.from_state_dict(added({1: [0.1, 0.2], 3: [0.3, 0.1]}).state_dict())
    resumed.add(["a", "b"], torch.tensor([0.2, 0.1]), 4)
    assert resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_random_walk_has_straightness_one(momentum: float) -> None:
    """Steps of fixed angle on a sphere; with momentum, directions are averages of past ones."""
    generator = np.random.default_rng(0)
    size, steps, turn = 20_000, 600, 0.004
    start = np.zeros(size)
    start[0] = 1.0
    weights, velocity = start.copy(), np.zeros(size)
    for _ in range(steps):
        velocity = momentum * velocity + generator.normal(size=size)
        across = velocity - (velocity @ weights) * weights
        weights = math.cos(turn) * weights + math.sin(turn) * across / np.linalg.norm(across)
    distance = torch.tensor([1 - weights @ start])
    kappa = geometry.straightness(distance, torch.tensor([steps * turn**2], dtype=torch.float64), momentum)
    assert float(kappa) == pytest.approx(1.0, abs=0.05)


def test_a_straight_path_is_as_much_straighter_as_the_angles_say() -> None:
    steps, turn = 100, 0.005
    expected = steps * turn / math.acos(math.exp(-0.5 * 19 * steps * turn**2))
    assert straightness([1 - math.cos(steps * turn)], [steps * turn**2], 0.9) == pytest.approx([expected], rel=1e-9)


@pytest.mark.parametrize(("rotation", "square"), [(9e-9, 1e-4), (1e-3, 0.0), (math.nan, 1e-4)])
def test_what_hardly_moved_has_no_straightness(rotation: float, square: float) -> None:
    assert math.isnan(straightness([rotation], [square], 0.9)[0])
