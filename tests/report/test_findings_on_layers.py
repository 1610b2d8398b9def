"""Findings on single layers and their depth, each on both sides of its threshold: A, non-finite, B, C, I."""

import math
from typing import Any

import pytest
import torch
from histories import NAN
from report.walks import codes, only, steady, walk

from pl_layer_rotation import RotationHistory, layer_rotation
from pl_layer_rotation.report.findings import HARDLY, findings

# A


@pytest.mark.parametrize(("rotation", "still"), [(0.0, True), (0.99e-8, True), (1e-8, False)])
def test_a_layer_is_still_below_its_threshold(rotation: float, still: bool) -> None:
    history = walk(steady(0.01, 0.0, 0.01), [0.1, rotation, 0.1])
    assert codes(history) == (["A"] if still else [])


def test_an_unchanged_layer() -> None:
    found = only(walk(steady(0.01, 0.0, 0.01), [0.1, 0.0, 0.1], [1.1, 1 + 1e-7, 1.1]))
    assert found.layers == ("fc2",)
    assert found.sentence == (
        "`fc2` did not turn at all: its weights never changed. Frozen, missing from the optimizer, or without gradient."
    )
    assert found.advice == ""


def test_a_layer_of_which_only_the_norm_moved() -> None:
    found = only(walk(steady(0.01, 0.0, 0.01), [0.1, 0.0, 0.1], [1.1, 0.9, 1.1]))
    assert found.sentence == (
        "`fc2` did not turn at all, only its norm moved (×0.90): weight decay acts but no gradient arrives; "
        "look for dead units."
    )
    assert found.advice == "look for dead units"
    assert found.values == {"rotation": 0.0, "norm_ratio": 0.9}


@pytest.mark.parametrize(("norm", "changed"), [(1 + 0.9e-6, False), (1 + 1.1e-6, True), (1 - 1.1e-6, True)])
def test_when_a_norm_has_moved(norm: float, changed: bool) -> None:
    assert ("norm moved" in only(walk(steady(0.0), [0.0], [norm])).sentence) == changed


def test_layers_that_steps_turned_too_little_to_read() -> None:
    found = only(walk(steady(2e-6, 4e-6), [1e-10, 1e-9], [1 + 2e-6, 1.0]))
    assert found.sentence == (
        "`fc1` and `fc2` hardly turned (8.0e-05 to 0.00016 rad in all), too little to read: "
        "try a learning rate 100 times higher."
    )
    assert (found.code, found.advice) == ("D", "try ×100")
    assert found.values == pytest.approx({"path": 8e-5 - 2e-6, "factor": 100.0}, rel=0.03)


def test_a_layer_that_hardly_turned_beside_others() -> None:
    found = only(walk(steady(0.01, 2e-6, 0.01), [0.1, 1e-10, 0.1], [1.1, 1 + 2e-6, 1.1]))
    assert found.sentence == "`fc2` hardly turned (8.0e-05 rad in all), too little to read: check its param group."
    assert (found.code, found.layers) == ("A", ("fc2",))


@pytest.mark.parametrize("shrinks", [0.97, 1 - 1e-4, 1 - 1e-6])
def test_rounding_turns_no_layer(shrinks: float) -> None:
    weights = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    angle = 2 * math.asin(math.sqrt(float(layer_rotation(weights * shrinks, weights)) / 2))
    assert 2e-8 < angle < 3e-8 < HARDLY
    assert "only its norm moved" in only(walk(steady(angle), [1e-12], [0.9])).sentence


def test_several_still_layers_share_a_sentence() -> None:
    unchanged, scaled = findings(walk(steady(*[0.0] * 4), [0.0] * 4, [1.0, 1.0, 0.8, 0.9]))
    assert unchanged.sentence.startswith("`fc1` and `fc2` did not turn at all: their weights never changed.")
    assert scaled.sentence.startswith("`fc3` and `fc4` did not turn at all, only their norm moved (×0.80 to ×0.90):")


def test_a_layer_that_stays_at_zero() -> None:
    found = only(walk(steady(0.01, NAN), [0.1, NAN], [1.0, NAN], names=["fc", "out"]))
    assert found.sentence == (
        "`out` starts at zero, so it has no direction to measure from. Usual for an output layer."
    )


def test_a_layer_that_left_zero_is_compared_with_nobody() -> None:
    history = walk(
        [[0.01, 0.01, 0.01, NAN], [0.01, 0.01, 0.01, 0.9], *steady(0.01, 0.01, 0.01, 0.5)],
        names=["a", "b", "c", "out"],
        reference_steps={"out": 1},
    )
    assert only(history).sentence == (
        "`out` starts at zero, so it has no direction to measure from before step 1. Usual for an output layer."
    )


def test_a_layer_that_came_late_is_compared_with_nobody() -> None:
    rows = [[0.01, 0.01, 0.01, NAN]] * 30 + [[0.01, 0.01, 0.01, 1e-5]] * 10
    assert findings(walk(rows, reference_steps={"fc4": 30})) == []


def test_a_run_that_is_measured_from_where_it_resumed_is_judged_as_a_whole() -> None:
    history = RotationHistory(["a", "b", "c"], facts={"reference_steps": dict.fromkeys("abc", 1000)})
    for step in range(1001, 1041):
        history.append(step, rotation=[0.1] * 3, norm_ratio=[1.0] * 3, angular_update=[0.01, 0.01, 0.001])
    assert only(history).values["path"] == pytest.approx(0.04)


