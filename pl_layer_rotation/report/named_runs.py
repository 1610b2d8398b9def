"""What several runs may be handed over as: histories under the names that readers see."""

import copy
from collections.abc import Mapping
from typing import Any

from pl_layer_rotation._history_facts import strictly_plain
from pl_layer_rotation.history import RotationHistory


def named_runs(histories: Mapping[str, RotationHistory]) -> dict[str, RotationHistory]:
    """The histories, with facts that a page can hold; the readings are not copied.

    Raises:
        TypeError: If it is no mapping from text to histories.
        ValueError: If a fact is none of numbers, text, None, lists and mappings.

    Example::

        >>> named_runs({"run": RotationHistory(["fc"])})
        {'run': RotationHistory(1 layers, 0 readings)}

    """
    if not isinstance(histories, Mapping):
        raise TypeError(
            f"`histories` must be a mapping from names to histories, got {type(histories).__name__}. "
            "Pass {name: history}."
        )
    runs = {}
    for name, history in histories.items():
        if not isinstance(name, str):
            raise TypeError(f"`histories` must have names that are text, got {name!r}. Pass {{str(name): history}}.")
        if not isinstance(history, RotationHistory):
            raise TypeError(
                f"`histories` must hold histories, got {type(history).__name__} for {name!r}. Pass {{name: history}}."
            )
        # A copy that shares everything but the facts.
        runs[name] = copy.copy(history)
        runs[name].facts = strictly_plain(history.facts)
    return runs


def check_history(history: Any, argument: str = "history") -> None:
    """Raise unless it is a history.

    Raises:
        TypeError: Naming the argument.

    """
    if not isinstance(history, RotationHistory):
        raise TypeError(
            f"`{argument}` must be a RotationHistory, got {type(history).__name__}. "
            "Pass `monitor.history` or `RotationHistory.load(path)`; several as arguments of their own."
        )
