"""One self-contained HTML page that lays 2 … 200 runs over each other."""

import json
import math
import os
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from pl_layer_rotation._text_file import write_text
from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.compare_figures import (
    FEW_RUNS,
    MOST_CELLS,
    MOST_LINES,
    final_rotation,
    mean_curves,
    run_colors,
    scatter,
    straightness_over_rates,
    united_layers,
)
from pl_layer_rotation.report.comparison import FEWEST, Comparison, Mode, Quantity, compare, correlation, headline
from pl_layer_rotation.report.figures import depth_colors
from pl_layer_rotation.report.findings import NOTHING
from pl_layer_rotation.report.measures import STRAIGHT
from pl_layer_rotation.report.named_runs import named_runs
from pl_layer_rotation.report.packing import pack, plotly_js, script, source_hash, style, templates
from pl_layer_rotation.report.text import MISSING, fact_text, listed, measure_text, metric_text, three_digits

_MOST_METRICS = 6  # beside the one that runs are judged by
_QUANTITIES: tuple[tuple[Quantity, str], ...] = (("mean", "Mean rotation"), ("straightness", "Median straightness"))
_TALLEST = 1_100  # pixels
_RATES = (
    "Over runs that differ in the rate alone, straightness falls, goes through a minimum near the best rate, and "
    "returns to 1 above it; on small or noisy data the best rate lies below that minimum."
)


class _Chart(NamedTuple):
    """A figure on the page: its title, the key of its figure, its height and what it shows in words."""

    key: str
    title: str
    height: int
    summary: str


class _Cell(NamedTuple):
    text: str
    sort: float | None  # None for text, which sorts as it is written


def render_comparison(
    histories: Mapping[str, RotationHistory], metric: str | None = None, mode: Mode | None = None
) -> str:
    """The page as text. The same histories give the same bytes, and opening it causes no network request.

    Up to 8 runs have colours of their own, bands from the lowest to the highest layer, and points side by side for
    each layer. More are coloured from worst to best and share a heatmap of runs and layers. Above 200 runs, curves of
    200 are drawn, evenly from best to worst; of a heatmap above 40,000 cells, as many layers as fit, evenly over depth.

    Args:
        histories: one history a run, under the name that readers see.
        metric: what the runs are judged by: a name in ``facts["metrics"]``; by default the one that most of them have,
            validation and accuracy first.
        mode: whether a larger or a smaller value of it is better; by default read from its name.

    Returns:
        A complete HTML document with plotly.js, figures and tables inside.

    Raises:
        TypeError: If ``histories`` is no mapping from text to histories.
        ValueError: If there are fewer than two runs, no run has the metric, its name does not say what is better, there
            is no such mode, or a fact of a run is none of numbers, text, None, lists and mappings.

    Example::

        >>> runs = {"slow": RotationHistory(["fc"]), "fast": RotationHistory(["fc"])}
        >>> runs["slow"].append(10, rotation=[0.1])
        >>> runs["fast"].append(10, rotation=[0.3])
        >>> "<code>fast</code> turned most (mean rotation 0.300)" in render_comparison(runs)
        True

    """
    histories = named_runs(histories)
    if len(histories) < 2:
        raise ValueError(f"`histories` must hold two runs at least, got {len(histories)}. Pass {{name: history, …}}.")
    comparison = compare(histories, metric, mode)
    judged = comparison.metric is not None
    figures = {"curves": mean_curves(histories, comparison), "layers": final_rotation(histories, comparison)}
    if judged:
        figures |= {quantity: scatter(comparison, quantity) for quantity, _ in _QUANTITIES}
    rates = straightness_over_rates(comparison)
    if rates is not None:
        figures["rates"] = rates
    few = len(histories) <= FEW_RUNS
    colors, ranked = run_colors(comparison), comparison.ranked()
    head, rows = _table(comparison, with_findings=not few)
    drawings = {key: figure.to_plotly_json() for key, figure in figures.items()}
    code, library = script("compare.js"), plotly_js()
    page = templates().get_template("compare.html")
    return page.render(
        names=list(histories),
        sentences=headline(comparison),
        legend=list(zip(histories, colors, strict=True)) if few else [],
        said=[(run.name, run.findings) for run in comparison.runs] if few else [],
        gradient=", ".join(depth_colors(9)),
        ends=("worst", "best") if judged else ("turned least", "turned most"),
        judge=_judge(comparison),
        curves=_Chart("curves", "Rotation over training", 460, _curves_in_words(comparison)),
        layers=_layers_chart(histories),
        scatters=[_scatter_chart(comparison, quantity, title) for quantity, title in _QUANTITIES] if judged else [],
        rates=None if rates is None else _Chart("rates", "Median straightness and learning rate", 360, _RATES),
        head=head,
        rows=[(colors[i], rows[i]) for i in ranked],
        order="The best run comes first." if judged else "The run that turned most comes first.",
        shared=[(_label(name), fact_text(value)) for name, value in comparison.shared.items() if value is not None],
        straight=STRAIGHT,
        figures=pack(json.dumps(drawings, allow_nan=False, separators=(",", ":"))),
        library=library.packed,
        style=Markup(style("compare.css")),
        script=Markup(code),
        policy=f"script-src {source_hash(code)} {library.source}",
    )


