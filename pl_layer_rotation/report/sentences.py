"""What a run did, in the sentences that stand beside its charts."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.findings import findings
from pl_layer_rotation.report.measures import STRAIGHT, Measures, random_walk, read_straightness
from pl_layer_rotation.report.text import count, listed, origin, three_digits


def headline(history: RotationHistory) -> str:
    """One or two sentences with the numbers that matter.

    Example::

        >>> history = RotationHistory(["a", "b"])
        >>> history.append(10, rotation=[0.1, 0.2])
        >>> headline(history)
        'After 10 optimizer steps: mean rotation 0.150 over 2 layers; `a` turned least (0.100), `b` most (0.200).'

    """
    if not history.layer_names:
        return "This run has no layers to show."
    layers = count(len(history.layer_names), "layer")
    if not history.steps:
        return f"This run has {layers} and no readings yet."
    steps = count(history.steps[-1], "optimizer step")
    final = defined(history)
    if not final:
        return f"After {steps} none of the {layers} has a defined rotation."
    if len(final) < len(history.layer_names):
        layers = f"{len(final):,} of {layers}"
    if len(final) == 1:
        (name, value) = next(iter(final.items()))
        told = f"After {steps}: {layers}, rotation {three_digits(value)} ({listed([name])})."
    else:
        mean = three_digits(math.fsum(final.values()) / len(final))
        told = f"After {steps}: mean rotation {mean} over {layers}; {_extremes(final, 'turned least', 'most')}."
    return f"{told} {_straightness(history)}".strip()


def straightness(history: RotationHistory) -> float | None:
    """The median straightness of a run's layers, where it can be read."""
    return read_straightness(Measures(history)) if history.steps and history.layer_names else None


def notes(history: RotationHistory) -> list[str]:
    """What a reader must know of the values lest they mislead: not defined any more, or measured from elsewhere."""
    final = defined(history)
    if not final:
        return []
    told = []
    for name, since in _undefined_since(history).items():
        told.append(f"{listed([name])} has no defined rotation {since}; shown is the last defined value, if any.")
    if len(told) > 3:
        told = [*told[:2], f"{len(told) - 2} more layers have no defined rotation at the end."]
    later = _measured_later(history)
    for step in sorted(set(later.values())):
        names = [name for name, start in later.items() if start == step]
        told.append(f"{listed(names)}: measured from the weights at step {step:,}, not {origin(history.facts)}.")
    return told


def captions(history: RotationHistory) -> dict[str, str]:
    """What each chart shows, for readers who do not see it.

    Args:
        history: the readings of one run.

    Returns:
        Sentences by the names of the charts: the quantities that are drawn as curves, ``final_rotation`` and
        ``heatmap``; only those that have values.

    Example::

        >>> history = RotationHistory(["conv", "fc"])
        >>> history.append(10, rotation=[0.01, 0.02], norm_ratio=[1.0, 1.1])
        >>> captions(history)["norm_ratio"]
        'At the end: `conv` least (1.00), `fc` most (1.10), median 1.05. 1 is the norm of the reference.'

    """
    writers: Mapping[str, Callable[[RotationHistory, Mapping[str, float]], str]] = {
        "rotation": _rotation_caption,
        "angular_update": _angle_caption,
        "norm_ratio": lambda _, final: f"{_at_the_end(final)} 1 is the norm of the reference.",
        "straightness": _straightness_caption,
    }
    finals = {quantity: defined(history, quantity) for quantity in writers}
    told = {quantity: writers[quantity](history, final) for quantity, final in finals.items() if final}
    if rotation := finals["rotation"]:
        told["final_rotation"] = f"One bar a layer, the first on top. {_thirds(list(rotation.values()))}".strip()
        told["heatmap"] = f"One row a layer, the first on top; brighter is further, up to {_peak(history)}."
    return told


def defined(history: RotationHistory, quantity: str = "rotation") -> dict[str, float]:
    """Each layer's last finite value of a quantity, of the layers that have one."""
    return {name: value for name, value in history.final(quantity).items() if math.isfinite(value)}


