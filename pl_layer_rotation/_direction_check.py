"""Whether an optimizer can be the base of Layca: its direction must come from gradients alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_layer_rotation._base_optimizer import run_step

_SAME_DIRECTION = 1e-4  # radians: usable bases differ by 2e-11, the others by 4e-3 and more


def check_direction(make_base: Callable[[Any], Optimizer], options: Mapping[str, Any]) -> None:
    """Refuse a base whose direction depends on the weights, which it never sees: it steps zeros in their place.

    Eight steps on a small matrix that moves, small and as large as the base's own: the tangential part of each must be
    that of a step from zeros. Methods that average the weights, or measure how far they have come, differ once the
    weights moved on by more than round-off, and only if gradients agree with each other. A base that cannot take these
    steps at all (it wants other shapes or devices) is left to show that itself.

    Raises:
        ValueError: If the directions differ by more than 1e-4 rad, or the base needs a closure or sparse gradients.

    """
    generator = torch.Generator().manual_seed(0)
    weights, trend, *noise = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(10))
    gradients = [0.7 * trend + 0.3 * random for random in noise]
    refused, name = False, "the base"
    for lr in (1e-3, None):
        real, stand_in = nn.Parameter(weights.clone()), nn.Parameter(torch.zeros_like(weights))
        try:
            bases = [make_base([{**options, "params": [tensor]}]) for tensor in (real, stand_in)]
        except Exception:
            return
        name = type(bases[0]).__name__
        for base, rate in zip(bases, (lr, 1.0), strict=True):
            group = base.param_groups[0]
            if rate is not None:
                group["lr"] = rate
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        try:
            refused |= isinstance(bases[0], (torch.optim.LBFGS, torch.optim.SparseAdam)) or any(
                _apart(bases, real, stand_in, gradient) > _SAME_DIRECTION for gradient in gradients
            )
        except Exception:
            refused |= _needs_closure(make_base, options)
    if refused:
        raise ValueError(
            f"`base` must give a direction that depends on gradients alone, got {name}, which needs the weights, a "
            "closure or sparse gradients. Use for instance SGD, AdamW, RMSprop or Adagrad."
        )


def _apart(bases: Sequence[Optimizer], real: Tensor, stand_in: Tensor, gradient: Tensor) -> float:
    """Angle between the tangential parts of one step of moving weights and one from zero."""
    start = real.detach().clone()
    stand_in.data.zero_()
    for base, tensor in zip(bases, (real, stand_in), strict=True):
        tensor.grad = gradient.clone()
        with torch.no_grad():
            run_step(base)
    apart = _tangential(real.detach() - start, start) - _tangential(stand_in.detach().clone(), start)
    return 2 * math.asin(min(1.0, float(apart.norm()) / 2))


def _needs_closure(make_base: Callable[[Any], Optimizer], options: Mapping[str, Any]) -> bool:
    """Whether a base that failed to step would step with a closure."""
    tensor = nn.Parameter(torch.ones(4, 6, dtype=torch.float64))
    tensor.grad = torch.ones_like(tensor)

    def closure() -> Tensor:
        tensor.grad = torch.ones_like(tensor)
        return torch.ones(())

    try:
        base = make_base([{**options, "params": [tensor]}])
        with torch.no_grad():
            run_step(base, closure)
    except Exception:
        return False
    return True


def _tangential(step: Tensor, weights: Tensor) -> Tensor:
    part = step - (step * weights).sum() / weights.square().sum() * weights
    norm = part.norm()
    return part / norm if norm > 0 else part
