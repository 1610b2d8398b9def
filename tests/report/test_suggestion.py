"""The next learning rate: what each kind of reading says, and where it says nothing."""

import math
from typing import Any

import pytest

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.suggestion import RateSuggestion, rate_factor


def straight(kappa: float, lr: float | None = 0.001, steps: int = 100, total: int | None = None, **facts: Any) -> Any:
    """Three layers that moved so straight, with an angle read in every step."""
    angle, step = kappa * math.acos(math.exp(-0.5 * steps * 0.01**2)), [0.01] * 3
    facts = {"learning_rate": lr, "momentum": 0.0, "total_steps": total or steps, **facts}
    history = RotationHistory(["conv", "fc1", "fc2"], facts=facts)
    for i in range(1, steps + 1):
        history.append(i, rotation=[1 - math.cos(angle)] * 3, norm_ratio=[1.0] * 3, angular_update=step)
    return history


def nothing(suggestion: RateSuggestion) -> bool:
    return all(math.isnan(value) for value in (suggestion.lr, suggestion.factor, suggestion.low, suggestion.high))


@pytest.mark.parametrize("kappa", [1.2, 2.6, 5.0])
def test_a_whole_run_points_to_the_fitted_multiple_of_its_rate(kappa: float) -> None:
    suggestion = straight(kappa).suggest_lr()
    assert suggestion.straightness == pytest.approx(kappa)
    assert suggestion.factor == pytest.approx(4.0 * kappa**1.6)
    assert suggestion.lr == pytest.approx(0.001 * 4.0 * kappa**1.6)
    assert suggestion.low < suggestion.lr < suggestion.high


def test_a_fifth_of_a_run_has_constants_of_its_own() -> None:
    assert straight(1.5, total=500).suggest_lr().factor == pytest.approx(10.0 * 1.5**2)
    assert straight(1.05, total=500).suggest_lr().factor == pytest.approx(10.0 * 1.05**2)
    assert nothing(straight(0.99, total=500).suggest_lr())


@pytest.mark.parametrize("kappa", [0.8, 1.0, 1.09])
def test_a_run_that_is_not_straight_says_only_that(kappa: float) -> None:
    suggestion = straight(kappa).suggest_lr()
    assert nothing(suggestion)
    assert math.isnan(rate_factor(kappa))
    assert "Probe lower and higher rates" in str(suggestion)
    assert suggestion.straightness == pytest.approx(kappa)


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        (RotationHistory(["fc"]), "There are no readings yet."),
        (straight(2.0, momentum=None), "Straightness is not known: the optimizer's momentum was not recorded"),
        (straight(2.0, steps=29), "Straightness needs 30 angles and a tenth of the run."),
        (straight(2.0, total=1001), "Straightness needs 30 angles and a tenth of the run."),
        (straight(2.0, total=250), "One run was tested at 20 % of its steps and at the end, not here."),
    ],
)
def test_where_nothing_can_be_read_the_reason_is_said(history: RotationHistory, reason: str) -> None:
    suggestion = history.suggest_lr()
    assert nothing(suggestion)
    assert suggestion.sentence.startswith(reason)


def test_layers_that_hardly_turned_want_a_hundred_times_the_rate() -> None:
    history = RotationHistory(["fc"], facts={"learning_rate": 1e-9, "momentum": 0.9})
    history.append(100, rotation=[9e-9], norm_ratio=[1.0])
    suggestion = history.suggest_lr()
    assert suggestion.lr == pytest.approx(1e-7)
    assert math.isnan(suggestion.low)
    assert str(suggestion) == "The layers hardly turned, too little to read: try 1.0e-07 next."


def test_without_a_rate_the_factor_is_left() -> None:
    suggestion = straight(2.0, lr=None).suggest_lr()
    assert math.isnan(suggestion.lr)
    assert suggestion.factor == pytest.approx(4.0 * 2.0**1.6)
    assert "about 12 times that of the run." in suggestion.sentence


def test_of_several_rates_the_one_that_moved_least_straight_is_the_suggestion() -> None:
    probes = [straight(kappa, rate) for rate, kappa in ((1e-3, 1.1), (1e-2, 0.7), (1e-1, 0.9), (1.0, 1.0))]
    suggestion = probes[0].suggest_lr(*probes[1:])
    assert (suggestion.lr, suggestion.factor) == (pytest.approx(1e-2), 1.0)
    assert suggestion.straightness == pytest.approx(0.7)
    assert suggestion.low <= suggestion.lr <= suggestion.high
    assert suggestion.sentence.startswith("Of 4 rates, straightness is lowest here (0.70 × a random walk")


@pytest.mark.parametrize(("kappas", "factor"), [((1.2, 0.9, 0.7), 10 ** (2 / 3)), ((0.7, 0.9, 1.0), 10 ** (-2 / 3))])
def test_a_lowest_rate_at_the_end_asks_for_the_next_one(kappas: tuple[float, ...], factor: float) -> None:
    probes = [straight(kappa, 10.0**-i) for i, kappa in zip((3, 2, 1), kappas, strict=True)]
    suggestion = probes[0].suggest_lr(*probes[1:])
    assert suggestion.factor == pytest.approx(factor)
    assert math.isnan(suggestion.high)


def test_several_runs_must_be_equally_long_and_readable() -> None:
    with pytest.raises(ValueError, match=r"`others` must have trained for as many steps as this run, got \[100, 90\]"):
        straight(1.0).suggest_lr(straight(1.0, steps=90))
    assert nothing(straight(1.0).suggest_lr(straight(2.0, lr=0.01)))
