"""Several runs in numbers and words: who turned most, who did best, and whether the two go together."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.findings import finding_lines
from pl_layer_rotation.report.measures import (
    FOR_RULES,
    STRAIGHT,
    Measures,
    number,
    rank_correlation,
    read_straightness,
    union,
)
from pl_layer_rotation.report.named_runs import named_runs
from pl_layer_rotation.report.text import count, listed, three_digits

Mode = Literal["min", "max"]
Quantity = Literal["mean", "straightness"]

FEWEST = 4  # runs from which a rank correlation says anything at all

# Whole words of a metric's name. A few are often written together with another one: valacc, crossentropyloss.
_WHERE = "(?:train|valid|validation|val|test|dev|eval|mean|avg)?"
_LARGER_IS_BETTER = re.compile(
    rf"{_WHERE}(?:b?acc|(?:macro|micro|weighted)?f1|(?:roc|pr)?auc|auroc|auprc|precision|recall|[mgd]?iou|jaccard|dice"
    r"|(?:sacre)?bleu|r2|m?ap|top\d+)|\w*accuracy"
)
_SMALLER_IS_BETTER = re.compile(
    rf"{_WHERE}(?:errs?|errors?|loss(?:es)?|ppl|nll|n?r?mse|n?mae|s?mape|r?msle)|\w*(?:loss|error|perplexity)"
)
# Words end at whatever is no letter, and where capitals start: MulticlassF1Score, valAcc. Digits stay with their word.
_WORD = re.compile(r"(?:[mMgGdD]?IoU|mAP|[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+)\d*")
_VALIDATION = re.compile(r"(?<![A-Za-z])(?i:val|valid|validation|eval|dev)(?![a-z])")
_NO_SETTINGS = FOR_RULES | {"metrics", "median_straightness"}


@dataclass(frozen=True)
class Summary:
    """One run in numbers; None where a number is unknown.

    Attributes:
        name: what readers see.
        steps: optimizer steps of the last reading.
        layers: how many layers there are.
        mean: mean over the layers of their last defined rotation.
        low: smallest of them.
        high: largest of them.
        straightness: median over the layers that moved; None where there were too few readings to tell.
        metric: last value of the metric that runs are judged by.
        findings: what its curves say.

    """

    name: str
    steps: int
    layers: int
    mean: float | None
    low: float | None
    high: float | None
    straightness: float | None
    metric: float | None
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What is known of several runs.

    Attributes:
        runs: one summary a run, in the order given.
        metric: name of the metric that they are judged by; None where no two runs have one in common.
        mode: whether a larger (``"max"``) or a smaller value of it is better.
        varied: settings that differ between the runs: for each one value a run, None where unknown.
        shared: settings that are the same in all runs.
        other_metrics: the other metrics, as ``varied``.

    """

    runs: tuple[Summary, ...]
    metric: str | None
    mode: Mode
    varied: dict[str, list[Any]]
    shared: dict[str, Any]
    other_metrics: dict[str, list[Any]]

    def ranked(self) -> list[int]:
        """Runs from best to worst; by the metric, or without one from the largest mean rotation to the smallest."""

        def place(index: int) -> tuple[bool, float]:
            run = self.runs[index]
            value = run.mean if self.metric is None else run.metric
            larger = self.metric is None or self.mode == "max"
            return value is None, 0.0 if value is None else (-value if larger else value)

        return sorted(range(len(self.runs)), key=place)


