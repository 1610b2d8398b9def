"""The next learning rate to try, from how straight the layers moved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.measures import EARLIEST, FEWEST_READINGS, STRAIGHT, Measures, median_straightness, number
from pl_layer_rotation.report.named_runs import check_history
from pl_layer_rotation.report.text import two_digits

# best rate = rate × factor × straightness^exponent, above a threshold; fitted on seven small tasks.
_WHOLE, _WHOLE_ABOVE = (4.0, 1.6), 1.1  # from the second half of a run on
_PROBE, _PROBE_ABOVE = (10.0, 2.0), 1.0  # where it was read near 20 %
_PROBE_SHARES, _WHOLE_SHARE = (0.15, 0.3), 0.5  # of the run
# 10 % and 90 % quantiles of best over suggested rate on the tasks that judged it: benchmarks/results/tuning.json.
_SPREAD = {"whole": (0.143, 3.38), "probe": (0.0809, 2.54), "valley": (0.0215, 2.11)}
TOO_SMALL = 100.0  # how far to go up where layers hardly turned
_APART = 10 ** (2 / 3)  # rates of the probes, as they were tested


@dataclass(frozen=True)
class RateSuggestion:
    """A learning rate to try next.

    Attributes:
        lr: the rate; NaN where straightness says nothing, or the run's own rate is not known.
        factor: that rate over the run's; NaN where straightness says nothing.
        low: the best rate was above this in nine of ten tests; NaN where ``lr`` is no estimate of it.
        high: the best rate was below this in nine of ten tests; NaN where ``lr`` is no estimate of it.
        straightness: median over the layers that moved; of several runs the lowest one.
        sentence: all this in words.

    """

    lr: float
    factor: float
    low: float
    high: float
    straightness: float
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def suggest_lr(history: RotationHistory, *others: RotationHistory) -> RateSuggestion:
    """The learning rate that the straightness of one run, or of several at other rates, points to.

    One run: where the layers moved straighter than a random walk of the same steps, the best rate is higher by a fitted
    factor. Otherwise the run may be at the best rate or far above it, and there is no suggestion. Several runs, such as
    probes of a tenth of the steps: the best rate is near the one at which the layers moved least straight; below it
    where data are few or noisy. Fitted and judged on small networks with momentum or first beta 0.9, a cosine schedule,
    and up to 1,200 steps, see ``docs/tuning.md``.

    Args:
        history: a run whose optimizer's momentum (or first beta) and learning rate are known. The rate is that of the
            first param group at the start of training; where that is a warm-up's, use ``factor``.
        *others: runs that differ in the learning rate alone, each stopped after the same steps.

    Returns:
        The suggestion; NaN with the reason in ``sentence`` where straightness says nothing.

    Raises:
        TypeError: If one of the arguments is no history.
        ValueError: If the runs are not equally long.

    Example::

        >>> probes = []
        >>> for lr, angle in ((0.001, 0.13), (0.01, 0.07), (0.1, 0.09)):
        ...     probe = RotationHistory(["conv", "fc"], facts={"learning_rate": lr, "momentum": 0.0})
        ...     for step in range(1, 101):
        ...         probe.append(step, rotation=[1 - math.cos(angle)] * 2, angular_update=[0.01] * 2)
        ...     probes.append(probe)
        >>> suggest_lr(*probes).lr
        0.01
        >>> round(suggest_lr(probes[0]).factor, 1)
        6.1

    """
    check_history(history)
    for other in others:
        check_history(other, "others")
    return _from_valley([history, *others]) if others else _from_one(history)


def rate_factor(straightness: float) -> float:
    """Best rate over the rate of a run whose layers moved this straight, as fitted on whole runs; NaN below 1.1."""
    return _WHOLE[0] * straightness ** _WHOLE[1] if straightness > _WHOLE_ABOVE else math.nan


def times_higher(factor: float) -> str:
    """How much higher the best rate is expected, and between which factors it was in tests on whole runs.

    Example::

        >>> times_higher(30.0)
        'about 30 times higher (4.3 to 101 in 8 of 10 tests)'

    """
    low, high = (two_digits(part * factor) for part in _SPREAD["whole"])
    return f"about {two_digits(factor)} times higher ({low} to {high} in 8 of 10 tests)"


def is_whole(run: Measures) -> bool:
    """Whether enough of the run is over for the constants that were fitted at its end."""
    return run.end >= _WHOLE_SHARE * run.total


def _from_one(history: RotationHistory) -> RateSuggestion:
    if not history.steps or not history.layer_names:
        return _nothing("There are no readings yet")
    run = Measures(history)
    if not run.moving and run.still and not run.lost:
        return _suggestion(history, TOO_SMALL, math.nan, None, "The layers hardly turned, too little to read")
    kappa = median_straightness(run)
    share = run.end / run.total
    if kappa is None:
        return _nothing("Straightness is not known: the optimizer's momentum was not recorded, or no layer moved")
    if run.readings < FEWEST_READINGS or share < EARLIEST:
        return _nothing(f"Straightness needs {FEWEST_READINGS} angles and a tenth of the run", kappa)
    whole = is_whole(run)
    if not whole and not _PROBE_SHARES[0] <= share <= _PROBE_SHARES[1]:
        return _nothing("One run was tested at 20 % of its steps and at the end, not here", kappa)
    (factor, exponent), above = (_WHOLE, _WHOLE_ABOVE) if whole else (_PROBE, _PROBE_ABOVE)
    walk = f"{two_digits(kappa)} × a random walk of the same steps"
    if kappa <= above:
        reason = f"The layers moved no straighter than that tells ({walk}): the rate is near the best one or above it, "
        return _nothing(reason + "or the data hold little signal. Probe lower and higher rates", kappa)
    spread = _SPREAD["whole" if whole else "probe"]
    how = "almost straight" if kappa > STRAIGHT else "somewhat straight"
    return _suggestion(history, factor * kappa**exponent, kappa, spread, f"The layers moved {how} ({walk})")


def _from_valley(histories: Sequence[RotationHistory]) -> RateSuggestion:
    steps = [history.steps[-1] if history.steps else 0 for history in histories]
    if len(set(steps)) > 1:
        raise ValueError(f"`others` must have trained for as many steps as this run, got {steps}. Use equal lengths.")
    read: dict[float, tuple[float, RotationHistory]] = {}
    for history in histories:
        rate = number(history.facts, "learning_rate")
        if (
            rate
            and history.steps
            and history.layer_names
            and (kappa := median_straightness(Measures(history))) is not None
        ):
            read[rate] = (kappa, history)
    if len(read) < 3:
        return _nothing(f"Straightness could be read at {len(read)} different rates, and needs three")
    rates = sorted(read)
    lowest = min(rates, key=lambda rate: read[rate][0])
    kappa, history = read[lowest]
    if lowest in (rates[0], rates[-1]):
        factor = _APART if lowest == rates[-1] else 1 / _APART
        side = "highest" if lowest == rates[-1] else "lowest"
        return _suggestion(history, factor, kappa, None, f"Straightness is lowest at the {side} of the rates")
    why = f"Of {len(rates)} rates, straightness is lowest here ({two_digits(kappa)} × a random walk of the same steps)"
    return _suggestion(history, 1.0, kappa, _SPREAD["valley"], why)


def _nothing(why: str, kappa: float = math.nan) -> RateSuggestion:
    return RateSuggestion(math.nan, math.nan, math.nan, math.nan, kappa, f"{why}.")


def _suggestion(
    history: RotationHistory, factor: float, kappa: float, spread: tuple[float, float] | None, why: str
) -> RateSuggestion:
    rate = number(history.facts, "learning_rate")
    lr = math.nan if rate is None else rate * factor
    low, high = (lr * part for part in spread) if spread else (math.nan, math.nan)
    times = f"{two_digits(factor)} times that of the run" if rate is None else f"{two_digits(lr)}"
    if spread is None:
        return RateSuggestion(lr, factor, low, high, kappa, f"{why}: try {times} next.")
    span = "" if rate is None else f" ({two_digits(low)} to {two_digits(high)} in 8 of 10 tests)"
    return RateSuggestion(lr, factor, low, high, kappa, f"{why}: the best rate is probably about {times}{span}.")
