"""The methods of the tuning study and their rivals, as functions of what a run at some rate would show.

Rates stand on a lattice, three to a decade; ``place`` is the number of a rate on it. A method asks
``show(place, share)`` for the run at that rate, stopped after that share of its steps, and returns the place that it
would train at. So finished runs answer for every start and every method that needs no others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

DECADE = 3  # places
PROBE, LONG_PROBE = 0.1, 0.2  # shares of a run that probes train
COARSE, REACH = 2, 2 * DECADE  # places between the first probes of the valley, and how far they go to either side
CLOSE = 0.1  # of the lowest κ, where a first valley may be
BELOW = DECADE  # from the valley down to where small and noisy data may want the rate


class Shown(NamedTuple):
    """What one run shows."""

    kappa: float | None  # median straightness of the layers that moved; None where nothing can be read
    diverged: bool
    score: float = math.nan  # on the validation set, in points, larger is better; of whole runs


class Outcome(NamedTuple):
    """Where a method ends, and what it cost in units of a whole run's steps."""

    place: int
    cost: float
    probed: tuple[int, ...]


class Rule(NamedTuple):
    """``best rate = rate × factor × κ^exponent`` above a threshold, and how far to go down below it."""

    factor: float
    exponent: float
    threshold: float
    down: int  # places


Show = Callable[[int, float], Shown]

# Twelve runs: rates a factor 4.6 apart by weight decay; Layca's layers have no decay, so it gets more rates.
GRID: dict[str, list[tuple[int, float | None]]] = {
    "SGD": [(place, decay) for place in (-6, -4, -2, 0) for decay in (0.0, 5e-4, 5e-3)],
    "AdamW": [(place, decay) for place in (-10, -8, -6, -4) for decay in (0.0, 0.01, 0.1)],
    "Layca(SGD)": [(place, None) for place in range(-10, 2)],
    "Layca(AdamW)": [(place, None) for place in range(-10, 2)],
}
DEFAULT_RATE = {"SGD": 1e-3, "AdamW": 1e-3, "Layca(SGD)": 3**-3, "Layca(AdamW)": 3**-3}
STARTS = (-2, -1, 0, 1, 2)  # decades from the grid's best


def rate(place: int) -> float:
    """The rate that stands there, to four digits."""
    return float(f"{10 ** (place / DECADE):.4g}")


def place_of(value: float) -> int:
    """The nearest place."""
    return round(DECADE * math.log10(value))


def jump(kappa: float, rule: Rule) -> int:
    """Places from a rate to the best one."""
    return round(DECADE * (math.log10(rule.factor) + rule.exponent * math.log10(kappa)))


def three_runs(start: int, show: Show, rule: Rule) -> Outcome:
    """Up to three whole runs: jump where the path was straight, go down first where it was not; keep the best."""
    seen: dict[int, Shown] = {}
    place = start
    while len(seen) < 3:
        seen[place] = shown = show(place, 1.0)
        straight = shown.kappa is not None and not shown.diverged and shown.kappa > rule.threshold
        if straight:
            assert shown.kappa is not None
            following = place + max(1, jump(shown.kappa, rule))
        elif len(seen) > 1 and min(seen) < place:
            break  # came from below, and arrived
        else:
            following = place - rule.down
        if following in seen:
            break
        place = following
    chosen = max(seen, key=lambda at: -math.inf if seen[at].diverged else seen[at].score)
    return Outcome(chosen, len(seen), tuple(seen))


def one_probe(start: int, show: Show, rule: Rule) -> Outcome:
    """One short probe at a rate that is meant to be too low, one jump, one whole run."""
    kappa = show(start, LONG_PROBE).kappa
    steps = jump(kappa, rule) if kappa is not None and kappa > rule.threshold else 0
    return Outcome(start + steps, LONG_PROBE + 1, (start,))


def valley(start: int, show: Show) -> Outcome:
    """Short probes up and down from the start; train where the path is least straight.

    Probes stand ``COARSE`` places apart over two decades to either side; where the lowest is at an end, more follow
    there. Then the place between the lowest and the lower one of its neighbours is probed.
    """
    bottom, seen, probe = _probed(start, show, lambda seen: min(seen, key=lambda place: (seen[place], place)))
    probe(bottom + 1 if probe(bottom + COARSE) < probe(bottom - COARSE) else bottom - 1)
    lowest = min(seen, key=lambda place: (seen[place], place))
    return Outcome(lowest, PROBE * len(seen) + 1, tuple(seen))


