"""Findings on how training went, each on both sides of its threshold: D to H, J and K."""

import math
from typing import Any

import pytest
from histories import NAN
from report.walks import codes, only, steady, stopping, walk, with_sums

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.findings import findings

MOMENTUM = {"momentum": 0.0}


# D


def random_walk(straightness: float, step: float = 0.01, steps: int = 100, **facts: Any) -> RotationHistory:
    """Three layers whose angle from the start is that many times a random walk's."""
    angle = straightness * math.acos(math.exp(-0.5 * steps * step**2))
    return walk(steady(*[step] * 3, steps=steps), [1 - math.cos(angle)] * 3, **{**MOMENTUM, **facts})


@pytest.mark.parametrize(("straightness", "low"), [(0.9, False), (1.69, False), (1.71, True)])
def test_straight_layers(straightness: float, low: bool) -> None:
    assert codes(random_walk(straightness)) == (["D"] if low else [])


def test_what_is_said_of_straight_layers() -> None:
    found = only(random_walk(2.6))
    assert found.sentence == (
        "The layers moved almost straight (2.6 × a random walk of the same steps): "
        "the best learning rate is probably about 18 times higher (2.6 to 62 in 8 of 10 tests)."
    )
    assert found.values == pytest.approx({"straightness": 2.6, "factor": 4.0 * 2.6**1.6})
    assert found.advice == "try ×18"


@pytest.mark.parametrize(("total", "advice"), [(200, "try ×18"), (201, "try ×3")])
def test_in_the_first_half_of_a_run_straightness_has_no_factor(total: int, advice: str) -> None:
    assert only(random_walk(2.6, total_steps=total)).advice == advice


def test_momentum_makes_a_random_walk_longer() -> None:
    assert findings(random_walk(math.sqrt(19), momentum=0.9)) == []
    assert only(random_walk(math.sqrt(19))).values["straightness"] == pytest.approx(math.sqrt(19))


@pytest.mark.parametrize("momentum", [None, "much", 1.0, NAN])
def test_without_a_momentum_straightness_is_left_out(momentum: Any) -> None:
    assert findings(random_walk(2.6, momentum=momentum)) == []


@pytest.mark.parametrize(("steps", "low"), [(29, False), (30, True)])
def test_straightness_needs_thirty_angles(steps: int, low: bool) -> None:
    assert codes(random_walk(2.6, steps=steps)) == (["D"] if low else [])


def test_angles_that_were_read_between_the_readings_count() -> None:
    assert codes(random_walk(2.6, steps=10, angle_readings=30)) == ["D"]


@pytest.mark.parametrize(("total", "low"), [(1001, False), (1000, True)])
def test_straightness_waits_for_a_tenth_of_the_run(total: int, low: bool) -> None:
    assert codes(random_walk(2.6, total_steps=total)) == (["D"] if low else [])


def test_recorded_straightness_is_taken_as_it_is() -> None:
    history = with_sums(random_walk(0.9, momentum=None), straightness=[1.9, 2.0, 9.0])
    assert only(history).values["straightness"] == 2.0


def test_a_still_layer_suppresses_straightness() -> None:
    history = random_walk(2.6)
    assert codes(history) == ["D"]
    state = history.state_dict()
    for row in state["rows"]:
        row["rotation"][1], row["angular_update"][1] = 0.0, 0.0
    assert codes(RotationHistory.from_state_dict(state)) == ["A"]


@pytest.mark.parametrize("multipliers", [False, True])
def test_a_fast_layer_suppresses_straightness_even_where_it_was_asked_for(multipliers: bool) -> None:
    history = with_sums(walk(steady(0.01, 0.05, 0.01), layer_multipliers=multipliers), straightness=[3.0] * 3)
    assert codes(history) == ([] if multipliers else ["C"])


# E, F


@pytest.mark.parametrize(("share", "early"), [(0.39, True), (0.41, False)])
def test_all_layers_stopped_early(share: float, early: bool) -> None:
    assert codes(walk(stopping(share, share, share))) == (["E"] if early else [])


def test_what_is_said_of_a_run_that_stopped_early() -> None:
    found = only(walk(stopping(0.31, 0.31)))
    assert found.sentence == (
        "99 % of the turning happened in the first 31 % of training. If the training loss is not near zero, the "
        "schedule decays too early or the network has died."
    )
    assert found.values == {"share": 0.31}


@pytest.mark.parametrize(("share", "stopped"), [(0.59, True), (0.61, False)])
def test_one_layer_stopped(share: float, stopped: bool) -> None:
    assert codes(walk(stopping(1.0, share, 1.0))) == (["F"] if stopped else [])


def test_what_is_said_of_a_layer_that_stopped() -> None:
    found = only(walk(stopping(1.0, 0.3, 1.0)))
    assert found.sentence == "`fc2` stopped turning at 30 % of training while the others went on."
    assert (found.layers, found.advice) == (("fc2",), "")


def test_of_two_layers_none_is_said_to_have_stopped_alone() -> None:
    assert findings(walk(stopping(0.25, 1.0))) == []


def test_a_run_that_was_stopped_itself_has_not_stopped_early() -> None:
    assert findings(walk(stopping(1.0, 1.0, steps=40), total_steps=1000)) == []


# G, H


def shock(peak: float, usual: float, **facts: Any) -> RotationHistory:
    return walk([[peak] * 3, *steady(*[usual] * 3)], **facts)


