"""The recorded curves of one run: plain data, and the file that holds them."""

import copy
import math
import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pl_layer_rotation import _history_file
from pl_layer_rotation._thinning import Thinning

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from pl_layer_rotation.report.findings import Finding
    from pl_layer_rotation.report.suggestion import RateSuggestion


class RotationHistory:
    """Values by step and layer, with the facts of the run that they come from.

    A history is plain data: it knows no trainer and no module, pickles, and goes into a checkpoint as the dictionary
    that :meth:`state_dict` returns. Layers are in depth order. The quantities that
    :class:`~pl_layer_rotation.LayerRotationMonitor` records are

    - ``rotation``: cosine distance between a layer's weights and their reference, 0 … 2;
    - ``angular_update``: angle by which the last optimizer step turned the layer, in radians;
    - ``norm_ratio``: norm of the weights over the norm of the reference.

    Args:
        layer_names: names of the layers in depth order, each once.
        layer_shapes: shape of each layer's weights; ``()`` where unknown.
        facts: what else is known of the run (optimizer, learning rate, devices, …); values that JSON can hold.

    Raises:
        ValueError: If a name stands twice, or names and shapes differ in number.

    Example::

        >>> history = RotationHistory(["conv", "fc"], [(8, 1, 3, 3), (10, 8)])
        >>> history.append(10, rotation=[0.01, 0.02], norm_ratio=[1.0, 1.1])
        >>> history.append(20, rotation=[0.03, 0.05])
        >>> history.steps
        [10, 20]
        >>> history.values("rotation")
        tensor([[0.0100, 0.0200],
                [0.0300, 0.0500]], dtype=torch.float64)
        >>> history.values("norm_ratio")[1]
        tensor([nan, nan], dtype=torch.float64)
        >>> history.final("rotation")
        {'conv': 0.03, 'fc': 0.05}

    """

    def __init__(
        self,
        layer_names: Sequence[str],
        layer_shapes: Sequence[Sequence[int]] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.layer_names = list(layer_names)
        shapes: Sequence[Sequence[int]] = [()] * len(self.layer_names) if layer_shapes is None else layer_shapes
        self.layer_shapes = [tuple(int(n) for n in shape) for shape in shapes]
        self.facts: dict[str, Any] = dict(facts or {})
        self.steps: list[int] = []
        self._rows: list[dict[str, list[float]]] = []
        self._thinning: Thinning | None = None
        duplicates = [name for name, count in Counter(self.layer_names).items() if count > 1]
        if duplicates:
            raise ValueError(f"`layer_names` must be unique, got {duplicates} more than once. Rename these layers.")
        if len(self.layer_shapes) != len(self.layer_names):
            raise ValueError(
                f"`layer_shapes` must have one shape for each of the {len(self.layer_names)} layers, "
                f"got {len(self.layer_shapes)}. Pass `()` where a shape is unknown."
            )

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layer_names)} layers, {len(self)} readings)"

    def _repr_html_(self) -> str:
        """What a notebook shows (see ``pl_layer_rotation.report.notebook``)."""
        from pl_layer_rotation.report.notebook import notebook_html

        return notebook_html(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RotationHistory):
            return False
        # Through the encoded form, where an unmeasured value equals itself (NaN does not).
        return _history_file.encode(self._content()) == _history_file.encode(other._content())

    __hash__ = None  # type: ignore[assignment]  # mutable

    @property
    def quantities(self) -> list[str]:
        """Names of the recorded quantities, in the order of their first reading."""
        return list(dict.fromkeys(quantity for row in self._rows for quantity in row))

    def append(self, step: int, **quantities: Sequence[float]) -> None:
        """Add the values of one reading.

        Args:
            step: optimizer steps done; larger than that of the last reading.
            **quantities: for each quantity one value a layer, in the order of ``layer_names``; NaN where undefined.

        Raises:
            ValueError: If ``step`` does not follow the last one, or a quantity has another length.

        """
        step = operator.index(step)
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"`step` must be larger than that of the last reading ({self.steps[-1]}), got {step}.")
        row = {name: [float(value) for value in values] for name, values in quantities.items()}
        for name, values in row.items():
            if len(values) != len(self.layer_names):
                raise ValueError(
                    f"`{name}` must have one value for each of the {len(self.layer_names)} layers, got {len(values)}."
                )
        self.steps.append(step)
        self._rows.append(row)
        if self._thinning is not None:
            self._keep(self._thinning.append())

    def keep_at_most(self, readings: int) -> None:
        """Bound the memory: of more readings than this, keep every second, then every fourth, and so on, and the last.

        Args:
            readings: the bound.

        Raises:
            ValueError: If the bound is smaller than 2.

        Example::

            >>> history = RotationHistory(["fc"])
            >>> history.keep_at_most(4)
            >>> for step in range(10, 100, 10):
            ...     history.append(step, rotation=[step / 1000])
            >>> history.steps
            [10, 50, 90]

        """
        if readings < 2:
            raise ValueError(f"`readings` must be at least 2, for the first and the last, got {readings}.")
        rows, steps = self._rows, self.steps
        self._thinning, self.steps, self._rows = Thinning(readings), [], []
        for step, row in zip(steps, rows, strict=True):
            self.steps.append(step)
            self._rows.append(row)
            self._keep(self._thinning.append())

    @property
    def readings(self) -> int:
        """Readings that were added in all, also those that were thinned out."""
        return len(self) if self._thinning is None else self._thinning.readings

    @property
    def thinned_to(self) -> int:
        """Of so many readings one is kept, see :meth:`keep_at_most`."""
        return 1 if self._thinning is None else self._thinning.every

    def _keep(self, rows: list[int] | None) -> None:
        if rows is not None:
            self.steps = [self.steps[row] for row in rows]
            self._rows = [self._rows[row] for row in rows]

    def drop_from(self, step: int) -> None:
        """Forget the readings at this step and later ones: training has gone back there."""
        keep = sum(known < step for known in self.steps)
        del self.steps[keep:], self._rows[keep:]
        if self._thinning is not None:
            self._thinning.cut(keep)

    def values(self, quantity: str) -> Tensor:
        """All readings of one quantity.

        Args:
            quantity: one of :attr:`quantities`.

        Returns:
            float64 tensor of shape ``(steps, layers)``; NaN where it was not measured or is undefined.

        Raises:
            ValueError: If there are readings and none of them holds this quantity.

        """
        if self._rows and quantity not in self.quantities:
            raise ValueError(f"`quantity` must be one of {self.quantities}, got {quantity!r}.")
        missing = [math.nan] * len(self.layer_names)
        rows = [row.get(quantity, missing) for row in self._rows]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(self.layer_names))

    def final(self, quantity: str = "rotation") -> dict[str, float]:
        """Each layer's last defined value of a quantity; NaN for a layer that has none."""
        last = dict.fromkeys(self.layer_names, math.nan)
        for row in self._rows:
            for name, value in zip(self.layer_names, row.get(quantity, ()), strict=False):
                if not math.isnan(value):
                    last[name] = value
        return last

    def reindex(self, layer_names: Sequence[str], layer_shapes: Sequence[Sequence[int]]) -> "RotationHistory":
        """The same readings for another list of layers: NaN for new ones, vanished ones left out."""
        new = RotationHistory(layer_names, layer_shapes, self.facts)
        column = {name: i for i, name in enumerate(self.layer_names)}
        for step, row in zip(self.steps, self._rows, strict=True):
            new.append(
                step,
                **{q: [v[column[n]] if n in column else math.nan for n in new.layer_names] for q, v in row.items()},
            )
        new._thinning = copy.deepcopy(self._thinning)
        return new

    def state_dict(self) -> dict[str, Any]:
        """The history as lists, strings and numbers, safe for ``torch.load(..., weights_only=True)``."""
        thinning = {} if self._thinning is None else {"thinning": self._thinning.state_dict()}
        return {**self._content(), **thinning}

    def _content(self) -> dict[str, Any]:
        return {
            "layers": [{"name": n, "shape": list(s)} for n, s in zip(self.layer_names, self.layer_shapes, strict=True)],
            "facts": copy.deepcopy(self.facts),
            "rows": [{"step": step, **row} for step, row in zip(self.steps, self._rows, strict=True)],
        }

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "RotationHistory":
        """The history that :meth:`state_dict` described."""
        layers = state_dict["layers"]
        history = cls([layer["name"] for layer in layers], [layer["shape"] for layer in layers], state_dict["facts"])
        for row in state_dict["rows"]:
            history.append(**row)
        if "thinning" in state_dict:
            history._thinning = Thinning.from_state_dict(state_dict["thinning"])
        return history

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history as JSON Lines: a header, then one line a reading. The file appears whole or not at all.

        Args:
            path: the file; its folder is made if it does not exist.

        Example::

            >>> import tempfile, pathlib
            >>> history = RotationHistory(["fc"], [(2, 2)], {"lr": 0.1})
            >>> history.append(1, rotation=[0.25])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = pathlib.Path(folder, "run.jsonl")
            ...     history.save(file)
            ...     RotationHistory.load(file) == history
            True

        """
        content = self._content()
        rows = content.pop("rows")
        _history_file.write(path, content, rows)

    def save_last_row(self, path: str | os.PathLike[str]) -> None:
        """Add the last reading to a file that :meth:`save` wrote, without writing the others again.

        Should the process be killed meanwhile, :meth:`load` leaves out the line that was cut.

        Args:
            path: the file; it must hold the readings before the last, of the same layers.

        """
        _history_file.add_row(path, {"step": self.steps[-1], **self._rows[-1]})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RotationHistory":
        """Read a file that :meth:`save` wrote.

        Where its last line was cut, because the run was killed while it wrote, that reading is left out with a warning.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is none of ours, was damaged, or comes from a newer version of the package.

        """
        return _history_file.read(path, cls.from_state_dict)

    def to_pandas(self) -> "pd.DataFrame":
        """The readings as a tidy table: one row for each step, layer and quantity that has a value.

        Returns:
            Columns ``step``, ``layer``, ``depth``, ``quantity`` and ``value``.

        Raises:
            ModuleNotFoundError: If pandas is not installed.

        """
        import pandas as pd

        rows = [
            (step, name, depth, quantity, value)
            for step, row in zip(self.steps, self._rows, strict=True)
            for quantity, values in row.items()
            for depth, (name, value) in enumerate(zip(self.layer_names, values, strict=True))
            if not math.isnan(value)
        ]
        return pd.DataFrame(rows, columns=["step", "layer", "depth", "quantity", "value"])

    def figure(self, quantity: str = "rotation") -> "go.Figure":
        """Plotly figure of one quantity's curves, coloured by depth (see ``pl_layer_rotation.report.figures``)."""
        from pl_layer_rotation.report.figures import curves

        return curves(self, quantity)

    def findings(self) -> "list[Finding]":
        """What the curves say in plain words, most urgent first (see ``pl_layer_rotation.report.findings``).

        Example::

            >>> history = RotationHistory(["conv", "fc"])
            >>> history.append(100, rotation=[0.1, 0.0], norm_ratio=[1.1, 1.0])
            >>> [(finding.code, finding.layers) for finding in history.findings()]
            [('A', ('fc',))]

        """
        from pl_layer_rotation.report.findings import findings

        return findings(self)

    def suggest_lr(self, *others: "RotationHistory") -> "RateSuggestion":
        """The learning rate to try next, from how straight the layers moved (how well that does: ``docs/tuning.md``).

        Args:
            *others: histories of runs that differ in the learning rate alone, each stopped after the same steps.

        """
        from pl_layer_rotation.report.suggestion import suggest_lr

        return suggest_lr(self, *others)