def compare(
    histories: Mapping[str, RotationHistory], metric: str | None = None, mode: Mode | None = None
) -> Comparison:
    """Sum up several runs.

    Args:
        histories: one history a run, under the name that readers see.
        metric: name in ``facts["metrics"]``; by default the one that most runs have, validation and accuracy first.
        mode: whether larger (``"max"``) or smaller (``"min"``) is better; by default read from the metric's name.

    Raises:
        TypeError: If ``histories`` is no mapping from text to histories.
        ValueError: If no run has the metric, its name does not say which direction is better, or there is no such mode.

    Example::

        >>> short, long = RotationHistory(["fc"]), RotationHistory(["fc"])
        >>> short.append(10, rotation=[0.1])
        >>> long.append(10, rotation=[0.3])
        >>> compare({"short": short, "long": long}).ranked()
        [1, 0]

    """
    histories = named_runs(histories)
    metrics = [_metrics(history.facts) for history in histories.values()]
    chosen, direction = _judged_by(metrics, metric, mode)
    settings = [_settings(history.facts) for history in histories.values()]
    by_name = {name: [own.get(name) for own in settings] for name in union(settings)}
    varied = {name: values for name, values in by_name.items() if any(value != values[0] for value in values)}
    others = [name for name in union(metrics) if name != chosen]
    return Comparison(
        tuple(
            _summary(name, history, own.get(chosen or ""))
            for (name, history), own in zip(histories.items(), metrics, strict=True)
        ),
        chosen,
        direction or "max",
        varied,
        {name: values[0] for name, values in by_name.items() if name not in varied},
        {name: [own.get(name) for own in metrics] for name in others},
    )


def judged_by(
    histories: Mapping[str, RotationHistory], metric: str | None = None, mode: Mode | None = None
) -> tuple[str | None, Mode | None]:
    """The metric that runs are judged by, and whether a larger or a smaller value of it is better.

    Args:
        histories: one history a run.
        metric: name in ``facts["metrics"]``; by default the one that most runs have, validation and accuracy first.
        mode: whether larger (``"max"``) or smaller (``"min"``) is better; by default read from the metric's name.

    Returns:
        Name and direction; None for both where no two runs have a metric whose name says what is better.

    Raises:
        TypeError: If ``histories`` is no mapping from text to histories.
        ValueError: If no run has the metric, its name does not say which direction is better, or there is no such mode.

    Example::

        >>> runs = [RotationHistory(["fc"], facts={"metrics": {"val_loss": loss}}) for loss in (0.1, 0.2)]
        >>> judged_by({"one": runs[0], "two": runs[1]})
        ('val_loss', 'min')

    """
    return _judged_by([_metrics(history.facts) for history in named_runs(histories).values()], metric, mode)


def _judged_by(
    metrics: Sequence[Mapping[str, float]], metric: str | None, mode: Mode | None
) -> tuple[str | None, Mode | None]:
    if mode not in (None, "min", "max"):
        raise ValueError(f"`mode` must be 'min', 'max' or None, got {mode!r}. None reads it from the metric's name.")
    if metric is None:
        metric = _chosen(metrics)
    elif not any(metric in own for own in metrics):
        known = ", ".join(sorted({name for own in metrics for name in own}))
        raise ValueError(f"`metric` must be one that a run has ({known or 'none is known'}), got {metric!r}.")
    direction = None if metric is None else mode or _direction(metric)
    if metric is not None and direction is None:
        raise ValueError(f"`mode` must be 'min' or 'max': the name {metric!r} does not say which is better. Pass it.")
    return metric, direction


def headline(comparison: Comparison) -> list[str]:
    """What was measured over the runs, in sentences: who turned most, who did best, how many were straight."""
    runs = comparison.runs
    turned = [run for run in runs if run.mean is not None]
    judged = [comparison.runs[i] for i in comparison.ranked() if comparison.runs[i].metric is not None]
    straight = [run.straightness for run in runs if run.straightness is not None]
    sentences = []
    if len(turned) > 1:
        most, least = max(turned, key=_mean), min(turned, key=_mean)
        sentences.append(
            f"{listed([most.name])} turned most (mean rotation {three_digits(_mean(most))}), "
            f"{listed([least.name])} least ({three_digits(_mean(least))})."
        )
    if judged and comparison.metric is not None:
        best, name = judged[0], listed([comparison.metric])
        also = sum(run.metric == best.metric for run in judged) - 1
        shared = f", as had {also} other{'' if also == 1 else 's'}" if also else ""
        sentences.append(
            f"Best {name} at the end ({'largest' if comparison.mode == 'max' else 'smallest'} of {len(judged)}): "
            f"{_metric_text(best.metric)} in {listed([best.name])}{shared}."
        )
    if straight:
        above = sum(value > STRAIGHT for value in straight)
        sentences.append(f"{above} of {count(len(straight), 'run')} had a median straightness above {STRAIGHT}.")
    return sentences or ["No run has a defined rotation yet."]


