"""One self-contained HTML page of one or several histories."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from pl_layer_rotation._text_file import write_text
from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.figures import (
    Drawing,
    depth_colors,
    draw_curves,
    draw_final_rotation,
    draw_heatmap,
)
from pl_layer_rotation.report.findings import finding_lines
from pl_layer_rotation.report.measures import FOR_RULES, union
from pl_layer_rotation.report.named_runs import named_runs
from pl_layer_rotation.report.packing import pack, plotly_js, script, source_hash, style, templates
from pl_layer_rotation.report.sentences import captions, defined, headline, notes, straightness
from pl_layer_rotation.report.text import fact_text, measure_text, metric_text, origin, shape_text

# What the curves can show, and what their switch calls it.
_VIEWS = {
    "rotation": "rotation",
    "angular_update": "angular update",
    "norm_ratio": "norm ratio",
    "straightness": "straightness",
}
_POINTS, _FEWEST_POINTS = 20_000, 5_000  # values in a chart: of a page with one run, and with many
_COMPARED = ("optimizer", "learning_rate")  # shown side by side even where all runs agree
_ROW, _FRAME = 16, 130  # pixels of one layer's row, and of everything around the rows
_TALLEST = 1_200  # pixels; with more layers the rows shrink and some go without a label
_COLUMNS = {
    "rotation": "final rotation",
    "norm_ratio": "norm ratio",
    "straightness": "straightness",
    "angular_update": "last angular update (rad)",
}
_NOT_SHOWN = FOR_RULES | {"layer_multipliers"}
_FIRST = ("optimizer", "learning_rate", "steps", "strategy", "devices", "precision")
_LABELS = {"total_steps": "planned steps", "steps": "optimizer steps"}


class _Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]
    kinds: list[str]  # by column: "text", "depth", "size" or "number"


class _Run(NamedTuple):
    """What the template shows of one run: text ready to print, and the names of its charts."""

    name: str
    headline: str
    notes: list[str]
    findings: list[str]
    views: dict[str, str]
    captions: dict[str, str]
    height: int
    layers: _Table
    colors: list[str]
    facts: list[tuple[str, str]]

    @property
    def drawn(self) -> bool:
        return bool(self.views)


def render_page(histories: Mapping[str, RotationHistory]) -> str:
    """The page as text. The same histories give the same bytes, and opening it causes no network request.

    Args:
        histories: one history a run, under the name that readers see; they appear in this order.

    Returns:
        A complete HTML document with plotly.js (2.0 MB, compressed), figures and tables inside.

    Raises:
        TypeError: If ``histories`` is no mapping from text to histories.
        ValueError: If there is no run, or a fact of one is none of numbers, text, None, lists and mappings.

    Example::

        >>> history = RotationHistory(["conv", "fc"], [(8, 1, 3, 3), (10, 8)], {"optimizer": "SGD"})
        >>> history.append(10, rotation=[0.01, 0.02])
        >>> page = render_page({"baseline": history})
        >>> "After 10 optimizer steps: mean rotation 0.0150 over 2 layers" in page
        True

    """
    histories = named_runs(histories)
    if not histories:
        raise ValueError("`histories` must hold at least one run, got none. Pass {name: history}.")
    runs = [_run(name, history) for name, history in histories.items()]
    drawn = [run for run in runs if run.drawn]
    drawings = _drawings(histories, runs)
    environment = templates()
    environment.filters["sentence"] = _sentence
    code, library = script("page.js"), plotly_js()
    return environment.get_template("template.html").render(
        runs=runs,
        comparison=_compare(histories) if len(runs) > 1 else None,
        shared_views={key: label for key, label in _VIEWS.items() if drawn and all(key in run.views for run in drawn)},
        origin=_common_origin(histories.values()),
        gradient=", ".join(depth_colors(9)),
        style=Markup(style("page.css")),
        script=Markup(code),
        policy=f"script-src {source_hash(code)} {library.source}",
        library=library.packed,
        figures=pack(json.dumps(drawings, allow_nan=False, separators=(",", ":"))),
    )


def write_page(path: str | os.PathLike[str], histories: Mapping[str, RotationHistory]) -> None:
    """Write :func:`render_page` to a file, which appears whole or not at all.

    Args:
        path: the file; its folder is made if it does not exist.
        histories: one history a run, under the name that readers see.

    Raises:
        TypeError: If ``histories`` is no mapping from text to histories.
        ValueError: If there is no run, or a fact of one is none of numbers, text, None, lists and mappings.

    Example::

        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "rotation.html")
        ...     write_page(file, {"run": RotationHistory(["fc"])})
        ...     file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        True

    """
    write_text(path, render_page(histories))


@cache
def _sentence(text: str) -> Markup:
    """The names in a sentence, which stand in backticks, set apart: their letters may run from right to left."""
    parts = re.split("`([^`]+)`", text)
    return Markup("").join(
        Markup("<code><bdi>{}</bdi></code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts)
    )


def _drawings(histories: Mapping[str, RotationHistory], runs: Sequence[_Run]) -> dict[str, Drawing]:
    """The charts of all runs by their names in the page."""
    points = max(_FEWEST_POINTS, _POINTS // len(runs))
    drawings = {}
    for i, (history, run) in enumerate(zip(histories.values(), runs, strict=True)):
        for view in run.views:
            drawings[f"{view}-{i}"] = draw_curves(history, view, points)
        if run.drawn:
            drawings[f"final_rotation-{i}"] = draw_final_rotation(history)
            drawings[f"heatmap-{i}"] = draw_heatmap(history, points=points)
    if len(runs) > 1:
        _same_range(drawings, histories.values())
    return drawings


def _run(name: str, history: RotationHistory) -> _Run:
    told = captions(history)
    return _Run(
        name=name,
        headline=headline(history),
        notes=notes(history),
        findings=finding_lines(history),
        views={key: label for key, label in _VIEWS.items() if key in told} if "rotation" in told else {},
        captions=told,
        height=min(_TALLEST, _FRAME + _ROW * len(history.layer_names)),
        layers=_layer_table(history),
        colors=depth_colors(len(history.layer_names)),
        facts=_fact_list(history),
    )


def _common_origin(histories: Iterable[RotationHistory]) -> str:
    origins = {origin(history.facts) for history in histories}
    return origins.pop() if len(origins) == 1 else "the weights that each run is measured from"


def _layer_table(history: RotationHistory) -> _Table:
    columns = {label: history.final(key) for key, label in _COLUMNS.items() if key in history.quantities}
    rows = [
        [str(depth), name, shape_text(shape), *(measure_text(values[name]) for values in columns.values())]
        for depth, (name, shape) in enumerate(zip(history.layer_names, history.layer_shapes, strict=True))
    ]
    return _Table(["depth", "layer", "shape", *columns], rows, ["depth", "text", "size"] + ["number"] * len(columns))


def _compare(histories: Mapping[str, RotationHistory]) -> _Table:
    """One row a run: its recipe, its final rotation, its metrics, then whatever else the runs differ in."""
    facts = [_plain_facts(history) for history in histories.values()]
    metrics = [_metrics(history.facts) for history in histories.values()]
    aggregates = [_aggregates(history) for history in histories.values()]
    recipe = [key for key in _COMPARED if any(key in own for own in facts)]
    varied = [key for key in union(facts) if any(own.get(key) != facts[0].get(key) for own in facts)]
    others = [key for key in varied if key not in recipe]
    scores = union(metrics)
    rows = [
        [
            name,
            *map(fact_text, map(own.get, recipe)),
            *numbers.values(),
            *map(metric_text, map(own_metrics.get, scores)),
            *map(fact_text, map(own.get, others)),
        ]
        for name, own, numbers, own_metrics in zip(histories, facts, aggregates, metrics, strict=True)
    ]
    kinds = [
        "text",
        *(_kind(facts, key) for key in recipe),
        *("number" for _ in aggregates[0]),
        *(_kind(metrics, key) for key in scores),
        *(_kind(facts, key) for key in others),
    ]
    return _Table(["run", *map(_label, recipe), *aggregates[0], *scores, *map(_label, others)], rows, kinds)


def _kind(mappings: Sequence[Mapping[str, Any]], key: str) -> str:
    return "number" if all(isinstance(mapping.get(key, 0), (int, float)) for mapping in mappings) else "text"


def _aggregates(history: RotationHistory) -> dict[str, str]:
    final = list(defined(history).values())
    mean, low, high = (math.fsum(final) / len(final), min(final), max(final)) if final else (math.nan,) * 3
    turned = straightness(history)
    return {
        "mean rotation": measure_text(mean),
        "min": measure_text(low),
        "max": measure_text(high),
        "straightness": measure_text(turned),
    }


def _same_range(drawings: Mapping[str, Drawing], histories: Iterable[RotationHistory]) -> None:
    """Give the figures of all runs one range of rotation, so that equal heights and colours mean equal values."""
    rows = [row for history in histories for row in history.state_dict()["rows"]]
    values = [value for row in rows for value in row.get("rotation", ())]
    highest = max((value for value in values if math.isfinite(value)), default=0.0) or 1.0
    for key, drawing in drawings.items():
        layout, kind = drawing["layout"], key.rpartition("-")[0]
        if kind == "rotation":
            layout["yaxis"]["range"] = [0, 1.04 * highest]
        elif kind == "final_rotation":
            layout["xaxis"]["range"] = [0, 1.04 * highest]
        elif kind == "heatmap":
            layout["coloraxis"] |= {"cmin": 0, "cmax": highest}


def _fact_list(history: RotationHistory) -> list[tuple[str, str]]:
    facts = _plain_facts(history)
    first = [key for key in _FIRST if key in facts]
    shown = [*first, *(key for key in facts if key not in first)]
    return [
        *((_label(key), fact_text(facts[key])) for key in shown),
        *((key, metric_text(value)) for key, value in _metrics(history.facts).items()),
    ]


def _metrics(facts: Mapping[str, Any]) -> dict[str, Any]:
    metrics = facts.get("metrics")
    return dict(metrics) if isinstance(metrics, Mapping) else {}


def _plain_facts(history: RotationHistory) -> dict[str, Any]:
    facts = {
        key: value
        for key, value in history.facts.items()
        if key not in _NOT_SHOWN and not (key == "metrics" and isinstance(value, Mapping))
    }
    return {"steps": history.steps[-1], **facts} if history.steps else facts


def _label(key: str) -> str:
    return _LABELS.get(key, key.replace("_", " "))
