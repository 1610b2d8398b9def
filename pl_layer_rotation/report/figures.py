"""Plotly figures of a history: curves by depth, final rotation by layer, heatmap of depth and step."""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.measures import random_walk
from pl_layer_rotation.report.text import origin, shape_text

# First to last layer: equal steps of hue and lightness in OKLCH, dark enough for white paper, light enough for black;
# from blue to amber, so that the order remains for colour-blind readers.
_DEPTH_COLORS = ("#2360d4", "#6557d9", "#9150ce", "#b34bb8", "#cf4998", "#e24e72", "#ec5c43", "#e57200", "#d08c00")
_DEPTH_SCALE = [[i / (len(_DEPTH_COLORS) - 1), color] for i, color in enumerate(_DEPTH_COLORS)]

Drawing = dict[str, Any]  # data and layout, as plotly.js takes them

_POINTS = 10_000  # W&B keeps no more rows of a figure's table; more points than this cannot be told apart either
_FEW_READINGS = 12  # up to here each reading is marked: a single one would draw no line at all
_LABEL = 24  # characters of a layer's name beside an axis
_HOVER = 80  # characters of a layer's name in a hover label
_REFERENCE = 40  # characters of the reference's name beside an axis
_GREY = "#7d838c"  # readable on light and on dark paper
_SPECIAL = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "{": "&#123;", "$": "&#36;"})


class _Quantity(NamedTuple):
    axis: str
    short: str
    from_zero: bool


_QUANTITIES = {
    "rotation": _Quantity("cosine distance", "cosine distance", True),
    "angular_update": _Quantity("angle turned by one optimizer step (radians)", "angular update (radians)", True),
    "norm_ratio": _Quantity("norm of the weights / norm of the reference (ratio)", "norm ratio", False),
    "straightness": _Quantity("angle from the start / that of a random walk (ratio)", "straightness", True),
}


def curves(history: RotationHistory, quantity: str = "rotation", points: int = _POINTS) -> go.Figure:
    """One line a layer over the optimizer steps, coloured by depth.

    Undefined values are gaps. At most ``max(2, points // layers)`` readings are drawn, first and last among them. Thin
    dotted lines are there to compare with: in the view of the rotation a random walk with the same steps, in that of
    the straightness its 1, in that of the angular update the angle that was asked for, where it was recorded.

    Args:
        history: the readings of one run.
        quantity: what to draw: ``rotation``, ``angular_update`` (radians), ``norm_ratio``, ``straightness``, or another
            recorded one.
        points: values to draw at most.

    Returns:
        A figure with one scatter trace a layer, in depth order, and after them the dotted lines.

    Raises:
        ValueError: If ``quantity`` is neither known nor recorded.

    Example::

        >>> history = RotationHistory(["conv", "fc"], [(8, 1, 3, 3), (10, 8)])
        >>> history.append(10, rotation=[0.01, 0.02])
        >>> history.append(20, rotation=[0.03, float("nan")])
        >>> [(line.name, line.x, line.y) for line in curves(history).data]
        [('conv', (10, 20), (0.01, 0.03)), ('fc', (10, 20), (0.02, None))]

    """
    return _figure(draw_curves(history, quantity, points))


def final_rotation(history: RotationHistory) -> go.Figure:
    """Each layer's last defined rotation as a bar; the first layer is on top.

    Args:
        history: the readings of one run.

    Returns:
        A figure with one trace of bars in depth order; layers without a value have an empty place.

    Example::

        >>> history = RotationHistory(["conv", "fc"])
        >>> history.append(10, rotation=[0.25, 0.5])
        >>> bars = final_rotation(history).data[0]
        >>> bars.y, bars.x
        (('0 conv', '1 fc'), (0.25, 0.5))

    """
    return _figure(draw_final_rotation(history))