def correlation(comparison: Comparison, quantity: Quantity) -> tuple[float | None, int]:
    """Spearman's rank correlation over runs of a quantity with the metric, and the number of runs that have both.

    Args:
        comparison: the runs.
        quantity: which number of :class:`Summary` to take.

    Returns:
        The correlation, None with fewer than four runs or where all values of one are equal, and the number of runs.

    """
    both = [(getattr(run, quantity), run.metric) for run in comparison.runs]
    pairs = [(float(value), metric) for value, metric in both if value is not None and metric is not None]
    return spearman([value for value, _ in pairs], [metric for _, metric in pairs]), len(pairs)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; equal values share the mean of their ranks.

    Args:
        first: finite values.
        second: as many of them.

    Returns:
        The correlation, or None with fewer than four pairs or where all values of one are equal.

    Example::

        >>> spearman([0.1, 0.2, 0.3, 0.4], [1.0, 3.0, 2.0, 4.0])
        0.8

    """
    if len(first) < FEWEST or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return rank_correlation(first, second)


def _summary(name: str, history: RotationHistory, metric: float | None) -> Summary:
    final = [value for value in history.final("rotation").values() if math.isfinite(value)]
    return Summary(
        name,
        history.steps[-1] if history.steps else 0,
        len(history.layer_names),
        math.fsum(final) / len(final) if final else None,
        min(final, default=None),
        max(final, default=None),
        _straightness(history),
        metric,
        tuple(finding_lines(history)),
    )


def _straightness(history: RotationHistory) -> float | None:
    return read_straightness(Measures(history)) if history.steps and history.layer_names else None


def _metrics(facts: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are finite numbers; files can hold anything."""
    metrics = facts.get("metrics")
    if not isinstance(metrics, Mapping):
        return {}
    return {str(name): value for name in metrics if (value := number(metrics, name)) is not None}


def _chosen(metrics: Sequence[Mapping[str, float]]) -> str | None:
    """The metric that two runs have at least, and that says most: of validation, then accuracy-like, then loss-like."""
    counts = {name: sum(name in own for own in metrics) for name in union(metrics)}
    known = [name for name, count in counts.items() if _direction(name) and count > 1]
    return max(
        known,
        key=lambda name: (bool(_VALIDATION.search(name)), counts[name], _direction(name) == "max", -len(name)),
        default=None,
    )


def _direction(metric: str | None) -> Mode | None:
    if metric is None:
        return None
    found = [word.lower() for word in _WORD.findall(metric)]
    # As they stand (r2, top5) and without a number behind them (acc1).
    words = [form for word in found for form in (word, word.rstrip("0123456789"))]
    if any(map(_SMALLER_IS_BETTER.fullmatch, words)):
        return "min"
    return "max" if any(map(_LARGER_IS_BETTER.fullmatch, words)) else None


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts by dotted names, and what is no number, switch or text as JSON."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if key in _NO_SETTINGS:
            continue
        if isinstance(value, Mapping):
            flat.update({f"{key}.{part}": inner for part, inner in _settings(value).items()})
        else:
            flat[key] = value if isinstance(value, (str, int, float)) or value is None else json.dumps(value)
    return flat


def _mean(run: Summary) -> float:
    return math.nan if run.mean is None else run.mean


def _metric_text(value: float | None) -> str:
    return three_digits(math.nan if value is None else value)
