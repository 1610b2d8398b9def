"""The recorded curves of one run: plain data, and the file that holds them."""

import copy
import json
import math
import operator
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pl_layer_rotation._thinning import Thinning

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from pl_layer_rotation.report.findings import Finding
    from pl_layer_rotation.report.suggestion import RateSuggestion

_FORMAT = "pl-layer-rotation history"
_VERSION = 1
_NOT_FINITE = frozenset({"nan", "inf", "-inf"})
_KEY_LENGTH = 100  # characters of a layer's name in a logged key: some loggers make file names of them


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
        # Through the encoded form, where an unmeasured value equals itself (NaN does not).
        return isinstance(other, RotationHistory) and _encode(self._content()) == _encode(other._content())

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
        lines = [{"format": _FORMAT, "version": _VERSION, **content}, *rows]
        write_text(path, "".join(_encode(line) + "\n" for line in lines))

    def save_last_row(self, path: str | os.PathLike[str]) -> None:
        """Add the last reading to a file that :meth:`save` wrote, without writing the others again.

        Should the process be killed meanwhile, :meth:`load` leaves out the line that was cut.

        Args:
            path: the file; it must hold the readings before the last, of the same layers.

        """
        line = _encode({"step": self.steps[-1], **self._rows[-1]}) + "\n"
        with open(path, "a", encoding="utf-8", newline="\n") as stream:
            stream.write(line)

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
            warnings.warn(f"The last reading in {file} was cut while it was written and is left out.", stacklevel=2)
        try:
            facts = _restored(header["facts"], in_row=False)
            rows = [_restored(_decode(line), in_row=True) for line in rest]
            if not all(isinstance(layer["name"], str) for layer in header["layers"]):
                raise TypeError("a layer's name is no text")
            return cls.from_state_dict({"layers": header["layers"], "facts": facts, "rows": rows})
        except (ValueError, KeyError, TypeError) as error:
            raise _foreign(file, f"it is damaged: {error}") from error

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


def log_keys(layer_names: Sequence[str], quantity: str = "rotation") -> list[str]:
    """Names under which loggers get one quantity of each layer, such as ``layer_rotation/007_block_conv1``.

    The zero-padded depth keeps them unique and makes alphabetical order depth order; every character that a logger
    could trip over (W&B splits names at dots, a slash opens a section) becomes an underscore.

    Args:
        layer_names: names in depth order.
        quantity: what is logged.

    Example::

        >>> log_keys(["stem.conv", "fc"])
        ['layer_rotation/000_stem_conv', 'layer_rotation/001_fc']

    """
    digits = max(3, len(str(len(layer_names) - 1)))
    return [
        f"layer_{quantity}/{depth:0{digits}d}_{re.sub('[^0-9A-Za-z_]+', '_', name)[:_KEY_LENGTH]}"
        for depth, name in enumerate(layer_names)
    ]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        # mkstemp makes private files; a report is meant to be read like any other file in the folder.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _foreign(file: Path, why: str) -> ValueError:
    return ValueError(
        f"`path` must be a file written by `RotationHistory.save`, got {file}, but {why}. Pass another file."
    )


def _encode(value: Any) -> str:
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