def heatmap(history: RotationHistory, quantity: str = "rotation", points: int = _POINTS) -> go.Figure:
    """Depth by optimizer step, coloured by value; the first layer is on top.

    Args:
        history: the readings of one run.
        quantity: what to draw, as for :func:`curves`.
        points: values to draw at most.

    Returns:
        A figure with one heatmap trace: a row a layer, a column a reading, gaps where a value is undefined.

    Raises:
        ValueError: If ``quantity`` is neither known nor recorded.

    Example::

        >>> history = RotationHistory(["conv", "fc"])
        >>> history.append(10, rotation=[0.01, 0.02])
        >>> history.append(20, rotation=[0.03, 0.05])
        >>> heatmap(history).data[0].z
        ([0.01, 0.03], [0.02, 0.05])

    """
    return _figure(draw_heatmap(history, quantity, points))


def figures(history: RotationHistory) -> dict[str, go.Figure]:
    """The three figures that the dashboard and the page show.

    Args:
        history: the readings of one run; may have none yet.

    Returns:
        Figures by name: ``rotation`` (curves), ``final_rotation`` (bars) and ``heatmap``.

    Example::

        >>> list(figures(RotationHistory(["fc"])))
        ['rotation', 'final_rotation', 'heatmap']

    """
    return {"rotation": curves(history), "final_rotation": final_rotation(history), "heatmap": heatmap(history)}


def draw_curves(history: RotationHistory, quantity: str = "rotation", points: int = _POINTS) -> Drawing:
    """:func:`curves` as plain data: Plotly's checks of hundreds of traces cost more than the rest of a page."""
    drawn = _describe(history, quantity)
    steps, columns = _columns(history, quantity, points)
    few = len(steps) <= _FEW_READINGS
    lines = [
        {
            "type": "scatter",
            "x": steps,
            "y": values,
            "name": _escape(name),
            "mode": "lines+markers" if few else "lines",
            "line": {"color": color, "width": 2 if len(columns) <= 20 else 1.2},
            "marker": {"color": color, "size": 5},
            "hovertemplate": f"{_hover(history, depth)}<br>step %{{x:,}}<br>{drawn.short} %{{y:.3g}}<extra></extra>",
        }
        for depth, (name, color, values) in enumerate(
            zip(history.layer_names, depth_colors(len(columns)), columns, strict=True)
        )
    ]
    layout = _layout(_measured(columns))
    layout["xaxis"] |= _step_axis(steps)
    if not few:
        # Markers, even unseen ones, would widen it.
        layout["xaxis"]["range"] = [min(0, steps[0]), steps[-1]]
    layout["yaxis"] |= {"title": {"text": drawn.axis}, "rangemode": "tozero" if drawn.from_zero else "normal"}
    if len(columns) > 1:
        # Plotly draws a colour bar for markers only. The first line lends its own, so that none has to be invented and
        # the figure keeps one trace a layer.
        lines[0]["mode"] = "lines+markers"
        lines[0]["marker"] = {"color": [0] * len(steps), "coloraxis": "coloraxis", "opacity": int(few), "size": 5}
        last = len(columns) - 1
        axis = {"colorscale": _DEPTH_SCALE, "cmin": 0, "cmax": last, "tickvals": [0, last]}
        _color_bar(layout, "depth, first to last layer", 0.25, **axis)
    guides = _guides(history, quantity, steps, points) if _measured(columns) else []
    return {"data": [*lines, *guides], "layout": layout}


def draw_final_rotation(history: RotationHistory) -> Drawing:
    """:func:`final_rotation` as plain data."""
    values = [_rounded(value) for value in history.final("rotation").values()]
    bars = {
        "type": "bar",
        "x": values,
        "y": _labels(history),
        "orientation": "h",
        "marker": {"color": depth_colors(len(values))},
        "customdata": [[_hover(history, depth)] for depth in range(len(values))],
        "hovertemplate": "%{customdata[0]}<br>final cosine distance %{x:.3g}<extra></extra>",
    }
    layout = _layout(_measured([values]))
    layout["xaxis"] |= {"title": {"text": "final cosine distance"}, "rangemode": "tozero"}
    layout["yaxis"] |= _layer_axis(history)
    return {"data": [bars], "layout": {**layout, "bargap": 0.25}}


