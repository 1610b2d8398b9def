"""Checks of the monitor's arguments; those of the weights to measure from are in ``_reference``."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException

from pl_layer_rotation._numbers import is_count

QUANTITIES = ("rotation", "angular_update", "norm_ratio", "straightness")
# What an argument may be, and what to know of the choice.
_CHOICES: dict[str, tuple[tuple[Any, ...], str]] = {
    "reference_device": (("same", "cpu"), "'cpu' spares the accelerator."),
    "save_reference": ((True, False), "False keeps checkpoints small."),
    "report": ((True, False, "wandb"), "'wandb' puts the page into the W&B run too."),
    "angular_update": (
        (True, False, "auto"),
        "'auto' reads angles where a copy of the layers takes no more than 1 GB.",
    ),
}


def check_choices(**arguments: Any) -> None:
    """Raise unless each of these arguments is one of its choices, in the order given.

    Raises:
        MisconfigurationException: Naming the first that is not.

    """
    for argument, value in arguments.items():
        choices, mend = _CHOICES[argument]
        if value not in choices:
            listed = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
            raise MisconfigurationException(f"`{argument}` must be {listed}, got {value!r}. {mend}")


def check_every_n_steps(every_n_steps: Any) -> None:
    """Raise unless it is a cadence.

    Raises:
        MisconfigurationException: If it is neither None nor a positive integer.

    """
    if every_n_steps is not None and not is_count(every_n_steps, least=1):
        raise MisconfigurationException(
            f"`every_n_steps` must be an integer of at least 1 or None, got {every_n_steps!r}. "
            "None follows the trainer's `log_every_n_steps`."
        )


def checked_log_quantities(log_quantities: Any) -> tuple[str, ...]:
    """What loggers get of each layer.

    Raises:
        MisconfigurationException: If it is no list of known quantities.

    """
    is_list = isinstance(log_quantities, Iterable) and not isinstance(log_quantities, (str, Mapping))
    listed = list(log_quantities) if is_list else log_quantities
    if not is_list or any(quantity not in QUANTITIES for quantity in listed):
        raise MisconfigurationException(
            f"`log_quantities` must be a list out of {', '.join(QUANTITIES)}, got {listed!r}. "
            "Pass for instance `log_quantities=['rotation', 'norm_ratio']`."
        )
    return tuple(listed)
