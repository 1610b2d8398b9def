"""Rotation rates: by hand, at the limits, and against simulated random walks."""

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_layer_rotation import rotation_lr

quick = settings(deadline=None, max_examples=50, derandomize=True)
step_counts = st.integers(1, 10**9)


def reached_distance(steps: int, lr: float, momentum: float, size: int = 8000) -> float:
    """Cosine distance after a walk on the sphere: random gradients, momentum, and a turn by atan(lr) each step."""
    generator = np.random.default_rng(0)
    start = generator.standard_normal(size)
    start /= np.linalg.norm(start)
    weights, buffer = start, np.zeros(size)
    for _ in range(steps):
        buffer = momentum * buffer + generator.standard_normal(size)
        step = buffer - (buffer @ weights) * weights
        weights = weights - lr / np.linalg.norm(step) * step
        weights = weights / np.linalg.norm(weights)
    return float(1 - weights @ start)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"steps": 1}, 1 / 9),
        ({"steps": 1000}, 1 / 9),
        ({"steps": 8000}, 1 / 18),
        ({"steps": 1_000_000}, 1 / 90),
        ({"steps": 1000, "momentum": 0.6}, 1 / 18),
        ({"steps": 8000, "momentum": 0.8}, 1 / 54),
        ({"steps": 2, "distance": 0.75}, math.sqrt(3)),
        ({"steps": 4, "distance": 0.75}, 1.0),
        ({"steps": 4, "momentum": 0.6, "distance": 0.75}, 0.5),
        ({"steps": 1, "distance": 0.5}, math.sqrt(3)),
    ],
    ids=str,
)
def test_rates_by_hand(arguments: dict[str, Any], expected: float) -> None:
    assert rotation_lr(**arguments) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.contract("H7")
@quick
@given(step_counts, step_counts, st.floats(0, 0.99), st.none() | st.floats(1e-6, 0.99))
def test_longer_trainings_never_turn_faster(first: int, second: int, momentum: float, distance: float | None) -> None:
    fewer, more = sorted([first, second])
    slow, fast = rotation_lr(more, momentum, distance=distance), rotation_lr(fewer, momentum, distance=distance)
    assert 0 < slow <= fast < math.inf


@quick
@given(step_counts, st.floats(0, 0.99), st.floats(0, 0.99), st.none() | st.floats(1e-6, 0.99))
def test_more_momentum_never_turns_faster(steps: int, first: float, second: float, distance: float | None) -> None:
    less, more = sorted([first, second])
    assert rotation_lr(steps, more, distance=distance) <= rotation_lr(steps, less, distance=distance)


@quick
@given(step_counts, st.floats(1e-6, 0.99), st.floats(1e-6, 0.99))
def test_a_longer_way_never_turns_slower(steps: int, first: float, second: float) -> None:
    near, far = sorted([first, second])
    assert rotation_lr(steps, distance=near) <= rotation_lr(steps, distance=far)


@quick
@given(step_counts, st.floats(0, 0.99), st.floats(1e-9, 0.99))
def test_the_formula_of_the_random_walk_is_inverted(steps: int, momentum: float, distance: float) -> None:
    square = (1 + momentum) / (1 - momentum) * rotation_lr(steps, momentum, distance=distance) ** 2
    assert -math.expm1(-steps / 2 * math.log1p(square)) == pytest.approx(distance, rel=1e-9, abs=0)


@pytest.mark.contract("H7")
@pytest.mark.parametrize(
    ("steps", "momentum", "distance"),
    [(300, 0.0, 0.95), (1000, 0.0, 0.95), (300, 0.0, 0.3), (1000, 0.9, 0.95), (1000, 0.9, 0.5), (600, 0.5, 0.95)],
    ids=lambda value: str(value),
)
def test_a_simulated_walk_reaches_the_distance(steps: int, momentum: float, distance: float) -> None:
    lr = rotation_lr(steps, momentum, distance=distance)
    assert reached_distance(steps, lr, momentum) == pytest.approx(distance, rel=0, abs=0.03)


@pytest.mark.parametrize("steps", [0, -5, 0.5, math.inf, math.nan])
def test_steps_must_be_finite_and_at_least_one(steps: float) -> None:
    text = f"`steps` must be finite and at least 1, got {steps!r}. Pass the steps of the whole training."
    with pytest.raises(ValueError, match=re.escape(text)):
        rotation_lr(steps)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, math.nan])
def test_momentum_must_be_below_one(momentum: float) -> None:
    text = f"`momentum` must be at least 0 and below 1, got {momentum!r}. Pass SGD's momentum or beta1."
    with pytest.raises(ValueError, match=re.escape(text)):
        rotation_lr(100, momentum)


@pytest.mark.parametrize("distance", [-0.1, 0.0, 1.0, 2.0, math.nan])
def test_distance_must_be_between_zero_and_one(distance: float) -> None:
    text = (
        f"`distance` must be between 0 and 1 (not included), got {distance!r}. "
        "A random walk ends at right angles, at 1."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        rotation_lr(100, distance=distance)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("600",), "steps"), ((True,), "steps"), ((600, (0.9, 0.999)), "momentum"), ((600, None), "momentum")],
)
def test_what_is_no_number_is_named(arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        rotation_lr(*arguments)