def write_comparison(
    path: str | os.PathLike[str],
    histories: Mapping[str, RotationHistory],
    metric: str | None = None,
    mode: Mode | None = None,
) -> None:
    """Write :func:`render_comparison` to a file, which appears whole or not at all.

    Args:
        path: the file; its folder is made if it does not exist.
        histories: one history a run, under the name that readers see.
        metric: what the runs are judged by.
        mode: whether a larger or a smaller value of it is better.

    Raises:
        TypeError: As :func:`render_comparison`.
        ValueError: As :func:`render_comparison`.

    Example::

        >>> import tempfile, pathlib
        >>> runs = {"slow": RotationHistory(["fc"]), "fast": RotationHistory(["fc"])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "runs.html")
        ...     write_comparison(file, runs)
        ...     "<title>Layer rotation: 2 runs compared</title>" in file.read_text(encoding="utf-8")
        True

    """
    write_text(path, render_comparison(histories, metric, mode))


def _judge(comparison: Comparison) -> str:
    if comparison.metric is None:
        return "No two runs have a metric in common whose name says what is better, so none is set against rotation."
    better = "larger" if comparison.mode == "max" else "smaller"
    return f"Runs are judged by their last value of {listed([comparison.metric])}; {better} is better."


def _curves_in_words(comparison: Comparison) -> str:
    known = [(run.name, run.mean) for run in comparison.runs if run.mean is not None]
    if not known:
        return "No run has a defined rotation."
    if len(known) <= FEW_RUNS:
        ends = ", ".join(f"{three_digits(mean)} ({name})" for name, mean in sorted(known, key=lambda run: -run[1]))
        return f"Mean rotation at the end: {ends}."
    means = [mean for _, mean in known]
    low, median, high = map(three_digits, (min(means), statistics.median(means), max(means)))
    words = f"Mean rotation at the end of {len(means)} runs: from {low} to {high}, median {median}."
    return f"{words} {MOST_LINES} of them are drawn, evenly from best to worst." if len(means) > MOST_LINES else words


def _layers_chart(histories: Mapping[str, RotationHistory]) -> _Chart:
    layers = united_layers(list(histories.values()))
    finals = [history.final("rotation") for history in histories.values()]
    values = {name: [v for final in finals if math.isfinite(v := final.get(name, math.nan))] for name in layers}
    medians = {name: statistics.median(own) for name, own in values.items() if own}
    partial = sum(any(name not in final for final in finals) for name in layers)
    words = "No layer has a defined rotation."
    if medians:
        low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
        most, least = (f"{listed([name])} turned {{}} ({three_digits(medians[name])})" for name in (high, low))
        words = f"{len(layers)} layers. In the median over runs {most.format('most')} and {least.format('least')}."
    if partial:
        words += f" {partial} {'is' if partial == 1 else 'are'} not in every run."
    if len(histories) <= FEW_RUNS:
        return _Chart("layers", "Rotation at the end, layer by layer", min(_TALLEST, 110 + 24 * len(layers)), words)
    if len(layers) * len(histories) > MOST_CELLS:
        words += f" Of the layers, {max(2, MOST_CELLS // len(histories))} are drawn, evenly over depth."
    height = min(_TALLEST, 120 + 16 * len(histories))
    return _Chart("layers", "Rotation at the end, run by run, best first", height, words)


def _scatter_chart(comparison: Comparison, quantity: Quantity, title: str) -> _Chart:
    value, runs = correlation(comparison, quantity)
    if value is not None:
        rho = f"Spearman's ρ = {value:+.2f}"  # noqa: RUF001
        words = f"{rho} over n = {runs} runs. It shows what goes together, not what causes what."
    elif runs < FEWEST:
        words = f"Too few runs for a rank correlation: n = {runs}, and it takes {FEWEST}."
    else:
        words = f"All {runs} runs have the same value of one of the two, so there is no rank correlation."
    return _Chart(quantity, f"{title} and {comparison.metric}", 360, words)


def _table(comparison: Comparison, with_findings: bool) -> tuple[list[tuple[str, bool]], list[list[_Cell]]]:
    """One row a run: how it did, how it turned, what sets it apart, what its curves say."""
    others = dict(list(comparison.other_metrics.items())[:_MOST_METRICS])
    metric = [] if comparison.metric is None else [comparison.metric]
    ours = ["mean rotation", "min", "max", "median straightness"]
    head = ["run", *metric, *ours, *map(_label, comparison.varied), "steps", *others, *(["findings"] * with_findings)]
    rows = []
    for i, run in enumerate(comparison.runs):
        numbers = [*([run.metric] if metric else []), run.mean, run.low, run.high, run.straightness]
        said = " ".join(line for line in run.findings if line != NOTHING) or MISSING
        rows.append(
            [
                _Cell(run.name, None),
                *(_Cell(measure_text(value), _sortable(value)) for value in numbers),
                *(_Cell(fact_text(values[i]), _sortable(values[i])) for values in comparison.varied.values()),
                _Cell(f"{run.steps:,}", run.steps),
                *(_Cell(metric_text(values[i]), _sortable(values[i])) for values in others.values()),
                *([_Cell(said, None)] * with_findings),
            ]
        )
    numeric = [any(row[column].sort is not None for row in rows) for column in range(len(head))]
    return list(zip(head, numeric, strict=True)), rows


def _sortable(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _label(name: str) -> str:
    return name.replace("_", " ")
