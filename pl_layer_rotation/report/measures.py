"""What the rules of the findings look at: one value a layer, out of the curves of a run."""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._history_facts import plain
from pl_layer_rotation._numbers import is_number
from pl_layer_rotation.history import RotationHistory

# Facts that rules and figures read, and that say nothing to a reader of settings, or stand in sentences.
FOR_RULES = frozenset(
    {"followed_by_norm", "dense_steps", "angle_readings", "base", "constant_learning_rate"}
    | {"reference_steps", "reference_resolution", "not_finite"}
)
FEWEST_READINGS = 30  # of angles: with 12, 7 of 61 healthy runs had a wrong finding
STRAIGHT = 1.7  # times a random walk of the same steps: above it the learning rate is too low
EARLIEST = 0.1  # of the run: from here on straightness can be read while it trains
_ALMOST_ALL = 0.99  # of a path
_DENSE, _MOST_DENSE = 0.1, 1000  # share of the run, and steps, at the start in which no step's angle may be missed


class Measures:
    """One value a layer, from the last reading that has one; layers are numbered by depth.

    Args:
        history: the recorded curves; at least one reading of at least one layer.

    """

    def __init__(self, history: RotationHistory) -> None:
        self.facts: Mapping[str, Any] = history.facts
        self.names = history.layer_names
        self.steps = torch.tensor(history.steps, dtype=torch.float64)
        self.end = history.steps[-1]

        def recorded(quantity: str) -> Tensor:
            if quantity in history.quantities:
                values = history.values(quantity)
                return values.where(values.isfinite(), torch.nan)
            return torch.full((len(history), len(self.names)), math.nan, dtype=torch.float64)

        rotation, self.norms = recorded("rotation"), recorded("norm_ratio")
        self.rotation, self.norm = _last(rotation), _last(self.norms)
        self.angles = geometry.angle(self.rotation).tolist()
        self.thetas = recorded("angular_update")
        self.last_finite = _last(self.steps[:, None].where(rotation.isfinite(), torch.nan))
        self._sort(history, rotation)
        self._sum_up(history, recorded)

    def _sort(self, history: RotationHistory, rotation: Tensor) -> None:
        """Which layers are still, moving, not finite any more, or measured from a later step than the others."""
        known = self.facts.get("reference_steps")
        starts = [int(known.get(name, 0)) if isinstance(known, Mapping) else 0 for name in self.names]
        self.start = min(starts)
        layers = range(len(self.names))
        # They started at zero or came later: the first steps of a tiny layer are huge, and its path is a part.
        late = [start > self.start for start in starts]
        self.from_zero = {i: starts[i] for i in layers if late[i] and starts[i] == history.steps[0]}
        measured = rotation.isfinite().any(0).tolist()
        # Weights that went to zero have no direction, but still a norm.
        read = "rotation" in history.quantities
        lost = (rotation[-1].isnan() & self.norms[-1].isnan() & read).tolist()
        # A reference that was rounded is that far from weights that never moved.
        still = max(geometry.STILL, number(self.facts, "reference_resolution") or 0.0)
        rotated = (self.rotation >= still).tolist()
        self.measured = [i for i in layers if measured[i] and not late[i]]
        self.moving = [i for i in self.measured if rotated[i] and not lost[i]]
        # What vanishes while others go on has left the module, unless the monitor noted that it is not finite.
        noted = self.facts.get("not_finite")
        names = noted if isinstance(noted, list) else []
        gone = [i for i in layers if lost[i] and (measured[i] or not any(measured))]
        self.lost = [i for i in gone if not self.moving or self.names[i] in names]
        self.never = [i for i in layers if not measured[i] and any(measured)]
        self.still = [*(i for i in self.measured if not rotated[i] and not lost[i]), *self.never]

    def _sum_up(self, history: RotationHistory, recorded: Callable[[str], Tensor]) -> None:
        """Sums over all steps: as the monitor took them, otherwise from the readings of the angle."""
        known = self.thetas.isfinite()
        taken = {"path", "path_square", "peak", "peak_step"} <= set(history.quantities)
        if taken:
            self.paths, self.squares = recorded("path"), recorded("path_square")
            self.peak, self.peak_step = _last(recorded("peak")).tolist(), _last(recorded("peak_step")).tolist()
        else:
            last = self.steps[:, None].where(known, self.start).cummax(0).values
            before = torch.cat([torch.full_like(last[:1], self.start), last[:-1]])
            each = (self.steps[:, None] - before) * self.thetas
            self.paths = each.where(known, 0).cumsum(0)
            self.squares = (each * self.thetas).where(known, 0).cumsum(0)
            largest = self.thetas.where(known, -1).max(0)
            self.peak = largest.values.where(known.any(0), torch.nan).tolist()
            self.peak_step = self.steps[largest.indices].tolist()
        self.path = _last(self.paths)
        self.readings = max(int(known.any(1).sum()), int(number(self.facts, "angle_readings") or 0))
        first = torch.arange(1, len(self.steps) + 1) + self.start
        in_a_row = int(((self.steps == first) & known.any(1)).cumprod(0).sum())
        dense = max(in_a_row, int(number(self.facts, "dense_steps") or 0) - self.start)
        self.total = number(self.facts, "total_steps") or self.end
        self.dense = dense >= min(int(_DENSE * (self.total - self.start)), _MOST_DENSE)
        self.straightness = self._straightness(recorded)

    def _straightness(self, recorded: Callable[[str], Tensor]) -> list[float]:
        values = _last(recorded("straightness"))
        if values.isfinite().any():
            return list(values.tolist())
        momentum = number(self.facts, "momentum")
        if momentum is None or not 0 <= momentum < 1:
            return [math.nan] * len(self.names)
        return list(geometry.straightness(self.rotation, _last(self.squares), momentum).tolist())

    def stopped(self) -> dict[int, float]:
        """For each moving layer, the first share of the run that holds 99 % of its path."""
        reached = self.paths >= _ALMOST_ALL * self.path
        steps = self.steps[reached.int().argmax(0)]
        shares = ((steps - self.start) / (self.end - self.start)).tolist() if self.end > self.start else []
        return {i: shares[i] for i in self.moving if shares and self.path[i] > 0}

    def relative_paths(self, without: Collection[int] = ()) -> dict[int, tuple[float, float]]:
        """For each moving layer its path over the median path of the others, and that median."""
        paths = {i: value for i in self.moving if (value := float(self.path[i])) > 0 and i not in without}
        if len(paths) < 3:
            return {}
        typical = {i: statistics.median(value for j, value in paths.items() if j != i) for i in paths}
        return {i: (paths[i] / typical[i], typical[i]) for i in paths}

    def called(self, layers: Sequence[int]) -> tuple[str, ...]:
        """Names of layers."""
        return tuple(self.names[i] for i in layers)


