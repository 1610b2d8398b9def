"""Rotation rates from the length of a training."""

import math

from pl_layer_rotation._numbers import is_number


def rotation_lr(steps: int, momentum: float = 0.0, *, distance: float | None = None) -> float:
    r"""A learning rate for :class:`~pl_layer_rotation.Layca` from the number of optimizer steps.

    Without ``distance`` it is :math:`\frac{1}{9} \min(1, (1000/T)^{1/3}) / \sqrt{c}` with the momentum factor
    :math:`c = (1 + b) / (1 - b)`, which stands for how momentum keeps successive steps parallel. On MLPs and
    convolutional networks of 100 … 2400 steps under a cosine schedule its regret was 0.25 points of accuracy on
    average over 17 sweeps and 1.2 at worst (3⁻³ for all bases: 0.39 and 2.1), judged on the runs that it was chosen
    on. **It does not hold for transformers**: on a small character GPT the best rate was about six times lower, and
    this one cost 0.14 to 0.32 nats. The cube root changes nothing on these runs: it was chosen with the paper's two
    published sweeps (35,200 steps) in view and is not tested beyond them.

    With ``distance`` it is the constant rate at which a random walk with that momentum has this expected cosine
    distance after T steps, :math:`1 - (1 + c\, \mathrm{lr}^2)^{-T/2}`. In four trainings under a cosine schedule the
    mean of the hidden layers ended from 0.09 below to 0.01 above such a walk. A distance is no quality mark: aiming at
    0.95 had a regret of 0.9 points on average and of 10 at worst.

    Args:
        steps: optimizer steps T of the whole training.
        momentum: SGD's momentum or Adam's β₁; the default is that of plain SGD, Layca's default base.
        distance: cosine distance in (0, 1) that a random walk is expected to reach.

    Returns:
        The rate, the tangent of the angle of one step.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> round(rotation_lr(600, momentum=0.9), 4)
        0.0255
        >>> round(rotation_lr(10_000, distance=0.95), 4)
        0.0245

    """
    if not is_number(steps) or not 1 <= steps < math.inf:
        raise ValueError(f"`steps` must be finite and at least 1, got {steps!r}. Pass the steps of the whole training.")
    if not is_number(momentum) or not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be at least 0 and below 1, got {momentum!r}. Pass SGD's momentum or beta1.")
    if distance is not None and (not is_number(distance) or not 0 < distance < 1):
        raise ValueError(
            f"`distance` must be between 0 and 1 (not included), got {distance!r}. "
            "A random walk ends at right angles, at 1."
        )
    factor = (1 + momentum) / (1 - momentum)
    if distance is None:
        return min(1.0, math.pow(1000 / steps, 1 / 3)) / (9 * math.sqrt(factor))
    # expm1 and log1p: 1 - distance to the power of 2 / steps is 1 up to round-off for long trainings.
    return math.sqrt(math.expm1(-2 / steps * math.log1p(-distance)) / factor)
