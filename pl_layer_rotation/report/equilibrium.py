"""Rotational equilibrium: the angle at which weight decay holds layers that a normalization follows."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pl_layer_rotation.report.measures import Measures, number

_END = 0.8  # of the run, where its last part begins
_NEAR = 0.15  # of the predicted angle
_SAME_NORM = 0.1  # change of the logarithm of the norm
_TIMES = 3.6  # time constants of weight decay after which it was observed


def predicted_equilibrium(facts: Mapping[str, Any]) -> tuple[float, float] | None:
    """The angle of a step that weight decay leads to, and how long it takes (arXiv 2305.17212).

    With learning rate ``lr``, weight decay ``wd``, momentum ``m`` or first beta ``b`` the angle is
    ``sqrt(2·lr·wd / (1 + m))`` for SGD and ``sqrt(2·lr·wd·(1 - b) / (1 + b))`` for AdamW.

    Args:
        facts: those of a history.

    Returns:
        Radians a step, and the time constant in optimizer steps; None where the facts say nothing, the rate changes or
        the optimizer is another.

    Example::

        >>> known = {"optimizer": "SGD", "learning_rate": 0.1, "constant_learning_rate": True}
        >>> angle, time = predicted_equilibrium({**known, "weight_decay": 0.01, "momentum": 0.9})
        >>> round(angle, 4), round(time)
        (0.0324, 50)

    """
    lr, decay, momentum = (number(facts, key) for key in ("learning_rate", "weight_decay", "momentum"))
    kind = facts.get("optimizer")
    if (
        facts.get("constant_learning_rate") is not True
        or kind not in ("SGD", "AdamW")
        or not (lr and decay)
        or momentum is None
        or not 0 <= momentum < 1
    ):
        return None
    if kind == "SGD":
        return math.sqrt(2 * lr * decay / (1 + momentum)), (1 - momentum) / (2 * lr * decay)
    return math.sqrt(2 * lr * decay * (1 - momentum) / (1 + momentum)), 1 / (2 * lr * decay)


def at_equilibrium(run: Measures) -> tuple[dict[int, float], float]:
    """The moving layers that turn by the predicted angle, after long enough and with a norm that stays.

    Args:
        run: what was measured of it.

    Returns:
        For each of them the root mean square of the angles of late steps, and the prediction, both in radians.

    """
    known, late = predicted_equilibrium(run.facts), last_part(run)
    if known is None or late is None or run.end - run.start < _TIMES * known[1]:
        return {}, math.nan
    predicted, (turned, grown) = known[0], late
    holds = (((turned / predicted - 1).abs() <= _NEAR) & (grown <= _SAME_NORM)).tolist()
    return {i: float(turned[i]) for i in run.moving if holds[i]}, predicted


def last_part(run: Measures) -> tuple[Tensor, Tensor] | None:
    """What each layer did over the last 20 % of a run.

    Args:
        run: what was measured of it.

    Returns:
        The root mean square of the angles of steps in radians, and by how much the logarithm of the norm changed, each
        of shape ``(layers,)``; None without a reading before.

    """
    before = int((run.steps <= run.start + _END * (run.end - run.start)).sum()) - 1
    if before < 0:
        return None
    squares = (run.squares[-1] - run.squares[before]) / (run.end - float(run.steps[before]))
    return squares.sqrt(), (run.norms[-1] / run.norms[before]).log().abs()
