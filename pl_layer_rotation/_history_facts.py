"""The facts of a run as plain data: numbers, text, lists and mappings, which every file and page can hold."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    """Facts as JSON can hold them: NumPy's and torch's scalars as numbers, paths as text; what is neither as it is.

    Example::

        >>> import pathlib
        >>> plain({"lr": Tensor([0.5]), "data": pathlib.PurePosixPath("a/b"), "betas": (0.9, 0.99)})
        {'lr': 0.5, 'data': 'a/b', 'betas': (0.9, 0.99)}

    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # NumPy is no dependency, and its arrays and numbers are asked by the same names.
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        size = value.numel() if isinstance(value, Tensor) else getattr(value, "size", 0)
        return value.item() if size == 1 else copy.deepcopy(value)
    return copy.deepcopy(value)


def strictly_plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as :func:`plain` makes them, where that leaves nothing that JSON cannot hold.

    Raises:
        ValueError: If a fact is anything else, with its name.

    """
    made: dict[str, Any] = plain(facts)
    _check(made, "")
    return made


def _check(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int, float)) and key is not None:
                raise _refused(f"a key of type {type(key).__name__}", name)
            _check(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check(item, name)
    elif not isinstance(value, (str, int, float)) and value is not None:
        raise _refused(type(value).__name__, name)


def _refused(what: str, name: str) -> ValueError:
    return ValueError(
        f"`facts` must hold numbers, text, None, lists and mappings, got {what} in {name!r}. "
        "Convert it, or leave it out."
    )
