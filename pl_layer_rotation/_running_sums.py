"""What the angles of single steps add up to, layer by layer, while a training runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pl_layer_rotation import _geometry as geometry

QUANTITIES = ("path", "path_square", "peak", "peak_step")


class RunningSums:
    """Sum and sum of squares of each layer's angles over all steps, and the largest angle with its step.

    An angle that was read stands for all steps since the reading before it.

    Args:
        start: steps done before the first that counts.

    Attributes:
        readings: steps whose angles were read.
        dense: last step up to which every step was read.

    """

    def __init__(self, start: int = 0) -> None:
        self.readings = 0
        self.dense = self._last = start
        self._rows: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], angles: Tensor, step: int) -> None:
        """Take the angles (radians, ``(layers,)``) that one step turned layers by; NaN counts nothing."""
        steps = step - self._last
        if steps <= 0:
            return
        if steps == 1 and self.dense == self._last:
            self.dense = step
        self.readings, self._last = self.readings + 1, step
        angles = angles.double()
        known = torch.where(angles.isfinite(), angles, 0.0)
        empty = torch.zeros(len(QUANTITIES), dtype=torch.float64)
        rows = torch.stack([self._rows.get(name, empty) for name in names]) if names else torch.zeros(0, 4)
        larger = known > rows[:, 2]
        rows = torch.stack(
            [
                rows[:, 0] + steps * known,
                rows[:, 1] + steps * known.square(),
                torch.where(larger, known, rows[:, 2]),
                torch.where(larger, float(step), rows[:, 3]),
            ],
            dim=1,
        )
        self._rows.update(zip(names, rows, strict=True))

    def forget(self, name: str) -> None:
        """Start a layer's sums again, as its reference does."""
        self._rows.pop(name, None)

    def values(self, names: Sequence[str]) -> dict[str, list[float]]:
        """The sums of these layers by quantity; NaN where no angle was read."""
        missing = torch.full((len(QUANTITIES),), math.nan, dtype=torch.float64)
        columns = torch.stack([self._rows.get(name, missing) for name in names]).T.tolist() if names else [[]] * 4
        return dict(zip(QUANTITIES, columns, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        rows = {name: row.tolist() for name, row in self._rows.items()}
        return {"readings": self.readings, "dense": self.dense, "last": self._last, "rows": rows}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "RunningSums":
        """The sums that :meth:`state_dict` described."""
        sums = cls()
        sums.readings, sums.dense, sums._last = state["readings"], state["dense"], state["last"]
        sums._rows = {name: torch.tensor(row, dtype=torch.float64) for name, row in state["rows"].items()}
        return sums


def straightness(rotation: Sequence[float], path_square: Sequence[float], momentum: float) -> list[float]:
    """κ of each layer; NaN where it hardly moved or nothing is known, see :func:`_geometry.straightness`."""
    distances, squares = (torch.tensor(values, dtype=torch.float64) for values in (rotation, path_square))
    values: list[float] = geometry.straightness(distances, squares, momentum).tolist()
    return values
