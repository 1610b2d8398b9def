"""What the angles of single steps add up to, layer by layer, while a training runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pl_layer_rotation import _geometry as geometry

QUANTITIES = ("path", "path_square", "peak", "peak_step")
# Beside the quantities a layer's row holds its last step that counted, and that up to which every step was read.
_COLUMNS = len(QUANTITIES) + 2


class RunningSums:
    """Sum and sum of squares of each layer's angles over all steps, and the largest angle with its step.

    An angle that was read stands for all steps since the layer's reading before it. The sums stay on the device of the
    angles, so that adding does not wait for it.

    Args:
        start: steps done before the first that counts.

    Attributes:
        readings: steps in which angles of any layer were read.

    """

    def __init__(self, start: int = 0) -> None:
        self.readings = 0
        self._last = self._last_but_one = start
        self._places: dict[str, int] = {}
        self._rows = torch.zeros(0, _COLUMNS, dtype=torch.float64)
        self._order: list[str] = []  # of the last angles, and where their rows are
        self._index: Tensor | None = None

    def add(self, names: Sequence[str], angles: Tensor, step: int) -> None:
        """Take the angles (radians, ``(layers,)``) that one step turned layers by; NaN counts nothing.

        Layers that are read in different ways come in several calls for one step.
        """
        if step > self._last:
            self.readings += 1
            self._last_but_one, self._last = self._last, step
        if not len(names):
            return
        angles = angles.to(geometry.wide_dtype(angles.device))
        self._find(names, angles)
        # New tensors, not updates in place: a reading under inference mode must leave usable ones behind.
        rows = self._rows if self._index is None else self._rows[self._index]
        path, square, peak, peak_step, last, dense = rows.unbind(1)
        steps = (step - last).clamp(min=0)
        known = torch.where(angles.isfinite(), angles, 0.0)
        larger = (known > peak) & (steps > 0)
        now = torch.full_like(last, step)
        new = torch.stack(
            [
                path + steps * known,
                square + steps * known.square(),
                torch.where(larger, known, peak),
                torch.where(larger, now, peak_step),
                torch.maximum(last, now),
                torch.where((steps == 1) & (dense == last), now, dense),
            ],
            dim=1,
        )
        self._rows = new if self._index is None else self._rows.index_copy(0, self._index, new)

    def forget(self, name: str) -> None:
        """Start a layer's sums again, as its reference does."""
        place = self._places.get(name)
        if place is not None:
            rows = self._rows.clone()
            rows[place] = self._empty(self._last).to(rows)
            self._rows = rows

    def rows(self, names: Sequence[str]) -> Tensor:
        """What these layers' angles add up to, on their device; NaN where no angle was read.

        Returns:
            ``(layers, 6)``: the quantities, the last step that counted, and that up to which every step was read.

        """
        if list(names) == self._order and self._index is None:
            return self._rows
        missing = torch.full((1, _COLUMNS), torch.nan).to(self._rows)
        places = [self._places.get(name, len(self._rows)) for name in names]
        return torch.cat([self._rows, missing])[places]

    def values(self, names: Sequence[str]) -> dict[str, list[float]]:
        """The sums of these layers by quantity; NaN where no angle was read."""
        return dict(zip(QUANTITIES, self.rows(names).T.tolist(), strict=False))

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        rows = dict(zip(self._places, self._rows.tolist(), strict=True))
        return {"readings": self.readings, "last": [self._last_but_one, self._last], "rows": rows}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "RunningSums":
        """The sums that :meth:`state_dict` described."""
        sums = cls()
        sums.readings = state["readings"]
        sums._last_but_one, sums._last = state["last"]
        sums._places = {name: place for place, name in enumerate(state["rows"])}
        sums._rows = torch.tensor(list(state["rows"].values()), dtype=torch.float64).view(-1, _COLUMNS)
        return sums

    def _find(self, names: Sequence[str], angles: Tensor) -> None:
        """Note where the rows of these layers are, with rows for new ones."""
        self._rows = self._rows.to(angles)
        if list(names) == self._order and len(self._places) == len(self._rows):
            return
        new = [name for name in names if name not in self._places]
        if new:
            # What happened before a layer was seen for the first time does not count.
            start = self._empty(self._last_but_one).to(self._rows).expand(len(new), -1)
            self._places.update(zip(new, range(len(self._places), len(self._places) + len(new)), strict=True))
            self._rows = torch.cat([self._rows, start])
        self._order = list(names)
        places = [self._places[name] for name in names]
        everything = places == list(range(len(self._rows)))
        self._index = None if everything else torch.tensor(places).to(angles.device, non_blocking=True)

    def _empty(self, step: int) -> Tensor:
        return torch.tensor([0.0] * len(QUANTITIES) + [step, step], dtype=torch.float64)


def straightness(rotation: Sequence[float], path_square: Sequence[float], momentum: float) -> list[float]:
    """κ of each layer; NaN where it hardly moved or nothing is known, see :func:`_geometry.straightness`."""
    distances, squares = (torch.tensor(values, dtype=torch.float64) for values in (rotation, path_square))
    values: list[float] = geometry.straightness(distances, squares, momentum).tolist()
    return values
