"""The rows of a history: what a reading says of all layers, and what a reader asks of many of them."""

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

# For each quantity that was read one value a layer, in depth order.
Row = dict[str, list[float]]


def checked_layers(
    names: Sequence[str], shapes: Sequence[Sequence[int]] | None
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Names and shapes of the layers as lists; ``()`` for all shapes where there are none.

    Raises:
        TypeError: If the names are no sequence of texts.
        ValueError: If a name stands twice, or names and shapes differ in number.

    """
    # A text is a sequence of texts too, of one layer a letter.
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"`layer_names` must be a list of names, got {names!r}. Pass [name, …].")
    layer_names = list(names)
    if others := [name for name in layer_names if not isinstance(name, str)]:
        raise TypeError(f"`layer_names` must be text, got {others[0]!r}. Pass str(name) for each.")
    given: Sequence[Sequence[int]] = [()] * len(layer_names) if shapes is None else shapes
    layer_shapes = [tuple(int(n) for n in shape) for shape in given]
    duplicates = [name for name, count in Counter(layer_names).items() if count > 1]
    if duplicates:
        raise ValueError(f"`layer_names` must be unique, got {duplicates} more than once. Rename these layers.")
    if len(layer_shapes) != len(layer_names):
        raise ValueError(
            f"`layer_shapes` must have one shape for each of the {len(layer_names)} layers, "
            f"got {len(layer_shapes)}. Pass `()` where a shape is unknown."
        )
    return layer_names, layer_shapes


def checked_step(step: int, steps: Sequence[int]) -> int:
    """The step of a reading as an integer.

    Raises:
        ValueError: If it does not follow the last of the steps.

    """
    step = operator.index(step)
    if steps and step <= steps[-1]:
        raise ValueError(f"`step` must be larger than that of the last reading ({steps[-1]}), got {step}.")
    return step


def checked_row(reading: Mapping[str, Sequence[float]], layers: int) -> Row:
    """The values of a reading as lists of floats.

    Raises:
        ValueError: If a quantity has not one value for each of so many layers.

    """
    row = {name: [float(value) for value in values] for name, values in reading.items()}
    for name, values in row.items():
        if len(values) != layers:
            raise ValueError(f"`{name}` must have one value for each of the {layers} layers, got {len(values)}.")
    return row


def quantities(rows: Sequence[Row]) -> list[str]:
    """All quantities, in the order of their first reading."""
    return list(dict.fromkeys(quantity for row in rows for quantity in row))


def stacked(rows: Sequence[Row], quantity: str, layers: int) -> Tensor:
    """One quantity as a float64 tensor ``(rows, layers)``; NaN in rows without it.

    Raises:
        ValueError: If there are rows and none of them has it.

    """
    if rows and quantity not in quantities(rows):
        raise ValueError(f"`quantity` must be one of {quantities(rows)}, got {quantity!r}.")
    missing = [math.nan] * layers
    values = [row.get(quantity, missing) for row in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(len(rows), layers)


def last_defined(rows: Sequence[Row], quantity: str, names: Sequence[str]) -> dict[str, float]:
    """Each layer's last value of a quantity that is not NaN; NaN for a layer that has none."""
    last = dict.fromkeys(names, math.nan)
    for row in rows:
        for name, value in zip(names, row.get(quantity, ()), strict=False):
            if not math.isnan(value):
                last[name] = value
    return last


def rearranged(row: Row, names: Sequence[str], new_names: Sequence[str]) -> Row:
    """A reading of some layers as one of others: NaN for those that it does not know."""
    place = {name: i for i, name in enumerate(names)}
    return {q: [values[place[n]] if n in place else math.nan for n in new_names] for q, values in row.items()}


def frame(steps: Sequence[int], rows: Sequence[Row], names: Sequence[str]) -> "pd.DataFrame":
    """A tidy table with a row for each step, layer and quantity whose value is defined."""
    import pandas as pd

    tidy = [
        (step, name, depth, quantity, value)
        for step, row in zip(steps, rows, strict=True)
        for quantity, values in row.items()
        for depth, (name, value) in enumerate(zip(names, values, strict=True))
        if not math.isnan(value)
    ]
    return pd.DataFrame(tidy, columns=["step", "layer", "depth", "quantity", "value"])
