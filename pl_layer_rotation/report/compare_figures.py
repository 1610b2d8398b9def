"""Plotly figures of several runs: curves laid over each other, layers side by side, runs as points."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.comparison import Comparison, Quantity
from pl_layer_rotation.report.figures import _escape, _layout, _rounded, _shorten, _step_axis, depth_colors
from pl_layer_rotation.report.measures import STRAIGHT

FEW_RUNS = 8  # up to here each run has a colour of its own, and a band from its lowest to its highest layer
MOST_LINES = 200  # of more runs, as many are drawn, evenly from best to worst
MOST_CELLS = 40_000  # of the heatmap; of more layers, as many are drawn, evenly over depth

# Told apart on white and on black paper, neighbours by colour-blind readers too.
_COLORS = ("#2f7fd6", "#dd7500", "#1f9d76", "#c0479f", "#8b62d6", "#a8892a", "#d64b4b", "#4a9fae")
_POINTS = 20_000  # over all lines
_MOST_POINTS, _FEWEST_POINTS = 300, 30  # of a line
_LABEL = 22  # characters of a name beside an axis
_HOVER = 80

_AXES = {"mean": "mean rotation at the end", "straightness": "median straightness"}


def run_colors(comparison: Comparison) -> list[str]:
    """A colour for each run: its own up to eight runs, else its place from worst to best."""
    number = len(comparison.runs)
    if number <= FEW_RUNS:
        return list(_COLORS[:number])
    colors = dict(zip(reversed(comparison.ranked()), depth_colors(number), strict=True))
    return [colors[i] for i in range(number)]


def drawn_lines(comparison: Comparison) -> list[int]:
    """Runs whose curves are drawn, from worst to best: all up to :data:`MOST_LINES`, of more every n-th."""
    return _evenly(comparison.ranked()[::-1], MOST_LINES)


def mean_curves(histories: Mapping[str, RotationHistory], comparison: Comparison) -> go.Figure:
    """Mean rotation over the layers against steps, a line a run; up to eight runs with a band from lowest to highest.

    Args:
        histories: the runs, as in ``comparison``.
        comparison: what is known of them.

    Returns:
        A figure whose lines are named by run; the best run lies on top.

    """
    colors, names, runs = run_colors(comparison), list(histories), list(histories.values())
    few = len(runs) <= FEW_RUNS
    shown = drawn_lines(comparison)
    most = max(_FEWEST_POINTS, min(_MOST_POINTS, _POINTS // max(1, len(shown))))
    bands, lines, last_step = [], [], 0
    for i in shown:
        curve = _spread(runs[i], most)
        steps, means = [point[0] for point in curve], [_rounded(point[2]) for point in curve]
        last_step = max([last_step, *steps])
        if few and len(runs[i].layer_names) > 1:
            low, high = [_rounded(point[1]) for point in curve], [_rounded(point[3]) for point in curve]
            outline = {"x": steps + steps[::-1], "y": high + low[::-1], "fill": "toself", "hoverinfo": "skip"}
            bands.append(go.Scatter(**outline, mode="lines", line={"width": 0}, fillcolor=colors[i], opacity=0.13))
        label = f"<b>{_name(names[i], _HOVER)}</b><br>step %{{x:,}}<br>mean rotation %{{y:.3g}}<extra></extra>"
        look: dict[str, Any] = {"mode": "lines" if len(curve) > 1 else "markers", "hovertemplate": label}
        style = {"color": colors[i], "width": 2.4 if few else 1.3}
        lines.append(go.Scatter(x=steps, y=means, name=_name(names[i], _HOVER), line=style, **look))
    figure = go.Figure([*bands, *lines], _layout(bool(lines)))
    figure.update_xaxes(**_step_axis([0, last_step]), range=[0, max(1, last_step)])
    figure.update_yaxes(title_text="rotation (cosine distance)", rangemode="tozero")
    figure.update_layout(margin_t=16)
    return figure


def final_rotation(histories: Mapping[str, RotationHistory], comparison: Comparison) -> go.Figure:
    """Each layer's last defined rotation in every run: points up to eight runs, else a heatmap of runs and layers.

    Args:
        histories: the runs, as in ``comparison``.
        comparison: what is known of them.

    Returns:
        A figure over all layers that any run has; where a run lacks one, there is a gap.

    """
    layers = united_layers(list(histories.values()))
    finals = [history.final("rotation") for history in histories.values()]
    if len(histories) <= FEW_RUNS:
        return _points_by_layer(list(histories), layers, finals, run_colors(comparison))
    return _heatmap(list(histories), layers, finals, comparison)


def scatter(comparison: Comparison, quantity: Quantity) -> go.Figure:
    """The runs as points: a quantity against the metric that they are judged by.

    Args:
        comparison: the runs; they must have a metric in common.
        quantity: which number of a run to draw.

    Returns:
        A figure with one trace; a point for each run that has both numbers.

    """
    both = [(i, getattr(run, quantity), run.metric) for i, run in enumerate(comparison.runs)]
    points = [(i, x, y) for i, x, y in both if x is not None and y is not None]
    figure = _points(comparison, points, _AXES[quantity], _name(comparison.metric or "", _LABEL))
    if quantity == "straightness" and any(x > STRAIGHT for _, x, _ in points):
        line = {"width": 1, "dash": "dot", "color": "#7d838c"}
        figure.add_vline(STRAIGHT, line=line, annotation_text=f"{STRAIGHT}", annotation_position="bottom right")
    return figure


def straightness_over_rates(comparison: Comparison) -> go.Figure | None:
    """The runs as points: straightness against the learning rate; None where fewer than two rates have one.

    Over a ladder of rates straightness falls, goes through a minimum near the best rate, and returns to 1 above it.
    """
    rates = comparison.varied.get("learning_rate", [])
    both = [(i, rate, run.straightness) for i, (rate, run) in enumerate(zip(rates, comparison.runs, strict=False))]
    points = [(i, x, y) for i, x, y in both if isinstance(x, (int, float)) and x > 0 and y is not None]
    if len({x for _, x, _ in points}) < 2:
        return None
    figure = _points(comparison, points, "learning rate", _AXES["straightness"])
    figure.update_xaxes(type="log")
    line = {"width": 1, "dash": "dot", "color": "#7d838c"}
    figure.add_hline(1.0, line=line, annotation_text="random walk", annotation_position="bottom right")
    return figure


def _points(comparison: Comparison, points: Sequence[tuple[int, float, float]], x: str, y: str) -> go.Figure:
    """Runs by number as points, with the titles of both axes."""
    colors = run_colors(comparison)
    figure = go.Figure(
        go.Scatter(
            x=[_rounded(value) for _, value, _ in points],
            y=[_rounded(value) for _, _, value in points],
            mode="markers",
            marker={"size": 10, "color": [colors[i] for i, _, _ in points], "line": {"width": 0}},
            customdata=[[_name(comparison.runs[i].name, _HOVER)] for i, _, _ in points],
            hovertemplate=f"<b>%{{customdata[0]}}</b><br>{x} %{{x:.3g}}<br>{y} %{{y:.4g}}<extra></extra>",
        ),
        _layout(bool(points)),
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    figure.update_layout(margin_t=16)
    return figure


def united_layers(histories: Sequence[RotationHistory]) -> list[str]:
    """All layers of all runs, each once: in depth order, a layer that only some have after the one before it there."""
    layers: list[str] = []
    known: set[str] = set()
    for history in histories:
        new = [name for name in history.layer_names if name not in known]
        if not new:
            continue
        before = {name: previous for previous, name in pairwise([None, *history.layer_names])}
        for name in new:
            previous = before[name]
            layers.insert(0 if previous is None else layers.index(previous) + 1, name)
            known.add(name)
    return layers


def _spread(history: RotationHistory, most: int) -> list[tuple[int, float, float, float]]:
    """Step, lowest, mean and highest rotation of the readings that have one; at most so many of them."""
    rows = [(row["step"], row["rotation"]) for row in history.state_dict()["rows"] if "rotation" in row]
    defined = [(step, [value for value in values if math.isfinite(value)]) for step, values in _evenly(rows, most)]
    return [(step, min(v), math.fsum(v) / len(v), max(v)) for step, v in defined if v]


def _points_by_layer(
    names: Sequence[str], layers: Sequence[str], finals: Sequence[Mapping[str, float]], colors: Sequence[str]
) -> go.Figure:
    labels = _numbered(layers)
    traces = [
        go.Scatter(
            x=[_rounded(final.get(layer, math.nan)) for layer in layers],
            y=labels,
            name=_name(name, _HOVER),
            mode="lines+markers",
            cliponaxis=False,
            marker={"size": 8, "color": color},
            line={"width": 1, "color": color},
            customdata=[[_name(layer, _HOVER)] for layer in layers],
            hovertemplate=f"<b>{_name(name, _HOVER)}</b><br>%{{customdata[0]}}<br>rotation %{{x:.3g}}<extra></extra>",
        )
        for name, final, color in zip(names, finals, colors, strict=True)
    ]
    figure = go.Figure(traces, _layout(bool(layers)))
    figure.update_xaxes(title_text="rotation at the end (cosine distance)", rangemode="tozero")
    order = {"type": "category", "categoryorder": "array", "categoryarray": labels}
    figure.update_yaxes(**order, autorange="reversed", tickfont={"size": 11}, ticklabelstandoff=8)
    figure.update_layout(margin_t=16)
    return figure


def _heatmap(
    names: Sequence[str], layers: Sequence[str], finals: Sequence[Mapping[str, float]], comparison: Comparison
) -> go.Figure:
    ranked = comparison.ranked()
    kept = _evenly(list(enumerate(layers)), max(2, MOST_CELLS // len(names)))
    rows = [[_rounded(finals[i].get(layer, math.nan)) for _, layer in kept] for i in ranked]
    labels = [f"{place} {_name(names[i], _LABEL)}" for place, i in enumerate(ranked, start=1)]
    figure = go.Figure(
        go.Heatmap(
            x=[depth for depth, _ in kept],
            y=labels,
            z=rows,
            meta=[_name(layer, _HOVER) for _, layer in kept],  # the page makes hover texts of it, once for all rows
            coloraxis="coloraxis",
            hoverongaps=False,
            hovertemplate="<b>%{y}</b><br>depth %{x}: %{text}<br>rotation %{z:.3g}<extra></extra>",
        ),
        _layout(bool(layers)),
    )
    whole = {"dtick": 1} if len(layers) <= 12 else {}  # or Plotly would mark half layers
    figure.update_xaxes(title_text="depth, first to last layer", showgrid=False, **whole)
    order = {"type": "category", "categoryorder": "array", "categoryarray": labels}
    figure.update_yaxes(**order, autorange="reversed", tickfont={"size": 10}, showgrid=False)
    highest = max((value for row in rows for value in row if value is not None), default=0) or 1
    bar = {"orientation": "h", "x": 0, "xanchor": "left", "xpad": 0, "y": 1, "yanchor": "bottom", "ypad": 10}
    bar |= {"lenmode": "fraction", "len": 1, "thickness": 8, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": highest, "colorbar": bar})
    return figure


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """All items, or so many of them, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _numbered(layers: Sequence[str]) -> list[str]:
    # The number keeps apart what shortening makes equal.
    return [f"{depth} {_name(layer, _LABEL)}" for depth, layer in enumerate(layers)]


def _name(name: str, length: int) -> str:
    return _escape(_shorten(name, length))