def _straightness(history: RotationHistory) -> str:
    value = straightness(history)
    if value is None:
        return ""
    if value <= STRAIGHT:
        meaning = ": no sign that the learning rate is too low"
    else:
        # Not where the rule is silent, because layers that are still or run ahead explain it.
        said = any(finding.code == "D" for finding in findings(history))
        meaning = ": the learning rate is probably too low" if said else ""
    return f"Straightness {three_digits(value)}, where 1 is a random walk{meaning}."


def _extremes(values: Mapping[str, float], least: str, most: str) -> str:
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return (
        f"{listed([low])} {least} ({three_digits(values[low])}), {listed([high])} {most} ({three_digits(values[high])})"
    )


def _at_the_end(final: Mapping[str, float], unit: str = "") -> str:
    median = f"median {three_digits(statistics.median(final.values()))}{unit}"
    return f"At the end: {_extremes(final, 'least', 'most')}, {median}." if len(final) > 1 else f"At the end: {median}."


def _rotation_caption(history: RotationHistory, final: Mapping[str, float]) -> str:
    told = [f"Cosine distance from {origin(history.facts)}.", _at_the_end(final)]
    means = [
        (row["step"], math.fsum(values) / len(values))
        for row in history.state_dict()["rows"]
        if (values := [value for value in row.get("rotation", ()) if math.isfinite(value)])
    ]
    half = next((step for step, mean in means if mean >= means[-1][1] / 2), None)
    if half is not None and len(means) > 2 and means[-1][1] > 0:
        told.append(f"Half of the mean was reached by step {half:,}.")
    walk = random_walk(history)
    if walk:
        told.append(f"Dotted: a random walk with the same steps, {three_digits(walk[max(walk)])} at its end.")
    return " ".join(told)


def _angle_caption(history: RotationHistory, final: Mapping[str, float]) -> str:
    told = [f"Radians that one optimizer step turns a layer. {_at_the_end(final)}"]
    peaks, steps = defined(history, "peak"), history.final("peak_step")
    if peaks and (largest := max(peaks, key=peaks.__getitem__)) and peaks[largest] > 0:
        told.append(f"Largest: {three_digits(peaks[largest])} by {listed([largest])} at step {steps[largest]:,.0f}.")
    if "requested_angle" in history.quantities:
        told.append("Dotted: the angle that the learning rate asks for.")
    return " ".join(told)


def _straightness_caption(history: RotationHistory, final: Mapping[str, float]) -> str:
    low_rate = f"a median above {STRAIGHT:g} points to a learning rate that is too low"
    return f"{_at_the_end(final)} 1 (dotted) is a random walk; {low_rate}, from a tenth of the training on."


def _thirds(values: Sequence[float]) -> str:
    if len(values) < 6:
        return ""
    cuts = [round(i * len(values) / 3) for i in range(4)]
    means = [three_digits(statistics.fmean(values[a:b])) for a, b in itertools.pairwise(cuts)]
    return f"Mean of the first third of the layers {means[0]}, of the second {means[1]}, of the last {means[2]}."


def _peak(history: RotationHistory) -> str:
    rows = history.state_dict()["rows"]
    return three_digits(max(v for row in rows for v in row.get("rotation", ()) if math.isfinite(v)))


def _undefined_since(history: RotationHistory) -> dict[str, str]:
    """Layers without a rotation at the last reading of it, and since when."""
    rows = [(row["step"], row["rotation"]) for row in history.state_dict()["rows"] if "rotation" in row]
    since = {}
    for i, name in enumerate(history.layer_names):
        if math.isfinite(rows[-1][1][i]):
            continue
        known = [k for k, (_, values) in enumerate(rows) if math.isfinite(values[i])]
        since[name] = f"since step {rows[known[-1] + 1][0]:,}" if known else "at any reading"
    return since


def _measured_later(history: RotationHistory) -> dict[str, int]:
    """Layers whose reference is younger than the run; those that only started at zero have a finding."""
    known = history.facts.get("reference_steps")
    if not isinstance(known, Mapping):
        return {}
    return {n: s for n in history.layer_names if isinstance(s := known.get(n), int) and s > history.steps[0]}