# not finite


def test_weights_that_are_not_finite_any_more() -> None:
    history = walk(steady(0.01, 0.01))
    history.append(41, rotation=[NAN, NAN], norm_ratio=[NAN, NAN])
    found = only(history)
    assert (found.code, found.layers) == ("non-finite", ("fc1", "fc2"))
    assert found.sentence == (
        "`fc1` and `fc2` had no finite weights after step 40: training has diverged; lower the learning rate."
    )


def test_weights_that_never_were_finite() -> None:
    found = only(walk(steady(NAN, NAN), [NAN, NAN], [NAN, NAN]))
    assert found.sentence == (
        "`fc1` and `fc2` had no finite weights at any reading: training has diverged; lower the learning rate."
    )


def test_a_layer_that_vanishes_while_others_go_on_has_not_diverged() -> None:
    history = walk(steady(0.01, 0.01))
    history.append(41, rotation=[0.1, NAN], norm_ratio=[1.0, NAN])
    assert findings(history) == []


def test_weights_that_went_to_zero_are_finite() -> None:
    history = walk(steady(0.01))
    history.append(41, rotation=[NAN], norm_ratio=[0.0])
    assert findings(history) == []


# B, C


@pytest.mark.parametrize(("ratio", "found"), [(0.19, ["B"]), (0.21, []), (3.9, []), (4.1, ["C"])])
def test_a_layer_lags_or_runs_ahead(ratio: float, found: list[str]) -> None:
    assert codes(walk(steady(0.01, 0.01, 0.01 * ratio, 0.01))) == found


def test_what_is_said_of_a_slow_layer() -> None:
    found = only(walk(steady(0.1, 0.006, 0.1)))
    assert found.sentence == (
        "`fc2` turned 0.060 × as much as the typical layer (path 0.24 rad against 4.0). Check its param group."
    )
    assert found.values == pytest.approx({"ratio": 0.06, "path": 0.24, "typical_path": 4.0})
    assert found.advice == "Check its param group"


def test_only_of_a_slow_first_layer_it_is_said_what_that_cost() -> None:
    assert only(walk(steady(0.006, 0.1, 0.1))).sentence.endswith(
        "Check its param group: slow first layers cost accuracy in our tests."
    )


def test_several_slow_layers() -> None:
    found = only(walk(steady(0.1, 0.005, 0.01, 0.1, 0.1)))
    assert found.sentence == (
        "`fc2` and `fc3` turned 0.050 to 0.10 × as much as the typical layer (path 0.20 to 0.40 rad against 4.0). "
        "Check their param groups."
    )


def test_what_is_said_of_a_fast_layer() -> None:
    found = only(walk(steady(0.001, 0.012, 0.001)))
    assert found.sentence == (
        "`fc2` turned 12 × as much as the typical layer. Check its param group or the gradients of the others."
    )
    assert found.layers == ("fc2",)


@pytest.mark.parametrize("layers", [1, 2])
def test_one_or_two_layers_are_not_compared(layers: int) -> None:
    assert findings(walk(steady(0.001, 0.1)[:40] if layers == 2 else steady(0.1))) == []


def test_two_moving_layers_beside_a_still_one_are_not_compared() -> None:
    assert codes(walk(steady(0.001, 0.1, 0.0), [0.1, 0.1, 0.0])) == ["A"]


# I


def angles(*values: float, **facts: Any) -> RotationHistory:
    return walk(steady(*[0.01] * len(values)), [1 - math.cos(value) for value in values], **facts)


@pytest.mark.parametrize(
    ("values", "uneven"),
    [
        ((0.1, 0.2, 0.29), False),
        ((0.1, 0.2, 0.31), True),
        ((0.31, 0.2, 0.1), True),
        ((0.1, 0.5, 0.4, 0.3, 0.2, 0.4), False),
        ((0.1, 0.4), False),
    ],
    ids=["even", "rises", "falls", "no order", "two layers"],
)
def test_rotation_over_depth(values: tuple[float, ...], uneven: bool) -> None:
    assert codes(angles(*values)) == (["I"] if uneven else [])


def test_advice_for_slow_early_layers_only() -> None:
    rises, falls = only(angles(0.12, 0.5, 1.1)), only(angles(1.1, 0.5, 0.12))
    assert rises.sentence == (
        "Rotation rises with depth: first third 0.12 rad, last third 1.1 rad. Try Layca with equal rates."
    )
    assert falls.sentence == "Rotation falls with depth: first third 1.1 rad, last third 0.12 rad."
    assert (rises.advice, falls.advice) == ("Try Layca with equal rates", "")


@pytest.mark.parametrize(("reference", "found"), [("init", ["I"]), ("pretrained.ckpt", [])])
def test_layers_that_are_fine_tuned_are_not_called_uneven(reference: str, found: list[str]) -> None:
    assert codes(angles(0.1, 0.2, 0.31, reference=reference)) == found


def test_layers_with_rates_of_their_own_are_not_called_uneven() -> None:
    history = walk(steady(0.001, 0.01, 0.01, 0.1), [0.001, 0.01, 0.1, 0.5])
    assert codes(history) == ["C", "B", "I"]
    history.facts["layer_multipliers"] = True
    assert codes(history) == []