def draw_heatmap(history: RotationHistory, quantity: str = "rotation", points: int = _POINTS) -> Drawing:
    """:func:`heatmap` as plain data."""
    drawn = _describe(history, quantity)
    steps, columns = _columns(history, quantity, points)
    cells = {
        "type": "heatmap",
        "x": steps,
        "y": _labels(history),
        "z": columns,
        "coloraxis": "coloraxis",
        "hoverongaps": False,
        "hovertemplate": f"<b>%{{y}}</b><br>step %{{x:,}}<br>{drawn.short} %{{z:.3g}}<extra></extra>",
    }
    layout = _layout(_measured(columns))
    layout["xaxis"] |= {**_step_axis(steps), "showgrid": False}
    layout["yaxis"] |= _layer_axis(history)
    highest = max((value for row in columns for value in row if value is not None), default=0) or 1
    span = {"cmin": 0, "cmax": highest} if drawn.from_zero else {}
    _color_bar(layout, drawn.short, 1, colorscale="Viridis", **span)
    return {"data": [cells], "layout": layout}


def depth_colors(layers: int) -> list[str]:
    """CSS colours of that many layers in depth order, the same in every figure and table."""
    stops = [depth / max(1, layers - 1) for depth in range(layers)]
    return [str(color) for color in sample_colorscale(_DEPTH_SCALE, stops)] if stops else []


def _figure(drawing: Drawing) -> go.Figure:
    return go.Figure({**drawing, "layout": {"template": "none", **drawing["layout"]}})


def _describe(history: RotationHistory, quantity: str) -> _Quantity:
    words = _escape(quantity.replace("_", " "))
    if quantity == "rotation":
        start = origin({"reference": _shorten(str(history.facts.get("reference") or "init"), _REFERENCE)})
        return _QUANTITIES[quantity]._replace(axis=_escape(f"cosine distance from {start}"))
    if quantity not in _QUANTITIES and quantity not in history.quantities:
        known = list(dict.fromkeys([*_QUANTITIES, *history.quantities]))
        raise ValueError(f"`quantity` must be one of {known}, got {quantity!r}. Pass one that was recorded.")
    return _QUANTITIES.get(quantity, _Quantity(words, words, False))


def _guides(history: RotationHistory, quantity: str, steps: Sequence[int], points: int) -> list[dict[str, Any]]:
    """The dotted lines to compare with."""
    if quantity == "rotation":
        walk = random_walk(history)
        known = [step for step in steps if step in walk]
        return (
            [_guide("random walk", known, [_rounded(walk[step]) for step in known], "cosine distance")] if known else []
        )
    if quantity == "straightness":
        return [_guide("random walk", [steps[0], steps[-1]], [1.0, 1.0], "straightness")]
    if quantity != "angular_update" or "requested_angle" not in history.quantities:
        return []
    asked_at, asked = _columns(history, "requested_angle", points)
    # Most often all layers are asked for the same.
    colors = {tuple(values): color for color, values in zip(depth_colors(len(asked)), asked, strict=True)}
    colors.pop((None,) * len(asked_at), None)
    return [
        _guide("requested", asked_at, values, "angular update (radians)", _GREY if len(colors) == 1 else color, i == 0)
        for i, (values, color) in enumerate(colors.items())
    ]


def _guide(
    name: str,
    steps: Sequence[int],
    values: Sequence[float | None],
    unit: str,
    color: str = _GREY,
    labelled: bool = True,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": list(steps),
        "y": list(values),
        "name": name,
        "mode": "lines+text" if labelled else "lines",
        "text": [*[""] * (len(steps) - 1), name],
        "textposition": "top left",
        "textfont": {"size": 11, "color": _GREY},
        "line": {"color": color, "width": 1.2, "dash": "dot"},
        "hovertemplate": f"<b>{name}</b><br>step %{{x:,}}<br>{unit} %{{y:.3g}}<extra></extra>",
    }


