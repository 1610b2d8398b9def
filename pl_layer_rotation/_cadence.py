"""Which steps of a training are read."""

from typing import NamedTuple

# Angles are read in every step of the first tenth of a training, where shocks happen, up to so many steps; afterwards
# so often at least: findings from fewer readings than that were wrong.
_DENSE_SHARE, _MOST_DENSE, _FEWEST_READINGS = 0.1, 1000, 60


class Cadence(NamedTuple):
    """When everything is read, and when only the angles of steps whose layers must be copied before.

    Attributes:
        every: batches that stepped between readings of everything; 0 for never.
        angle_every: the same for angles.
        dense_until: last step up to which every step's angles are read.

    """

    every: int
    angle_every: int = 0
    dense_until: int = 0

    def reads(self, step: int, last: int) -> bool:
        """Whether everything is read in a step; ``last`` is the one before it."""
        return _passes(self.every, step, last)

    def reads_angles(self, step: int, last: int) -> bool:
        """Whether a step's angles are read."""
        return step <= self.dense_until or _passes(self.angle_every, step, last)


def planned(every: int, steps: int | None, copies: bool) -> Cadence:
    """The cadence of a training.

    Args:
        every: batches that stepped between readings; 0 for none.
        steps: optimizer steps of the training, None where unknown.
        copies: whether layers are copied for their angles.

    """
    if not copies or steps is None or not every:
        return Cadence(every, every)
    dense = min(_MOST_DENSE, int(_DENSE_SHARE * steps))
    return Cadence(every, max(1, min(every, steps // _FEWEST_READINGS)), dense)


def _passes(every: int, step: int, last: int) -> bool:
    # Not "is a multiple": by hand, gradients may accumulate so that no step ever is one.
    return every > 0 and step // every > last // every
