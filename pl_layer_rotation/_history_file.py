"""The file of a history: JSON Lines, a header and then one line a reading."""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pl_layer_rotation._text_file import write_text

_FORMAT = "pl-layer-rotation history"
_VERSION = 1
_NOT_FINITE = frozenset({"nan", "inf", "-inf"})
_History = TypeVar("_History")


def write(path: str | os.PathLike[str], header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a whole file, in the place of one that is there.

    Args:
        path: the file; its folder is made if it does not exist.
        header: what is known of the run as a whole.
        rows: the readings, each with its ``step``.

    """
    lines = [{"format": _FORMAT, "version": _VERSION, **header}, *rows]
    write_text(path, "".join(encode(line) + "\n" for line in lines))


def add_row(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Add a reading to the end of a file.

    Raises:
        FileNotFoundError: If there is no such file: a new one would have no header.

    """
    line = encode(row) + "\n"
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"`path` must be a file that `save` wrote, got {os.fspath(path)}, which does not exist. Call `save` first."
        )
    with open(path, "a", encoding="utf-8", newline="\n") as stream:
        stream.write(line)


def read(path: str | os.PathLike[str], make: Callable[[Mapping[str, Any]], _History]) -> _History:
    """Read a file.

    Args:
        path: the file.
        make: makes the history of its ``layers``, ``facts`` and ``rows``; what it refuses is a damaged file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of ours, was damaged, or comes from a newer version of the package.

    """
    file = Path(path)
    try:
        with file.open(encoding="utf-8") as stream:
            if stream.read(1) != "{":
                raise ValueError("no JSON object")  # before gigabytes of a checkpoint are read
        # Not `splitlines`, which also cuts at the exotic line ends that a layer's name may hold.
        first, *rest = file.read_text(encoding="utf-8").split("\n")
        cut = rest.pop() if rest else ""
        header = _decode(first)
        known = header["format"] == _FORMAT
        version = int(header["version"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _foreign(file, "it has no header of ours") from error
    if not known:
        raise _foreign(file, f"its format is {header['format']!r}")
    if version > _VERSION:
        raise ValueError(
            f"`path` must be a history of format version {_VERSION} or older, got version {version} in {file}. "
            "Upgrade pl-layer-rotation."
        )
    if cut:
        # Shown at the line that called `RotationHistory.load`.
        warnings.warn(f"The last reading in {file} was cut while it was written and is left out.", stacklevel=3)
    try:
        facts = _restored(header["facts"], in_row=False)
        rows = [_restored(_decode(line), in_row=True) for line in rest]
        if not all(isinstance(layer["name"], str) for layer in header["layers"]):
            raise TypeError("a layer's name is no text")
        return make({"layers": header["layers"], "facts": facts, "rows": rows})
    except (ValueError, KeyError, TypeError) as error:
        raise _foreign(file, f"it is damaged: {error}") from error


def _foreign(file: Path, why: str) -> ValueError:
    return ValueError(
        f"`path` must be a file written by `RotationHistory.save`, got {file}, but {why}. "
        "Pass the `layer_rotation.jsonl` in the folder of the logs."
    )


def encode(value: Any) -> str:
    """Strict JSON: null for a missing value of a layer, the words of `_NOT_FINITE` for other floats that JSON lacks."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(value: Any, in_row: bool = False) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if in_row and math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item, "step" in value) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, in_row) for item in value]
    return value


def _decode(line: str) -> dict[str, Any]:
    decoded = json.loads(line)
    if not isinstance(decoded, dict):
        raise ValueError(f"line is no JSON object: {line[:40]!r}")
    return decoded


def _restored(value: Any, in_row: bool) -> Any:
    """What `_finite` made strict, with its floats as they were."""
    if isinstance(value, dict):
        return {key: _restored(item, in_row) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item, in_row) for item in value]
    if value is None and in_row:
        return math.nan
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value