def valley_and_below(start: int, show: Show) -> Outcome:
    """The valley, and a whole run at a tenth of its rate too; keep what validates better."""
    found = valley(start, show)
    places = (found.place, found.place - BELOW)
    runs = {place: show(place, 1.0) for place in places}
    chosen = max(places, key=lambda place: -math.inf if runs[place].diverged else runs[place].score)
    return Outcome(chosen, found.cost + 1, found.probed)


def first_valley_downhill(start: int, show: Show) -> Outcome:
    """The repair: the first valley from below, refined on both sides; then whole runs downhill while they get better.

    The first is the lowest rate at which κ is lower than at both neighbours and within ``CLOSE`` of the lowest of all:
    far above the best rate κ scatters around 1, and a narrow valley may fall between two coarse probes.
    """

    def first(seen: Mapping[int, float]) -> int:
        def is_valley(place: int) -> bool:
            beside = (seen.get(place + side, math.inf) for side in (-COARSE, COARSE))
            return seen[place] <= min(min(seen.values()) + CLOSE, *beside)

        return next(place for place in sorted(seen) if is_valley(place))

    bottom, seen, probe = _probed(start, show, first)
    found = min((bottom - 1, bottom, bottom + 1), key=probe)
    runs = {place: show(place, 1.0) for place in (found, found - COARSE)}
    value = {place: -math.inf if run.diverged else run.score for place, run in runs.items()}
    if value[found - COARSE] > value[found]:
        further = show(found - 2 * COARSE, 1.0)
        value[found - 2 * COARSE] = -math.inf if further.diverged else further.score
    return Outcome(max(value, key=value.__getitem__), PROBE * len(seen) + len(value), tuple(seen))


def _probed(
    start: int, show: Show, bottom_of: Callable[[Mapping[int, float]], int]
) -> tuple[int, Mapping[int, float], Callable[[int], float]]:
    """Probe two decades to either side of the start, and further where the bottom is at an end.

    Returns:
        The bottom, κ by place as far as it was probed, and how to probe one more place.

    """
    seen: dict[int, float] = {}

    def probe(place: int) -> float:
        if place not in seen:
            shown = show(place, PROBE)
            seen[place] = math.inf if shown.diverged or shown.kappa is None else shown.kappa
        return seen[place]

    for place in range(start - REACH, start + REACH + 1, COARSE):
        probe(place)
    while (bottom := bottom_of(seen)) in (min(seen), max(seen)) and len(seen) < 4 * REACH:
        probe(bottom - COARSE if bottom == min(seen) else bottom + COARSE)
    return bottom, seen, probe


def score(record: Mapping[str, Any], part: str) -> float:
    """Points of accuracy, or of loss where 5 % are a point; larger is better, and the loss decides between equals."""
    loss = record[f"{part}_loss"]
    if f"{part}_accuracy" in record:
        return 100 * float(record[f"{part}_accuracy"]) - 1e-3 * min(10.0, loss)
    return -math.log(loss) / math.log(1.05)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Factor and exponent from pairs of κ and best rate over rate, by least squares over logarithms."""
    x, y = ([math.log10(pair[i]) for pair in points] for i in (0, 1))
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / math.fsum(
        (a - mean_x) ** 2 for a in x
    )
    return 10 ** (mean_y - slope * mean_x), slope


# Fitted on the tasks and seeds A.
WHOLE_RUN = Rule(4.0, 1.6, 1.1, DECADE)
SHORT_RUN = Rule(10.0, 2.0, 1.0, DECADE)
METHODS: dict[str, Callable[[int, Show], Outcome]] = {
    "valley and below": valley_and_below,
    "valley": valley,
    "three runs": partial(three_runs, rule=WHOLE_RUN),
    "one probe": partial(one_probe, rule=SHORT_RUN),
}
# Made after the tasks B had judged the others; judged itself on fresh seeds of some of them.
REPAIRS: dict[str, Callable[[int, Show], Outcome]] = {"first valley, downhill": first_valley_downhill}
