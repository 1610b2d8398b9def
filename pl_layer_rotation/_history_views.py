"""What a reader makes of a history: a table, a figure, findings and a learning rate."""

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from pl_layer_rotation.history import RotationHistory
    from pl_layer_rotation.report.findings import Finding
    from pl_layer_rotation.report.suggestion import RateSuggestion


class HistoryViews:
    """The part of :class:`~pl_layer_rotation.RotationHistory` that reads it; reports are imported where asked for."""

    @property
    def _history(self) -> "RotationHistory":
        return cast("RotationHistory", self)

    def _repr_html_(self) -> str:
        """What a notebook shows (see ``pl_layer_rotation.report.notebook``)."""
        from pl_layer_rotation.report.notebook import notebook_html

        return notebook_html(self._history)

    def to_pandas(self) -> "pd.DataFrame":
        """The readings as a tidy table: one row for each step, layer and quantity that has a value.

        Returns:
            Columns ``step``, ``layer``, ``depth``, ``quantity`` and ``value``.

        Raises:
            ModuleNotFoundError: If pandas is not installed.

        Example::

            >>> from pl_layer_rotation import RotationHistory
            >>> history = RotationHistory(["conv", "fc"])
            >>> history.append(10, rotation=[0.1, 0.2])
            >>> history.to_pandas()
               step layer  depth  quantity  value
            0    10  conv      0  rotation    0.1
            1    10    fc      1  rotation    0.2

        """
        from pl_layer_rotation._history_rows import frame

        history = self._history
        return frame(history.steps, history._rows, history.layer_names)

    def figure(self, quantity: str = "rotation") -> "go.Figure":
        """Plotly figure of one quantity's curves, coloured by depth (see ``pl_layer_rotation.report.figures``).

        Args:
            quantity: one that the monitor records, or another of :attr:`quantities`.

        Returns:
            One line a layer over the optimizer steps, in depth order, and dotted ones to compare with.

        Raises:
            ValueError: If the quantity is neither.

        Example::

            >>> from pl_layer_rotation import RotationHistory
            >>> history = RotationHistory(["conv", "fc"])
            >>> history.append(10, rotation=[0.1, 0.2])
            >>> history.append(20, rotation=[0.3, 0.5])
            >>> [(line.x, line.y) for line in history.figure().data[:2]]
            [((10, 20), (0.1, 0.3)), ((10, 20), (0.2, 0.5))]

        """
        from pl_layer_rotation.report.figures import curves

        return curves(self._history, quantity)

    def findings(self) -> "list[Finding]":
        """What the curves say in plain words, most urgent first (see ``pl_layer_rotation.report.findings``).

        Returns:
            A record for each finding, with its sentence, layers and numbers; none where no rule fires.

        Example::

            >>> from pl_layer_rotation import RotationHistory
            >>> history = RotationHistory(["conv", "fc"])
            >>> history.append(100, rotation=[0.1, 0.0], norm_ratio=[1.1, 1.0])
            >>> [(finding.code, finding.layers) for finding in history.findings()]
            [('A', ('fc',))]

        """
        from pl_layer_rotation.report.findings import findings

        return findings(self._history)

    def suggest_lr(self, *others: "RotationHistory") -> "RateSuggestion":
        """The learning rate to try next, from how straight the layers moved (how well that does: ``docs/tuning.md``).

        Args:
            *others: histories of runs that differ in the learning rate alone, each stopped after the same steps.

        Returns:
            The suggestion; NaN with the reason in its ``sentence`` where straightness says nothing.

        Raises:
            TypeError: If one of the others is no history.
            ValueError: If the runs are not equally long.

        Example::

            >>> from pl_layer_rotation import RotationHistory
            >>> history = RotationHistory(["fc"], facts={"learning_rate": 0.001, "momentum": 0.0})
            >>> for step in range(1, 101):
            ...     history.append(step, rotation=[0.0084], angular_update=[0.01])
            >>> suggestion = history.suggest_lr()
            >>> round(suggestion.straightness, 1), round(suggestion.factor, 1)
            (1.3, 6.1)

        """
        from pl_layer_rotation.report.suggestion import suggest_lr

        return suggest_lr(self._history, *others)