def _columns(history: RotationHistory, quantity: str, points: int) -> tuple[list[int], list[list[float | None]]]:
    """Steps at which a quantity was read, thinned, and the values of each layer at them."""
    # Quantities may be read at different steps: a step without a reading of this one is no gap in its curves.
    rows = [(row["step"], row[quantity]) for row in history.state_dict()["rows"] if quantity in row]
    most = max(2, points // max(1, len(history.layer_names)))
    if len(rows) > most:
        rows = [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
    columns = [[_rounded(row[layer]) for _, row in rows] for layer in range(len(history.layer_names))]
    return [step for step, _ in rows], columns


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _measured(columns: Sequence[Sequence[float | None]]) -> bool:
    return any(value is not None for column in columns for value in column)


def _escape(text: str) -> str:
    """Text that Plotly shows as it is: no markup, no ``%{…}`` template, no ``$…$`` formula, one line, one direction."""
    return "".join(letter if letter.isprintable() else " " for letter in text).translate(_SPECIAL)


def _shorten(text: str, length: int) -> str:
    """The text with its middle left out; more of the end is kept, since that is where layers' names differ."""
    if len(text) <= length:
        return text
    return f"{text[: length // 3]}…{text[length // 3 + 1 - length :]}"


def _labels(history: RotationHistory) -> list[str]:
    # The depth keeps shortened names apart, and is the number that the table and the logged keys show too.
    names = history.layer_names
    if max(map(len, names), default=0) > _LABEL:
        # What the first and the last name in alphabetical order begin with, all names begin with.
        parts = zip(min(names).split(".")[:-1], max(names).split(".")[:-1], strict=False)
        shared = sum(len(part) + 1 for part, _ in takewhile(lambda pair: pair[0] == pair[1], parts))
        names = [f"…{name[shared:]}" for name in names] if shared else names
    return [f"{depth} {_escape(_shorten(name, _LABEL))}" for depth, name in enumerate(names)]


def _hover(history: RotationHistory, depth: int) -> str:
    name = _escape(_shorten(history.layer_names[depth], _HOVER))
    return f"<b>{name}</b><br>depth {depth}, shape {shape_text(history.layer_shapes[depth])}"


def _step_axis(steps: Sequence[int]) -> dict[str, Any]:
    whole = {"dtick": 1} if steps and steps[-1] - steps[0] < 10 else {}  # or Plotly would mark half steps
    return {"title": {"text": "optimizer steps"}, "exponentformat": "none", "separatethousands": True, **whole}


def _layer_axis(history: RotationHistory) -> dict[str, Any]:
    # Categories, not numbers: Plotly leaves out labels for which there is no room only among categories.
    order = {"type": "category", "categoryorder": "array", "categoryarray": _labels(history)}
    return {**order, "autorange": "reversed", "automargin": True, "showgrid": False, "tickfont": {"size": 11}}


def _color_bar(layout: dict[str, Any], title: str, length: float, **axis: Any) -> None:
    """Put the figure's colour bar above the axes, where it fits a narrow screen too."""
    place = {"orientation": "h", "x": 0, "xanchor": "left", "xpad": 0, "y": 1, "yanchor": "bottom", "ypad": 10}
    size = {"lenmode": "fraction", "len": length, "thickness": 8, "outlinewidth": 0, "exponentformat": "power"}
    bar = {**place, **size, "tickvals": axis.pop("tickvals", None)}
    layout["coloraxis"] = {**axis, "colorbar": bar}
    # A title of the bar's own would move the axes, and rows of bars and heatmap side by side would not be level.
    words = {"text": title, "showarrow": False, "xref": "paper", "yref": "paper", "x": 0, "y": 1}
    layout["annotations"].append({**words, "xanchor": "left", "yanchor": "bottom", "yshift": 40})


def _layout(measured: bool) -> dict[str, Any]:
    """What the figures share; transparent, with greys that can be read on light and on dark paper."""
    grey, grid = _GREY, "rgba(128,134,144,0.22)"
    axis = {"gridcolor": grid, "zerolinecolor": grid, "linecolor": grid, "ticks": "", "automargin": True}
    axis["exponentformat"] = "power"
    center = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    note = {"text": "No values were recorded.", "showarrow": False, **center}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": grey},
        "margin": {"l": 56, "r": 16, "t": 68, "b": 48},
        "showlegend": False,
        "hovermode": "closest",
        "xaxis": dict(axis),
        "yaxis": dict(axis),
        "annotations": [] if measured else [note],
    }
