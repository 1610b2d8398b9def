"""One self-contained HTML page of one or several histories."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from pl_layer_rotation.history import RotationHistory, write_text
from pl_layer_rotation.report.figures import depth_colors, figures
from pl_layer_rotation.report.findings import finding_lines
from pl_layer_rotation.report.text import shape_text, three_digits

_MISSING = "–"  # noqa: RUF001
_COMPARED = ("optimizer", "learning_rate")  # shown side by side even where all runs agree
_ROW, _FRAME = 16, 130  # pixels of one layer's row, and of everything around the rows
_TALLEST = 1_200  # pixels; with more layers the rows shrink and some go without a label
_COLUMNS = {"rotation": "final rotation", "norm_ratio": "norm ratio", "angular_update": "last angular update (rad)"}
# Facts that the findings need and a reader does not.
_FOR_FINDINGS = frozenset(
    {"followed_by_norm", "dense_steps", "angle_readings", "layer_multipliers", "base", "constant_learning_rate"}
)
_AGGREGATES = ("mean rotation", "min", "max")


class _Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]
    numeric: list[bool]  # by column


class _Run(NamedTuple):
    """What the template shows of one run: text ready to print, and the names of its figures."""

    name: str
    headline: str
    warning: str
    findings: list[str]
    drawn: bool
    height: int
    layers: _Table
    colors: list[str]
    facts: list[tuple[str, str]]


def render_page(histories: Mapping[str, RotationHistory]) -> str:
    """The page as text. The same histories give the same bytes, and opening it causes no network request.

    Args:
        histories: one history a run, under the name that readers see; they appear in this order.

    Returns:
        A complete HTML document with plotly.js (about 4.8 MB), figures and tables inside.

    Raises:
        ValueError: If there is no run.

    Example::

        >>> history = RotationHistory(["conv", "fc"], [(8, 1, 3, 3), (10, 8)], {"optimizer": "SGD"})
        >>> history.append(10, rotation=[0.01, 0.02])
        >>> page = render_page({"baseline": history})
        >>> "rotation from 0.0100 (conv) to 0.0200 (fc)" in page
        True

    """
    if not histories:
        raise ValueError("`histories` must hold at least one run, got none. Pass {name: history}.")
    runs = [_run(name, history) for name, history in histories.items()]
    drawings = {
        f"{kind}-{i}": figure
        for i, (history, run) in enumerate(zip(histories.values(), runs, strict=True))
        if run.drawn
        for kind, figure in figures(history).items()
    }
    if len(runs) > 1:
        _same_range(drawings, histories.values())
    return _template().render(
        runs=runs,
        comparison=_compare(histories) if len(runs) > 1 else None,
        figures={key: figure.to_plotly_json() for key, figure in drawings.items()},
        gradient=", ".join(depth_colors(9)),
        plotlyjs=get_plotlyjs(),
    )


def write_page(path: str | os.PathLike[str], histories: Mapping[str, RotationHistory]) -> None:
    """Write :func:`render_page` to a file, which appears whole or not at all.

    Args:
        path: the file; its folder is made if it does not exist.
        histories: one history a run, under the name that readers see.

    Raises:
        ValueError: If there is no run.

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
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pl_layer_rotation", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html")


def _run(name: str, history: RotationHistory) -> _Run:
    final = history.final("rotation")
    return _Run(
        name=name,
        headline=_headline(history),
        warning=_warning(history),
        findings=finding_lines(history),
        drawn=bool(_defined(history)),
        height=min(_TALLEST, _FRAME + _ROW * len(final)),
        layers=_layer_table(history),
        colors=depth_colors(len(final)),
        facts=_fact_list(history.facts),
    )


def _headline(history: RotationHistory) -> str:
    if not history.layer_names:
        return "This run has no layers to show."
    layers = _count(len(history.layer_names), "layer")
    if not history.steps:
        return f"This run has {layers} and no readings yet."
    steps = _count(history.steps[-1], "optimizer step")
    final = _defined(history)
    if not final:
        return f"After {steps} none of the {layers} has a defined rotation."
    low, high = min(final, key=final.__getitem__), max(final, key=final.__getitem__)
    if len(final) == 1:
        return f"After {steps}: {layers}, rotation {_measure(final[low])} ({low})."
    return f"After {steps}: {layers}, rotation from {_measure(final[low])} ({low}) to {_measure(final[high])} ({high})."


