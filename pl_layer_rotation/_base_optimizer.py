"""The optimizer that gives Layca its direction: found by name, its options checked."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_SAME_DIRECTION = 1e-4  # radians: usable bases differ by 2e-11, the others by 4e-3 and more

BaseOptimizer = type[Optimizer] | str | Callable[[Iterable[Any]], Optimizer]


def resolve_base(base: BaseOptimizer, options: Mapping[str, Any]) -> Callable[[Any], Optimizer]:
    """A function from groups to the base optimizer, its options checked by name."""
    if isinstance(base, str):
        names = [name for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and kind is not Optimizer]
        if base not in names:
            near = difflib.get_close_matches(base, names, n=3, cutoff=0.4) or ["SGD", "AdamW"]
            raise ValueError(
                f"`base` must name an optimizer of torch.optim, got {base!r}. Similar names: "
                f"{', '.join(map(repr, near))}."
            )
        base = getattr(torch.optim, base)
    if not callable(base):
        raise TypeError(
            f"`base` must be an optimizer class, its name or a function from parameters to an optimizer, got {base!r}. "
            "Pass for instance `torch.optim.AdamW`."
        )
    name = getattr(base, "__name__", repr(base))
    accepted = inspect.signature(base).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        for option, value in options.items():
            if option not in accepted:
                own = [known for known in accepted if known not in ("params", "lr")]
                raise TypeError(
                    f"`{option}` must be an option of the base optimizer {name}, got {option}={value!r}. "
                    f"Its options are {', '.join(own)}."
                )
    if options.get("differentiable"):
        raise ValueError("`differentiable` must be False, got True. Layca changes the weights in place.")
    required: dict[str, Any] = (
        {"lr": 1.0} if "lr" in accepted and accepted["lr"].default is inspect.Parameter.empty else {}
    )

    def make(params: Any) -> Optimizer:
        made = base(params, **required, **options)
        if not isinstance(made, Optimizer):
            raise TypeError(f"`base` must make a torch optimizer, got {made!r} from {name}. Return the optimizer.")
        return made

    return make


def run_step(optimizer: Optimizer) -> None:
    """The optimizer's step as its class wrote it, without hooks: global step hooks must see Layca's step only."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


def check_direction(make_base: Callable[[Any], Optimizer], options: Mapping[str, Any]) -> None:
    """Refuse a base whose direction depends on the weights, which it never sees: it steps zeros in their place.

    Four steps on a small matrix: the tangential part of the base's step must be the same from the weights and from
    zeros. Schedule-free methods, Prodigy and the like fail; a base that cannot take these steps at all (it wants other
    shapes or devices) is left to show that itself.

    Raises:
        ValueError: If the directions differ by more than 1e-4 rad, or the base needs a closure or sparse gradients.

    """
    generator = torch.Generator().manual_seed(0)
    weights, *gradients = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(5))
    real, stand_in = nn.Parameter(weights.clone()), nn.Parameter(torch.zeros_like(weights))
    worst, name = 0.0, "the base"
    try:
        bases = [make_base([{**options, "params": [tensor]}]) for tensor in (real, stand_in)]
        name = type(bases[0]).__name__
        for base, lr in zip(bases, (1e-3, 1.0), strict=True):
            base.param_groups[0].update(
                {"lr": lr, **({"weight_decay": 0.0} if "weight_decay" in base.defaults else {})}
            )
        if isinstance(bases[0], (torch.optim.LBFGS, torch.optim.SparseAdam)):
            worst = math.inf
        for gradient in gradients if not worst else ():
            directions = []
            for base, tensor, start in zip(bases, (real, stand_in), (weights, torch.zeros_like(weights)), strict=True):
                tensor.data.copy_(start)
                tensor.grad = gradient.clone()
                with torch.no_grad():
                    run_step(base)
                directions.append(_tangential(tensor.detach() - start, weights))
            worst = max(worst, 2 * math.asin(min(1.0, float((directions[0] - directions[1]).norm()) / 2)))
    except Exception:
        return
    if worst > _SAME_DIRECTION:
        raise ValueError(
            f"`base` must give a direction that depends on gradients alone, got {name}, which needs the weights, a "
            "closure or sparse gradients. Use for instance SGD, AdamW, RMSprop or Adagrad."
        )


def _tangential(step: Tensor, weights: Tensor) -> Tensor:
    part = step - (step * weights).sum() / weights.square().sum() * weights
    norm = part.norm()
    return part / norm if norm > 0 else part