def median_straightness(run: Measures) -> float | None:
    """Over the layers that moved; None where it is not known.

    A run read back from W&B may know no more than the median itself.
    """
    values = [value for i in run.moving if math.isfinite(value := run.straightness[i])]
    return statistics.median(values) if values else number(run.facts, "median_straightness")


def read_straightness(run: Measures) -> float | None:
    """The same; None with fewer than 30 angles too, or before a tenth of the run is over."""
    enough = run.readings >= FEWEST_READINGS and run.end >= EARLIEST * run.total
    return median_straightness(run) if enough else None


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; equal values share the mean of their ranks, and where all of one are equal it is 0."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return statistics.correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(b < a for b in values) + sum(b == a for b in values) / 2 for a in values]


def _last(values: Tensor) -> Tensor:
    """The last finite value of each column; NaN where there is none."""
    known = values.isfinite()
    row = values.shape[0] - 1 - known.flip(0).int().argmax(0)
    return values.gather(0, row[None])[0].where(known.any(0), torch.nan)


def union(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of several mappings, each once, in the order of their first place."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def number(facts: Mapping[str, Any], key: str) -> float | None:
    """A fact that is a finite number; files can hold anything."""
    value = plain(facts.get(key))
    return float(value) if is_number(value) and math.isfinite(value) else None


def random_walk(history: RotationHistory) -> dict[int, float]:
    """Rotation that a random walk with the angles of a run's steps would have reached, by step.

    ``1 - exp(-c·S / 2)`` in the median over layers, with the sum ``S`` of the squared angles of all steps (radians) and
    ``c = (1 + m) / (1 - m)`` for momentum ``m``.

    Args:
        history: the readings of one run.

    Returns:
        Values at the steps where the monitor recorded the sum; empty where that, or the momentum, is not known.

    Example::

        >>> history = RotationHistory(["fc"], facts={"momentum": 0.5})
        >>> history.append(10, path_square=[0.02])
        >>> history.append(20, path_square=[float("nan")])
        >>> {step: round(value, 5) for step, value in random_walk(history).items()}
        {10: 0.02955}

    """
    momentum = number(history.facts, "momentum")
    if momentum is None or not 0 <= momentum < 1:
        return {}
    factor = (1 + momentum) / (1 - momentum)
    walk = {}
    for row in history.state_dict()["rows"]:
        reached = [-math.expm1(-0.5 * factor * square) for square in row.get("path_square", ()) if square > 0]
        if reached:
            walk[row["step"]] = statistics.median(reached)
    return walk
