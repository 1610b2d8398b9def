"""The recorded curves of one run: plain data, and the file that holds them."""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pl_layer_rotation import _history_facts, _history_file, _history_rows
from pl_layer_rotation._history_rows import Row
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
    - ``norm_ratio``: norm of the weights over the norm of the reference;
    - ``angular_update``: angle by which the optimizer step of the reading turned the layer, in radians;
    - ``straightness``: how the way from the reference compares with a random walk of the same steps, which has 1;
    - ``path``: sum of the angles of all steps so far, in radians;
    - ``path_square``: sum of their squares, in radians²;
    - ``peak``: largest of these angles, in radians;
    - ``peak_step``: optimizer steps done when it was read;
    - ``requested_angle``: angle that Layca's learning rate asked for in that step, in radians.

    Where no angles are read there are the first two alone; without the fact ``momentum`` there is no ``straightness``.

    Args:
        layer_names: names of the layers in depth order, each once.
        layer_shapes: shape of each layer's weights; ``()`` where unknown.
        facts: what else is known of the run (optimizer, learning rate, devices, …): numbers, text, None, lists and
            mappings. Scalars of NumPy and torch become numbers, paths text.

    Raises:
        TypeError: If the names are no sequence of texts.
        ValueError: If a name stands twice, or names and shapes differ in number.

    Example::

        >>> history = RotationHistory(["conv", "fc"], [(8, 1, 3, 3), (10, 8)])
        >>> history.append(10, rotation=[0.01, 0.02], norm_ratio=[1.0, 1.1])
        >>> history.append(20, rotation=[0.03, 0.05])
        >>> history.steps, history.quantities
        ([10, 20], ['rotation', 'norm_ratio'])
        >>> history.values("rotation")
        tensor([[0.0100, 0.0200],
                [0.0300, 0.0500]], dtype=torch.float64)
        >>> history.values("norm_ratio")[1]
        tensor([nan, nan], dtype=torch.float64)
        >>> history.final("norm_ratio")
        {'conv': 1.0, 'fc': 1.1}

    """

    def __init__(
        self,
        layer_names: Sequence[str],
        layer_shapes: Sequence[Sequence[int]] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.layer_names, self.layer_shapes = _history_rows.checked_layers(layer_names, layer_shapes)
        self.facts: dict[str, Any] = _history_facts.plain(facts or {})
        self.steps: list[int] = []
        self._rows: list[Row] = []
        self._thinning: Thinning | None = None

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
        return _history_rows.quantities(self._rows)

    def append(self, step: int, **quantities: Sequence[float]) -> None:
        """Add the values of one reading.

        Args:
            step: optimizer steps done; larger than that of the last reading.
            **quantities: for each quantity one value a layer, in the order of ``layer_names``; NaN where undefined.

        Raises:
            ValueError: If ``step`` does not follow the last one, or a quantity has another length.

        """
        step = _history_rows.checked_step(step, self.steps)
        row = _history_rows.checked_row(quantities, len(self.layer_names))
        self.steps.append(step)
        self._rows.append(row)
        if self._thinning is not None and (kept := self._thinning.append()) is not None:
            self.steps = [self.steps[place] for place in kept]
            self._rows = [self._rows[place] for place in kept]

    def keep_at_most(self, readings: int) -> None:
        """Bound the memory: of more readings than this, keep every second, then every fourth, and so on, and the last.

        A file holds the kept readings alone: a history that was loaded has no bound, and counts those as ``readings``.

        Args:
            readings: the bound.

        Raises:
            TypeError: If the bound is no integer.
            ValueError: If it is smaller than 2.

        Example::

            >>> history = RotationHistory(["fc"])
            >>> history.keep_at_most(4)
            >>> for step in range(10, 100, 10):
            ...     history.append(step, rotation=[step / 1000])
            >>> history.steps, history.readings, history.thinned_to
            ([10, 50, 90], 9, 4)

        """
        rows, steps = self._rows, self.steps
        self._thinning, self.steps, self._rows = Thinning(readings), [], []
        for step, row in zip(steps, rows, strict=True):
            self.append(step, **row)

    @property
    def readings(self) -> int:
        """Readings that were added in all, also those that :meth:`keep_at_most` left out."""
        return len(self) if self._thinning is None else self._thinning.readings

    @property
    def thinned_to(self) -> int:
        """Of so many readings one is kept, and the last: a power of two, 1 without :meth:`keep_at_most`."""
        return 1 if self._thinning is None else self._thinning.every

    def drop_from(self, step: int) -> None:
        """Forget the readings at this step and later ones: training has gone back there.

        Args:
            step: optimizer steps done, where training goes on.

        """
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
        return _history_rows.stacked(self._rows, quantity, len(self.layer_names))

    def final(self, quantity: str = "rotation") -> dict[str, float]:
        """Each layer's last defined value of a quantity.

        Args:
            quantity: one of :attr:`quantities`.

        Returns:
            Values by layer name, in the unit of the quantity; NaN for a layer that has none, and for all layers where
            the quantity was not recorded.

        """
        return _history_rows.last_defined(self._rows, quantity, self.layer_names)

    def reindex(self, layer_names: Sequence[str], layer_shapes: Sequence[Sequence[int]]) -> "RotationHistory":
        """The same readings for another list of layers: NaN for new ones, vanished ones left out.

        Args:
            layer_names: names of the layers in depth order, each once.
            layer_shapes: shape of each layer's weights.

        Returns:
            A new history with the same facts and bound.

        Raises:
            ValueError: If a name stands twice, or names and shapes differ in number.

        Example::

            >>> history = RotationHistory(["conv", "fc"])
            >>> history.append(10, rotation=[0.1, 0.2])
            >>> history.reindex(["fc", "head"], [(10, 8), (2, 10)]).final()
            {'fc': 0.2, 'head': nan}

        """
        new = RotationHistory(layer_names, layer_shapes, self.facts)
        for step, row in zip(self.steps, self._rows, strict=True):
            new.append(step, **_history_rows.rearranged(row, self.layer_names, new.layer_names))
        new._thinning = copy.deepcopy(self._thinning)
        return new

    def state_dict(self) -> dict[str, Any]:
        """The history as lists, strings and numbers, safe for ``torch.load(..., weights_only=True)``.

        Returns:
            ``layers`` (name and shape of each), ``facts``, ``rows`` (step and values of each reading), and ``thinning``
            where :meth:`keep_at_most` was called.

        """
        thinning = {} if self._thinning is None else {"thinning": self._thinning.state_dict()}
        # A fact that no file can hold must not end a training that writes a checkpoint.
        return {**self._content(_history_facts.plain(self.facts)), **thinning}

    def _content(self, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {
            "layers": [{"name": n, "shape": list(s)} for n, s in zip(self.layer_names, self.layer_shapes, strict=True)],
            "facts": _history_facts.strictly_plain(self.facts) if facts is None else facts,
            "rows": [{"step": step, **row} for step, row in zip(self.steps, self._rows, strict=True)],
        }

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "RotationHistory":
        """The history that :meth:`state_dict` described.

        Returns:
            A new history, equal to the one that ``state_dict`` describes, which goes on as that would have.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If layers, or a row and the layers, do not fit together.

        Example::

            >>> history = RotationHistory(["fc"])
            >>> history.append(10, rotation=[0.2])
            >>> state = history.state_dict()
            >>> state["rows"]
            [{'step': 10, 'rotation': [0.2]}]
            >>> RotationHistory.from_state_dict(state) == history
            True

        """
        layers = state_dict["layers"]
        history = cls([layer["name"] for layer in layers], [layer["shape"] for layer in layers], state_dict["facts"])
        for row in state_dict["rows"]:
            history.append(**row)
        if "thinning" in state_dict:
            history._thinning = Thinning.from_state_dict(state_dict["thinning"])
        return history

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history as JSON Lines: a header, then one line a reading. The file appears whole or not at all.

        Of a history that :meth:`keep_at_most` bounds it holds the kept readings, and not the bound.

        Args:
            path: the file; its folder is made if it does not exist.

        Raises:
            ValueError: If a fact is none of numbers, text, None, lists and mappings, with its name.

        Example::

            >>> import tempfile, pathlib
            >>> history = RotationHistory(["fc"], [(2, 2)], {"lr": 0.1})
            >>> history.append(1, rotation=[0.25])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = pathlib.Path(folder, "run.jsonl")
            ...     history.save(file)
            ...     history.append(2, rotation=[0.5])
            ...     history.save_last_row(file)
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

        Raises:
            FileNotFoundError: If there is no such file.
            IndexError: If there is no reading.

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
        return _history_rows.frame(self.steps, self._rows, self.layer_names)

    def figure(self, quantity: str = "rotation") -> "go.Figure":
        """Plotly figure of one quantity's curves, coloured by depth (see ``pl_layer_rotation.report.figures``).

        Args:
            quantity: one that the monitor records, or another of :attr:`quantities`.

        Returns:
            One line a layer over the optimizer steps, in depth order, and dotted ones to compare with.

        Raises:
            ValueError: If the quantity is neither.

        """
        from pl_layer_rotation.report.figures import curves

        return curves(self, quantity)

    def findings(self) -> "list[Finding]":
        """What the curves say in plain words, most urgent first (see ``pl_layer_rotation.report.findings``).

        Returns:
            A record for each finding, with its sentence, layers and numbers; none where no rule fires.

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

        Returns:
            The suggestion; NaN with the reason in its ``sentence`` where straightness says nothing.

        Raises:
            TypeError: If one of the others is no history.
            ValueError: If the runs are not equally long.

        """
        from pl_layer_rotation.report.suggestion import suggest_lr

        return suggest_lr(self, *others)