def _warning(history: RotationHistory) -> str:
    last = next((row["rotation"] for row in reversed(history.state_dict()["rows"]) if "rotation" in row), ())
    undefined = [name for name, value in zip(history.layer_names, last, strict=False) if not math.isfinite(value)]
    if not undefined or not _defined(history):
        return ""
    shown = ", ".join(undefined[:3]) + (", …" if len(undefined) > 3 else "")
    verb = "has" if len(undefined) == 1 else "have"
    layers = _count(len(undefined), "layer")
    return f"{layers} {verb} no defined rotation at the last reading: {shown}. Shown is the last defined value, if any."


def _layer_table(history: RotationHistory) -> _Table:
    columns = {label: history.final(key) for key, label in _COLUMNS.items() if key in history.quantities}
    rows = [
        [str(depth), name, shape_text(shape), *(_measure(values[name]) for values in columns.values())]
        for depth, (name, shape) in enumerate(zip(history.layer_names, history.layer_shapes, strict=True))
    ]
    return _Table(["depth", "layer", "shape", *columns], rows, [False] * 3 + [True] * len(columns))


def _compare(histories: Mapping[str, RotationHistory]) -> _Table:
    """One row a run: its recipe, its final rotation, its metrics, then whatever else the runs differ in."""
    facts = [_plain_facts(history.facts) for history in histories.values()]
    metrics = [_metrics(history.facts) for history in histories.values()]
    recipe = [key for key in _COMPARED if any(key in own for own in facts)]
    varied = [key for key in _union(facts) if any(own.get(key) != facts[0].get(key) for own in facts)]
    others = [key for key in varied if key not in recipe]
    scores = _union(metrics)
    rows = [
        [name, *_cells(own, recipe), *_aggregates(history), *_cells(own_metrics, scores), *_cells(own, others)]
        for (name, history), own, own_metrics in zip(histories.items(), facts, metrics, strict=True)
    ]
    numeric = [
        False,
        *(_all_numbers(facts, key) for key in recipe),
        *(True for _ in _AGGREGATES),
        *(_all_numbers(metrics, key) for key in scores),
        *(_all_numbers(facts, key) for key in others),
    ]
    return _Table(["run", *map(_label, recipe), *_AGGREGATES, *scores, *map(_label, others)], rows, numeric)


def _cells(values: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    return [_fact(values.get(key)) for key in keys]


def _all_numbers(mappings: Sequence[Mapping[str, Any]], key: str) -> bool:
    return all(isinstance(mapping.get(key, 0), (int, float)) for mapping in mappings)


def _aggregates(history: RotationHistory) -> list[str]:
    final = list(_defined(history).values())
    if not final:
        return [_MISSING] * len(_AGGREGATES)
    return [_measure(value) for value in (math.fsum(final) / len(final), min(final), max(final))]


def _same_range(drawings: Mapping[str, go.Figure], histories: Iterable[RotationHistory]) -> None:
    """Give the figures of all runs one range of rotation, so that equal heights and colours mean equal values."""
    rows = [row for history in histories for row in history.state_dict()["rows"]]
    values = [value for row in rows for value in row.get("rotation", ())]
    highest = max((value for value in values if math.isfinite(value)), default=0.0) or 1.0
    for key, figure in drawings.items():
        if key.startswith("rotation"):
            figure.update_yaxes(range=[0, 1.04 * highest])
        elif key.startswith("final_rotation"):
            figure.update_xaxes(range=[0, 1.04 * highest])
        else:
            figure.update_layout(coloraxis={"cmin": 0, "cmax": highest})


def _fact_list(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    plain = [(_label(key), _fact(value)) for key, value in _plain_facts(facts).items()]
    return plain + [(key, _fact(value)) for key, value in _metrics(facts).items()]


def _metrics(facts: Mapping[str, Any]) -> dict[str, Any]:
    metrics = facts.get("metrics")
    return dict(metrics) if isinstance(metrics, Mapping) else {}


def _plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in facts.items()
        if key not in _FOR_FINDINGS and not (key == "metrics" and isinstance(value, Mapping))
    }


def _union(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _defined(history: RotationHistory) -> dict[str, float]:
    return {name: value for name, value in history.final("rotation").items() if math.isfinite(value)}


def _label(key: str) -> str:
    return key.replace("_", " ")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _measure(value: float) -> str:
    return three_digits(value, _MISSING)


def _fact(value: Any) -> str:
    """A value of the run in words: numbers to three digits, everything else as it is."""
    if value is None:
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
