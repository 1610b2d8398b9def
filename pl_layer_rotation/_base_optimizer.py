"""The optimizer that gives Layca its direction: found by name, its options checked."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

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
