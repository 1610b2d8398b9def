"""Each rule on both sides of its threshold, on curves that were made up for it."""

import math
from typing import Any

import pytest

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.findings import NOTHING, Finding, finding_lines, findings

NAN = math.nan
EVIL = "</b>\x1b[31m\nlayer" + "x" * 200
MOMENTUM = {"momentum": 0.0}


def walk(
    thetas: list[list[float]],
    rotation: list[float] | None = None,
    norms: list[float] | None = None,
    every: int = 1,
    names: list[str] | None = None,
    **facts: Any,
) -> RotationHistory:
    """A run with these angles, a row a reading; rotation and norm as at the end, in every reading."""
    layers = len(thetas[0])
    history = RotationHistory(names or [f"fc{i + 1}" for i in range(layers)], facts=facts)
    for i, row in enumerate(thetas, 1):
        history.append(
            i * every, rotation=rotation or [0.1] * layers, norm_ratio=norms or [1.0] * layers, angular_update=row
        )
    return history


def steady(*each: float, steps: int = 40) -> list[list[float]]:
    return [list(each)] * steps


def codes(history: RotationHistory) -> list[str]:
    return [finding.code for finding in findings(history)]


def only(history: RotationHistory) -> Finding:
    (finding,) = findings(history)
    return finding


def random_walk(straightness: float, step: float = 0.01, steps: int = 100, **facts: Any) -> RotationHistory:
    """Three layers whose angle from the start is that many times a random walk's."""
    angle = straightness * math.acos(math.exp(-0.5 * steps * step**2))
    return walk(steady(*[step] * 3, steps=steps), [1 - math.cos(angle)] * 3, **{**MOMENTUM, **facts})


def with_sums(history: RotationHistory, **sums: list[float]) -> RotationHistory:
    """The same readings with these sums at the end, of which paths have grown evenly."""
    state = history.state_dict()
    for row in state["rows"]:
        for name, values in sums.items():
            share = row["step"] / history.steps[-1] if name.startswith("path") else 1.0
            row[name] = [share * value for value in values]
    return RotationHistory.from_state_dict(state)


def test_a_healthy_run_has_no_finding_and_is_not_called_well_tuned() -> None:
    history = walk(steady(0.01, 0.02, 0.015))
    assert findings(history) == history.findings() == []
    assert finding_lines(history) == [NOTHING]
    assert NOTHING == "No finding. This does not mean that the run is well tuned."


@pytest.mark.parametrize("history", [RotationHistory([]), RotationHistory(["fc"])], ids=["no layers", "no readings"])
def test_nothing_is_said_of_nothing(history: RotationHistory) -> None:
    assert findings(history) == []
    assert finding_lines(history) == []


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


def test_a_history_without_rotation_says_nothing() -> None:
    history = RotationHistory(["a"])
    history.append(1, norm_ratio=[1.0])
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


# D


@pytest.mark.parametrize(("straightness", "low"), [(0.9, False), (1.69, False), (1.71, True)])
def test_straight_layers(straightness: float, low: bool) -> None:
    assert codes(random_walk(straightness)) == (["D"] if low else [])


def test_what_is_said_of_straight_layers() -> None:
    found = only(random_walk(2.6))
    assert found.sentence == (
        "The layers moved almost straight (2.6 × a random walk of the same steps): "
        "the best learning rate is probably about 18 times higher."
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


def stopping(*shares: float, steps: int = 100) -> list[list[float]]:
    return [[0.01 if step < round(share * steps) else 0.0 for share in shares] for step in range(steps)]


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


# I, J


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


def test_order_is_by_urgency() -> None:
    early = stopping(0.3, 0.3, 0.1, 0.3, 0.3, 0.0)
    rows = [[theta * scale for theta, scale in zip(row, (0.02, 1, 1, 1, 9, 0), strict=True)] for row in early]
    rows[0] = [0.02, 0.6, 0.2, 0.2, 0.9, 0.0]
    history = walk(rows, [0.01, 0.02, 0.05, 0.1, 0.3, 0.0], [6.0] * 6)
    assert codes(history) == ["A", "H", "G", "C", "B", "I", "E", "F", "J"]


def test_straightness_comes_after_what_stopped_and_before_norm_and_equilibrium() -> None:
    state = balanced(momentum=0.0).state_dict()
    for row in state["rows"]:
        row["straightness"], row["norm_ratio"] = [2.0] * 4, [6.0] * 4
    assert codes(RotationHistory.from_state_dict(state)) == ["D", "J", "K"]


def test_angles_stand_for_the_steps_since_the_one_before() -> None:
    found = only(walk([[0.05, 0.1, NAN], [0.05, NAN, NAN], [0.05, 0.001, 0.005]], every=10))
    assert found.layers == ("fc3",)
    assert found.values == pytest.approx({"path": 0.15, "typical_path": (1.5 + 1.02) / 2, "ratio": 0.15 / 1.26})


@pytest.mark.parametrize("rotation", [[NAN, 0.1, 0.1], [0.0, 0.1, 0.1]])
def test_names_stay_on_one_line_and_short(rotation: list[float]) -> None:
    sentence = only(walk(steady(0.0, 0.01, 0.01), rotation, names=[EVIL, "b", "c"])).sentence
    assert sentence.isprintable()
    assert len(sentence) < 200
    assert sentence.startswith("`</b> [31m layer")


def test_many_layers_are_counted_not_listed() -> None:
    assert only(walk(steady(*[0.0] * 50), [0.0] * 50)).sentence.startswith("`fc1`, `fc2`, `fc3` and 47 more did not")


def test_one_reading_of_one_layer_is_enough_to_ask() -> None:
    assert findings(walk([[0.1]])) == []
    assert findings(walk([[NAN]])) == []


def test_a_finding_reads_as_its_sentence_and_goes_into_a_set() -> None:
    found = only(walk(steady(0.0), [0.0]))
    assert str(found) == found.sentence
    assert found in {found}
