"""What the curves of a run say, in plain words.

Rules and counts come from 444 short training runs of small networks (200 to 6000 steps; MLPs, conv nets, a character
transformer; SGD with momentum, AdamW, Layca), 80 of them healthy. Thresholds were chosen on most of these runs, so the
counts are no blind test; large networks and bfloat16 are untested. "Worse" means a final validation loss more than 5 %
above that of the healthy run with the same seed.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.equilibrium import at_equilibrium
from pl_layer_rotation.report.measures import FEWEST_READINGS, STRAIGHT, Measures, rank_correlation, read_straightness
from pl_layer_rotation.report.named_runs import check_history
from pl_layer_rotation.report.suggestion import TOO_SMALL, is_whole, rate_factor, times_higher
from pl_layer_rotation.report.text import between, listed, two_digits

NOTHING = "No finding. This does not mean that the run is well tuned."

SAME_NORM = 1e-6  # of the norm ratio from 1
HARDLY = 1e-7  # radians a step; rounding alone turns fp32 weights by 3e-8
LAGS = 0.2  # of the typical layer's path; healthy layers have at least 0.27
AHEAD = 4.0  # times the typical layer's path; healthy layers have at most 3.05
STOPPED_EARLY = 0.4  # share of the run with 99 % of the turning; healthy runs have at least 0.6
STOPPED_ALONE = 0.6  # of the median of that share; healthy layers have at least 0.915
SHOCK_RATIO = 3.0  # largest step over the 95th percentile
SHOCK = 0.1  # radians in one step
DIVERGING = 0.5  # radians in one step; healthy runs have at most 0.245
UNEVEN_RATIO = 3.0  # of angles between first and last third of the layers; healthy runs have at most 2.5
UNEVEN_RANK = 0.8  # rank correlation of angle and depth
GREW = 5.0  # median norm ratio; healthy runs have at most 2.5


@dataclass(frozen=True)
class Finding:
    """One thing that the curves say.

    Attributes:
        code: which rule found it: ``"A"`` to ``"K"``, or ``"non-finite"``.
        layers: the layers that it is about, in depth order; empty where it is about the whole run.
        values: the numbers behind it; of several layers those of the one that stands out most.
        sentence: what to show a reader, with the advice where there is one.
        advice: the part of the sentence that says what to do; empty where acting on the finding did not help in tests,
            or was not tested.

    """

    code: str
    layers: tuple[str, ...]
    values: dict[str, float] = field(hash=False)
    sentence: str
    advice: str = ""

    def __str__(self) -> str:
        return self.sentence


def findings(history: RotationHistory) -> list[Finding]:
    """What the curves of a run say, most urgent first; empty where no rule fires.

    Straightness needs the fact ``momentum`` (SGD's momentum or Adam's first beta) and 30 angles. Shocks need the angle
    of every step of the first tenth of the run, or of its first 1000 steps. Without the sums over all steps that
    :class:`~pl_layer_rotation.LayerRotationMonitor` records, each angle stands for the steps since the one before it.

    Args:
        history: the recorded curves.

    Raises:
        TypeError: If it is no history.

    Example::

        >>> history = RotationHistory(["conv", "fc"])
        >>> history.append(100, rotation=[0.1, 0.0], norm_ratio=[1.1, 1.0])
        >>> for finding in findings(history):
        ...     print(finding)
        `fc` did not turn at all: its weights never changed. Frozen, missing from the optimizer, or without gradient.

    """
    check_history(history)
    if not history.steps or not history.layer_names:
        return []
    run = Measures(history)
    ahead = runs_ahead(run)
    # Layca with a rate for each layer: these three would only restate the rates.
    uneven = [] if run.facts.get("layer_multipliers") else [*ahead, *lags(run), *uneven_over_depth(run)]
    if run.facts.get("reference", "init") != "init":
        # From pretrained weights late layers are meant to turn more than early ones.
        uneven = [finding for finding in uneven if finding.code != "I"]
    return [
        *(*not_finite(run), *did_not_turn(run), *diverging(run), *early_shock(run)),
        *uneven,
        *(*stopped_early(run), *stopped_alone(run)),
        *([] if ahead or run.still else straightness(run)),
        *(*weights_grew(run), *equilibrium(run)),
    ]


def finding_lines(history: RotationHistory) -> list[str]:
    """What to show a reader: one sentence a finding, or that there is none.

    Example::

        >>> history = RotationHistory(["conv", "fc"])
        >>> history.append(100, rotation=[0.1, 0.2])
        >>> finding_lines(history)
        ['No finding. This does not mean that the run is well tuned.']

    """
    if not history.steps or not history.layer_names:
        return []
    return [finding.sentence for finding in findings(history)] or [NOTHING]


def not_finite(run: Measures) -> list[Finding]:
    """Weights that became NaN or infinite: a fact, without counts."""
    if not run.lost:
        return []
    named = run.called(run.lost)
    last = min((step for i in run.lost if math.isfinite(step := float(run.last_finite[i]))), default=0.0)
    when = f"after step {last:,.0f}" if last else "at any reading"
    sentence = f"{listed(named)} had no finite weights {when}: training has diverged; lower the learning rate."
    return [Finding("non-finite", named, {"step": last}, sentence, "lower the learning rate")]


def did_not_turn(run: Measures) -> list[Finding]:
    """A. Rotation undefined or below 1e-8 (D where no layer is above, though steps turned them). False alarms 0/80.

    Hits: frozen 23/23, dead ReLU or BatchNorm 16/16, zero-initialized 8/8; vanishing gradient 0/4. Of dead layers 15/16
    made a run worse; of frozen ones the first 7/8, a middle one 5/11, the output 4/4 in loss (accuracy unchanged); of
    outputs that start at zero 2/6.
    """
    norms = run.norm.tolist()
    hardly = [i for i in run.still if float(run.path[i]) > HARDLY * (run.end - run.start)]
    turned_not = [i for i in run.still if i not in run.never and i not in hardly]
    scaled = [i for i in turned_not if abs(norms[i] - 1) > SAME_NORM]
    unchanged = [i for i in turned_not if i not in scaled]
    found = [_hardly_turned(run, hardly)] if hardly else []
    if unchanged:
        named = run.called(unchanged)
        known = all(math.isfinite(norms[i]) for i in unchanged)
        changed = f": {_its(named)} weights never changed" if known else ""
        sentence = (
            f"{listed(named)} did not turn at all{changed}. Frozen, missing from the optimizer, or without gradient."
        )
        found.append(Finding("A", named, {"rotation": 0.0, "norm_ratio": 1.0}, sentence))
    if scaled:
        named, advice = run.called(scaled), "look for dead units"
        low, high = min(norms[i] for i in scaled), max(norms[i] for i in scaled)
        sentence = (
            f"{listed(named)} did not turn at all, only {_its(named)} norm moved ({between(low, high, '×')}): "
            f"weight decay acts but no gradient arrives; {advice}."
        )
        found.append(Finding("A", named, {"rotation": 0.0, "norm_ratio": low}, sentence, advice))
    if run.never:
        named = run.called(run.never)
        found.append(Finding("A", named, {}, _from_zero(named) + ". Usual for an output layer."))
    for step in sorted(set(run.from_zero.values())):
        named = run.called([i for i, start in run.from_zero.items() if start == step])
        sentence = f"{_from_zero(named)} before step {step:,}. Usual for an output layer."
        found.append(Finding("A", named, {"step": step}, sentence))
    return found


def lags(run: Measures) -> list[Finding]:
    """B. Path below 0.2 × that of the typical layer (median of the others, at least two). False alarms 0/80.

    Hits: lr/100 on one layer 14/14, lr/10 on one layer 3/6 (Layca 4/4). A slow first layer made 2/2 runs worse, a slow
    middle layer 5/12, once better.
    """
    # Of three layers, the two beside one that runs ahead would seem to lag.
    relative = run.relative_paths(without=_fast(run))
    slow = [i for i, (ratio, _) in relative.items() if ratio < LAGS]
    if not slow:
        return []
    values, said, advice = _compared(run, slow, relative, min(slow, key=lambda i: relative[i]))
    paths = [float(run.path[i]) for i in slow]
    first = ": slow first layers cost accuracy in our tests" if 0 in slow else ""
    sentence = (
        f"{said} (path {between(min(paths), max(paths))} rad against {two_digits(values['typical_path'])}). "
        f"{advice}{first}."
    )
    return [Finding("B", run.called(slow), values, sentence, advice)]


def runs_ahead(run: Measures) -> list[Finding]:
    """C. Path above 4 × that of the typical layer (median of the others, at least two). False alarms 0/80.

    Hits: lr×100 on one layer 11/11, lr×10 on one layer 0/6, vanishing gradient 2/4, label noise 2/13. 6/11 were worse,
    none was better by more than 5 %.
    """
    relative, fast = run.relative_paths(), _fast(run)
    if not fast:
        return []
    values, said, advice = _compared(run, fast, relative, max(fast, key=lambda i: relative[i]))
    advice = f"{advice} or the gradients of the others"
    return [Finding("C", run.called(fast), values, f"{said}. {advice}.", advice)]


def straightness(run: Measures) -> list[Finding]:
    """D. Median straightness above 1.7: the learning rate is too low. False alarms 0/80.

    Hits: learning rates of at most a 30th of the best 16/17 and (other tasks) 4/4, a tenth of the best 4/15 and 2/2,
    AdamW with eps 0.1 4/5. In ladders of rates it fired 47 times, and the next larger rate gave a lower loss 47/47.
    Needs 30 angles and a tenth of the run. From the half of a run on it says how much higher the best rate is, which
    was judged on other tasks: see ``docs/tuning.md``, and :meth:`RotationHistory.suggest_lr` for the spread.
    """
    median = read_straightness(run)
    if median is None or median <= STRAIGHT:
        return []
    values = {"straightness": median}
    said = f"The layers moved almost straight ({two_digits(median)} × a random walk of the same steps)"
    if not is_whole(run):
        advice = "try ×3"
        return [Finding("D", (), values, f"{said}: the learning rate can probably rise; {advice}.", advice)]
    factor = rate_factor(median)
    advice = f"try ×{two_digits(factor)}"
    sentence = f"{said}: the best learning rate is probably {times_higher(factor)}."
    return [Finding("D", (), {**values, "factor": factor}, sentence, advice)]


def stopped_early(run: Measures) -> list[Finding]:
    """E. In the median over layers 99 % of the path lie in the first 40 % of the run. False alarms 0/80.

    Hits: schedule that decays too early 10/10 (all worse, +20 to 70 %), learning rate of nine times the best or more
    that killed the network 5/15, of ten times 1/2, label noise 1/13.
    """
    shares = list(run.stopped().values())
    if not shares or (median := statistics.median(shares)) >= STOPPED_EARLY:
        return []
    sentence = (
        f"99 % of the turning happened in the first {100 * median:.0f} % of training. If the training loss is not near "
        "zero, the schedule decays too early or the network has died."
    )
    return [Finding("E", (), {"share": median}, sentence)]


def stopped_alone(run: Measures) -> list[Finding]:
    """F. A layer has 99 % of its path before 0.6 × the median of that time. False alarms 0/80.

    Hits: frozen at 30 % of the run 6/6; 2/6 worse, by at most 9 %. Needs two other moving layers.
    """
    shares = run.stopped()
    if len(shares) < 3:
        return []
    early = [i for i, share in shares.items() if share < STOPPED_ALONE * statistics.median(shares.values())]
    if not early:
        return []
    named = run.called(early)
    low, high = min(shares[i] for i in early), max(shares[i] for i in early)
    at = f"{100 * low:.0f}" if f"{low:.2f}" == f"{high:.2f}" else f"{100 * low:.0f} to {100 * high:.0f}"
    sentence = f"{listed(named)} stopped turning at {at} % of training while the others went on."
    return [Finding("F", named, {"share": low}, sentence)]


def early_shock(run: Measures) -> list[Finding]:
    """G. Largest step over the 95th percentile above 3 (median over layers), and a step above 0.1 rad.

    False alarms 1/80 (a run that ended 0.13 nats above its sister seeds). Hits: AdamW without warm-up 4/6, learning
    rate of nine times the best or more 3/15. Warm-up gained 1 to 4 % in the 4 flagged. Needs every step of the start.
    """
    if not run.dense or int(run.thetas.isfinite().any(1).sum()) < FEWEST_READINGS:
        return []
    usual = {i: float(run.thetas[:, i].nanquantile(0.95)) for i in run.moving}
    ratios = {i: run.peak[i] / usual[i] for i in run.moving if usual[i] > 0 and math.isfinite(run.peak[i])}
    if not ratios:
        return []
    largest = max(ratios, key=lambda i: run.peak[i])
    if statistics.median(ratios.values()) <= SHOCK_RATIO or run.peak[largest] <= SHOCK:
        return []
    advice = "try warm-up or a smaller learning rate"
    values = {"angle": run.peak[largest], "step": run.peak_step[largest], "ratio": ratios[largest]}
    sentence = (
        f"The largest step ({two_digits(values['angle'])} rad, step {values['step']:,.0f}) was "
        f"{two_digits(values['ratio'])} × the usual one: {advice}."
    )
    return [Finding("G", (run.names[largest],), values, sentence, advice)]


def diverging(run: Measures) -> list[Finding]:
    """H. A step of more than 0.5 rad. False alarms 0/80 (largest 0.245).

    Hits: runs that ended with weights that are not finite 6/6, 3 to 12 steps before; it also fired on one layer with
    lr×100 (harmless) and one lr×10 (died). Where not every step's angle was read, it may miss.
    """
    large = [i for i in run.measured if run.peak[i] > DIVERGING]
    if not large:
        return []
    largest = max(large, key=lambda i: run.peak[i])
    advice = "lower the learning rate"
    values = {"angle": run.peak[largest], "step": run.peak_step[largest]}
    sentence = (
        f"{listed(run.called([largest]))} turned {two_digits(values['angle'])} rad in one step "
        f"(step {values['step']:,.0f}): training is diverging; {advice}."
    )
    return [Finding("H", run.called(large), values, sentence, advice)]


def uneven_over_depth(run: Measures) -> list[Finding]:
    """I. Mean angles of first and last third apart by more than 3 ×, and rank correlation with depth beyond 0.8.

    False alarms 0/80 (largest ratio 2.5). Hits: Layca with multipliers of strength +0.6 5/6, -0.6 6/6; initialization
    ×10 1/9, learning rate too low 2/32. With slow early layers equal rates were better 6/6; with slow late layers only
    1/4 at the same mean rate, so there is no advice for these.
    """
    angles = [run.angles[i] for i in run.moving]
    if len(angles) < 3:
        return []
    third = len(angles) // 3
    first, last = math.fsum(angles[:third]) / third, math.fsum(angles[-third:]) / third
    rank = rank_correlation(angles, range(len(angles)))
    if max(first, last) <= UNEVEN_RATIO * min(first, last) or abs(rank) <= UNEVEN_RANK or (last > first) != (rank > 0):
        return []
    verb, advice = ("rises", "Try Layca with equal rates") if last > first else ("falls", "")
    sentence = f"Rotation {verb} with depth: first third {two_digits(first)} rad, last third {two_digits(last)} rad."
    values = {"first_third": first, "last_third": last, "rank_correlation": rank}
    return [Finding("I", (), values, f"{sentence} {advice}." if advice else sentence, advice)]


def weights_grew(run: Measures) -> list[Finding]:
    """J. Median norm above 5 × that at the start. False alarms 0/80 (largest 2.5).

    Hits: initialization ×0.1 4/10, learning rate of nine times the best or more 3/15, of ten times 1/2, batch 8 at the
    rate of batch 32 1/1. 8 of the 9 were worse; acting on it was not tested.
    """
    norms = [value for i in run.moving if math.isfinite(value := float(run.norm[i]))]
    if not norms or (median := statistics.median(norms)) <= GREW:
        return []
    sentence = f"Weights grew {two_digits(median)} × in norm: learning rate too high or initialization too small."
    return [Finding("J", (), {"norm_ratio": median}, sentence)]


def equilibrium(run: Measures) -> list[Finding]:
    """K. Layers followed by a norm turn as weight decay predicts (arXiv 2305.17212). A fact, no alarm.

    Observed is the root mean square over the last 20 % of a run at constant rate, with a norm that stays within 10 %.
    After 3.6 time constants 17/17 layers followed by BatchNorm were within 10 %. Others say nothing.
    """
    turned, predicted = at_equilibrium(run)
    normed = run.facts.get("followed_by_norm")
    layers = [i for i in turned if isinstance(normed, (list, tuple)) and run.names[i] in normed]
    if not layers:
        return []
    measured = statistics.median(turned[i] for i in layers)
    span = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    named = run.called(layers)
    shown = "\N{EN DASH}".join(listed([name]) for name in (named[0], named[-1])) if span else listed(named)
    sentence = (
        f"{shown} {'is' if len(named) == 1 else 'are'} in rotational equilibrium: {two_digits(measured)} rad per step, "
        f"predicted {two_digits(predicted)}."
    )
    return [Finding("K", named, {"angle": measured, "predicted": predicted}, sentence)]


def _fast(run: Measures) -> list[int]:
    return [i for i, (ratio, _) in run.relative_paths().items() if ratio > AHEAD]


def _compared(
    run: Measures, layers: Sequence[int], relative: Mapping[int, tuple[float, float]], extreme: int
) -> tuple[dict[str, float], str, str]:
    """The values of the layer that stands out most, how far layers turned beside the typical one, and what to check."""
    (ratio, typical), ratios, named = relative[extreme], [relative[i][0] for i in layers], run.called(layers)
    said = f"{listed(named)} turned {between(min(ratios), max(ratios))} × as much as the typical layer"
    values = {"ratio": ratio, "path": float(run.path[extreme]), "typical_path": typical}
    return values, said, f"Check {_its_groups(named)}"


def _hardly_turned(run: Measures, layers: Sequence[int]) -> Finding:
    """Steps did turn these layers, by more than rounding and too little to read from where to where."""
    named, paths = run.called(layers), [float(run.path[i]) for i in layers]
    said = f"{listed(named)} hardly turned ({between(min(paths), max(paths))} rad in all), too little to read"
    if run.moving:
        advice = f"check {_its_groups(named)}"
        return Finding("A", named, {"path": min(paths)}, f"{said}: {advice}.", advice)
    sentence, advice = f"{said}: try a learning rate {TOO_SMALL:.0f} times higher.", f"try ×{TOO_SMALL:.0f}"
    return Finding("D", named, {"path": min(paths), "factor": TOO_SMALL}, sentence, advice)


def _its(names: Sequence[str]) -> str:
    return "its" if len(names) == 1 else "their"


def _its_groups(names: Sequence[str]) -> str:
    return f"{_its(names)} param group{'' if len(names) == 1 else 's'}"


def _from_zero(names: Sequence[str]) -> str:
    one = len(names) == 1
    verb, they = ("starts", "it has") if one else ("start", "they have")
    return f"{listed(names)} {verb} at zero, so {they} no direction to measure from"
