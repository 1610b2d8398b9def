"""What a notebook shows of a history that ends a cell: a small table, each layer's curve drawn beside its name."""

import math
from typing import NamedTuple

from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.findings import finding_lines
from pl_layer_rotation.report.packing import templates
from pl_layer_rotation.report.text import measure_text, shape_text, three_digits

_MOST_ROWS = 40  # layers that are shown; of more, the first and the last ones
_POINTS = 60  # of a curve
_WIDTH, _HEIGHT = 120, 18


class _Row(NamedTuple):
    depth: int
    name: str
    shape: str
    rotation: str
    pieces: list[str]  # of the curve, as points of an SVG polyline; a gap parts them


def notebook_html(history: RotationHistory) -> str:
    """HTML for a notebook: layers with their final rotation and its curve, then what the curves say.

    Needs neither a script nor the network. At most 40 layers and 60 readings of each are drawn: below 60 kB with names
    of 40 characters. All curves share one scale.

    Args:
        history: the recorded curves.

    Example::

        >>> history = RotationHistory(["conv", "<fc>"])
        >>> history.append(10, rotation=[0.25, 0.5])
        >>> "&lt;fc&gt;</td>" in notebook_html(history)
        True

    """
    depths = list(range(len(history.layer_names)))
    hidden = max(0, len(depths) - _MOST_ROWS)
    if hidden:
        depths = depths[: _MOST_ROWS // 2] + depths[-_MOST_ROWS // 2 :]
    final = history.final("rotation")
    columns = _curves(history)
    highest = max((value for curve in columns for _, value in curve if math.isfinite(value)), default=0.0) or 1.0
    rows = [
        _Row(
            depth,
            history.layer_names[depth],
            shape_text(history.layer_shapes[depth], "–"),  # noqa: RUF001
            measure_text(final[history.layer_names[depth]]),
            _polylines(columns[depth], highest),
        )
        for depth in depths
    ]
    return (
        templates()
        .get_template("notebook.html")
        .render(
            layers=len(history.layer_names),
            steps=history.steps[-1] if history.steps else 0,
            rows=rows,
            hidden=hidden,
            break_after=_MOST_ROWS // 2 if hidden else None,
            highest=three_digits(highest),
            findings=finding_lines(history),
            width=_WIDTH,
            height=_HEIGHT,
        )
    )


def _curves(history: RotationHistory) -> list[list[tuple[float, float]]]:
    """For each layer the share of the run and the rotation, of readings evenly over the run."""
    rows = [(row["step"], row["rotation"]) for row in history.state_dict()["rows"] if "rotation" in row]
    if len(rows) > _POINTS:
        rows = [rows[round(i * (len(rows) - 1) / (_POINTS - 1))] for i in range(_POINTS)]
    end = max(1, rows[-1][0]) if rows else 1
    return [[(step / end, values[depth]) for step, values in rows] for depth in range(len(history.layer_names))]


def _polylines(curve: list[tuple[float, float]], highest: float) -> list[str]:
    pieces: list[list[str]] = [[]]
    for share, value in curve:
        if not math.isfinite(value):
            pieces.append([])
            continue
        pieces[-1].append(f"{_WIDTH * share:.1f},{1 + (_HEIGHT - 2) * (1 - value / highest):.1f}")
    return [" ".join(piece) for piece in pieces if piece]