@pytest.mark.parametrize(
    ("peak", "usual", "found"),
    [(0.11, 0.03, ["G"]), (0.11, 0.04, []), (0.099, 0.01, []), (0.49, 0.2, []), (0.51, 0.2, ["H"])],
    ids=["shock", "not much larger", "small", "large steps", "diverging"],
)
def test_large_steps(peak: float, usual: float, found: list[str]) -> None:
    assert codes(shock(peak, usual)) == found


def test_what_is_said_of_a_shock() -> None:
    found = only(shock(0.27, 0.0225))
    assert found.sentence == (
        "The largest step (0.27 rad, step 1) was 12 × the usual one: try warm-up or a smaller learning rate."
    )
    assert found.values == pytest.approx({"angle": 0.27, "step": 1, "ratio": 12})


def test_what_is_said_of_diverging_layers() -> None:
    found = findings(walk([*steady(0.3, 0.3, steps=51), [1.7, 0.6], *steady(0.3, 0.3)]))[0]
    assert (
        found.sentence == "`fc1` turned 1.7 rad in one step (step 52): training is diverging; lower the learning rate."
    )
    assert found.layers == ("fc1", "fc2")


def test_a_shock_needs_every_step_of_the_start() -> None:
    rows = [[0.27], *steady(0.02)]
    assert codes(walk(rows, every=1)) == ["G"]
    assert codes(walk(rows, every=10)) == []
    assert codes(walk(rows, every=10, dense_steps=40)) == []
    assert codes(walk(rows, every=10, dense_steps=41)) == ["G"]


def test_peaks_between_the_readings_count() -> None:
    sums = {"path": [10.0], "path_square": [1.0], "peak_step": [3.0]}
    history = walk(steady(0.02), every=10, dense_steps=40)
    assert only(with_sums(history, **sums, peak=[0.3])).values == pytest.approx({"angle": 0.3, "step": 3, "ratio": 15})
    assert codes(with_sums(history, **sums, peak=[0.6])) == ["H", "G"]


def test_a_step_that_was_seen_diverging_counts_however_seldom_steps_were_read() -> None:
    assert codes(walk([[0.1], [0.6], [0.1]], every=50)) == ["H"]


# J


@pytest.mark.parametrize(("norm", "grew"), [(4.9, False), (5.1, True)])
def test_grown_weights(norm: float, grew: bool) -> None:
    assert codes(walk(steady(*[0.01] * 3), norms=[1.0, norm, 100.0])) == (["J"] if grew else [])


def test_what_is_said_of_grown_weights() -> None:
    assert only(walk(steady(0.01), norms=[8.0])).sentence == (
        "Weights grew 8.0 × in norm: learning rate too high or initialization too small."
    )


# K

BALANCED = {
    "optimizer": "SGD",
    "learning_rate": 0.1,
    "momentum": 0.0,
    "weight_decay": 0.01,
    "constant_learning_rate": True,
    "followed_by_norm": ["fc1", "fc2", "fc3"],
}
PREDICTED = math.sqrt(2 * 0.1 * 0.01)


def balanced(theta: float = PREDICTED, steps: int = 1800, norm: float = 1.0, **facts: Any) -> RotationHistory:
    """Time constant: 500 steps."""
    history = walk(steady(*[theta] * 4, steps=steps), **{**BALANCED, **facts})
    history.append(steps + 1, rotation=[0.9] * 4, norm_ratio=[norm] * 4, angular_update=[theta] * 4)
    return history


@pytest.mark.parametrize("ratio", [0.86, 1.14])
def test_equilibrium(ratio: float) -> None:
    found = only(balanced(ratio * PREDICTED))
    assert found.layers == ("fc1", "fc2", "fc3")
    assert found.sentence == (
        f"`fc1`\N{EN DASH}`fc3` are in rotational equilibrium: {ratio * PREDICTED:.2g} rad per step, predicted 0.045."
    )
    assert found.values == pytest.approx({"angle": ratio * PREDICTED, "predicted": PREDICTED})


@pytest.mark.parametrize(
    ("optimizer", "momentum", "factor"),
    [("SGD", 0.9, 1 / 1.9), ("AdamW", 0.9, 0.1 / 1.9), ("AdamW", 0.0, 1.0)],
)
def test_prediction_with_momentum(optimizer: str, momentum: float, factor: float) -> None:
    history = balanced(PREDICTED * math.sqrt(factor), optimizer=optimizer, momentum=momentum)
    found = next(finding for finding in findings(history) if finding.code == "K")
    assert found.values["predicted"] == pytest.approx(PREDICTED * math.sqrt(factor))


@pytest.mark.parametrize(
    "history",
    [
        balanced(0.84 * PREDICTED),
        balanced(1.16 * PREDICTED),
        balanced(steps=1798),
        balanced(norm=1.11),
        balanced(optimizer="Layca(SGD)"),
        balanced(weight_decay=0.0),
        *(balanced(**{fact: None}) for fact in BALANCED),
    ],
    ids=["slower", "faster", "too short", "norm moves", "Layca", "no decay", *(f"without {fact}" for fact in BALANCED)],
)
def test_where_equilibrium_is_not_claimed(history: RotationHistory) -> None:
    assert "K" not in codes(history)


# all together


def test_straightness_comes_after_what_stopped_and_before_norm_and_equilibrium() -> None:
    state = balanced(momentum=0.0).state_dict()
    for row in state["rows"]:
        row["straightness"], row["norm_ratio"] = [2.0] * 4, [6.0] * 4
    assert codes(RotationHistory.from_state_dict(state)) == ["D", "J", "K"]
