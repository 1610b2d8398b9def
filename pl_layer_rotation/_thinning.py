"""Which readings of a long training are kept."""

import operator
from collections.abc import Mapping
from typing import Any


class Thinning:
    """Keeps every reading, later every second, then every fourth, and so on; always the last one too.

    What is kept depends on the readings alone, so a training that resumes keeps what one without interruption would.

    Args:
        most: readings that are kept at most, at least 2.

    Attributes:
        every: of so many readings one is kept.
        readings: those that were counted in all.

    Raises:
        TypeError: If ``most`` is no integer.
        ValueError: If it is smaller than 2.

    """

    def __init__(self, most: int) -> None:
        if isinstance(most, bool) or not hasattr(most, "__index__"):
            raise TypeError(f"`readings` must be an integer of at least 2, got {most!r}. Round it.")
        most = operator.index(most)
        if most < 2:
            raise ValueError(f"`readings` must be at least 2, for the first and the last, got {most}.")
        self.most, self.every = most, 1
        self.readings = 0
        self._numbers: list[int] = []  # of the readings that are kept

    def append(self) -> list[int] | None:
        """Count one more reading, the last of the rows now.

        Returns:
            Indices of the rows to keep; None for all.

        """
        rows = list(range(len(self._numbers) + 1))
        if self._numbers and self._numbers[-1] % self.every:
            del rows[-2]  # it was kept for being the last
        self._numbers = [*self._numbers, self.readings]
        self.readings += 1
        while len(rows) > self.most:
            self.every *= 2
            rows = [row for row in rows if self._numbers[row] % self.every == 0 or row == rows[-1]]
        if len(rows) == len(self._numbers):
            return None
        self._numbers = [self._numbers[row] for row in rows]
        return rows

    def cut(self, rows: int) -> None:
        """Forget all but the first rows."""
        if rows < len(self._numbers):
            self.readings = self._numbers[rows]
            del self._numbers[rows:]

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {"most": self.most, "every": self.every, "next": self.readings, "numbers": list(self._numbers)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Thinning":
        """The state that :meth:`state_dict` described."""
        thinning = cls(state["most"])
        thinning.every, thinning.readings, thinning._numbers = state["every"], state["next"], list(state["numbers"])
        return thinning
