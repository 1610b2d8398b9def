"""Tables and figures of ``docs/tuning.md`` out of the committed results; trains nothing.

    uv run benchmarks/tuning_report.py

Replays the methods over the recorded runs, so that every number on the page has its run. ``--check`` writes nothing
and fails where the page's tables are not what the results say.
"""

import argparse
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuning_rules import METHODS, REPAIRS
from tuning_trials import CAP, DEFAULT, FINDER, RANDOM, Ladder, Trial, correlations, load, spreads

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
GOAL = 1.0  # points
PRIMARY = "valley and below"


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def capped(trials: Sequence[Trial]) -> float:
    return mean([min(CAP, trial.regret) for trial in trials])


def by(trials: Sequence[Trial], *names: str) -> dict[Any, list[Trial]]:
    """Trials in groups of equal fields."""
    groups: dict[Any, list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[tuple(getattr(trial, name) for name in names)].append(trial)
    return groups


def of_ladders_with(method: str, trials: Sequence[Trial]) -> list[Trial]:
    """The trials on the same ladders as this method's, to compare like with like."""
    groups = by(trials, "task", "optimizer", "seed").values()
    return [trial for group in groups if any(one.method == method for one in group) for trial in group]


def summary_table(trials: Sequence[Trial], names: Sequence[str] = (*METHODS, FINDER, DEFAULT, RANDOM)) -> str:
    """Methods over all tasks and optimizers: what a user may expect."""
    rows = [
        "| | steps (runs) | mean regret | median | 90 % | above 1 point | of cells | largest | rate off by > ×10 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        own = [trial for trial in trials if trial.method == name]
        if not own:
            continue
        regrets = sorted(trial.regret for trial in own)
        # Where another rate does as well, a rate is not wrong.
        off = [t for t in own if t.regret > GOAL and abs(math.log10(t.off)) > 1 + 1e-3]
        wrong = "-" if name == RANDOM else f"{len(off)} of {len(own)}"
        above = sum(value > GOAL for value in regrets)
        most = max(trial.cost for trial in own)
        cells = [capped(group) > GOAL for group in by(own, "task", "optimizer", "start").values()]
        rows.append(
            f"| {name} | {mean([t.cost for t in own]):.1f}, at most {most:.1f} | {capped(own):.2f} | "
            f"{quantile(regrets, 0.5):.2f} | {quantile(regrets, 0.9):.1f} | {above} of {len(own)} | "
            f"{sum(cells)} of {len(cells)} | {regrets[-1]:.1f} | {wrong} |"
        )
    return "\n".join(rows)


def task_table(trials: Sequence[Trial], names: Sequence[str]) -> str:
    """Regret by task and optimizer: mean and standard deviation over seeds, and the worst start."""
    rows = ["| task, optimizer | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for (task, optimizer), group in by(trials, "task", "optimizer").items():
        cells = [regret_cell([trial for trial in group if trial.method == name]) for name in names]
        rows.append(f"| {task}, {optimizer} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def regret_cell(trials: Sequence[Trial]) -> str:
    """``mean±sd`` of the seeds at the worst start; the mean of all starts behind it where there are several."""
    if not trials:
        return "-"
    starts = by(trials, "start").values()
    worst = max(starts, key=capped)
    seeds = [min(CAP, trial.regret) for trial in worst]
    spread = f"±{statistics.stdev(seeds):.1f}" if len(seeds) > 1 else ""
    everywhere = f" ({capped(trials):.1f})" if len(starts) > 1 else ""
    return f"{mean(seeds):.1f}{spread}{everywhere}"


def goal_table(trials: Sequence[Trial], primary: str) -> str:
    """The goal that was written down, task by task."""
    rows = [
        f"| task | starts within {GOAL:g} point | worst | finder's regret is larger | rate off by more than ×10 |",
        "|---|---|---|---|---|",
    ]
    for (task,), group in by(trials, "task").items():
        own = [trial for trial in group if trial.method == primary]
        cells = {key: capped(part) for key, part in by(own, "optimizer", "start").items()}
        within = sum(value <= GOAL for value in cells.values())
        where = max(cells, key=cells.__getitem__)
        better = [
            capped([t for t in part if t.method == FINDER]) > capped([t for t in part if t.method == primary])
            for part in by(group, "optimizer").values()
        ]
        off = sum(trial.regret > GOAL and abs(math.log10(trial.off)) > 1 + 1e-3 for trial in own)
        worst = f"{cells[where]:.1f} ({where[0]}, from {start_text(where[1])})"
        rows.append(
            f"| {task} | {within} of {len(cells)} | {worst} | {sum(better)} of {len(better)} | {off} of {len(own)} |"
        )
    return "\n".join(rows)


def start_text(decades: int) -> str:
    """A start as a multiple of the best rate."""
    return "the best rate" if decades == 0 else f"{10.0**decades:g} × the best rate"


def spread_table(ladders_b: Sequence[Ladder]) -> str:
    """Best rate over the rate that a reading points to: what a suggestion is worth."""
    rows = ["| reading | cases | within ×2.5 | within ×5 | within ×10 | 10 % | median | 90 % |", "|" + "---|" * 8]
    for name, ratios in spreads(ladders_b).items():
        logs = sorted(math.log10(ratio) for ratio in ratios)
        within = [f"{sum(abs(value) <= math.log10(limit) + 1e-6 for value in logs)}" for limit in (2.5, 5, 10)]
        quantiles = [f"×{10 ** quantile(logs, share):.2g}" for share in (0.1, 0.5, 0.9)]
        rows.append(f"| {name} | {len(logs)} | " + " | ".join([*within, *quantiles]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and figures of docs/tuning.md.")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=DOCS / "tuning.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the tables differ")
    arguments = parser.parse_args()
    names = ("tuning_fit.json", "tuning.json", "tuning_repair.json")
    fitted, judged, repaired = (load(arguments.results / name) for name in names)
    text = arguments.page.read_text(encoding="utf-8")
    renewed = with_tables(text, tables(judged, repaired))
    if arguments.check:
        sys.exit(0 if renewed == text else f"the tables of {arguments.page} are not what the results say")
    arguments.page.write_text(renewed, encoding="utf-8")
    # Only here: tables need no matplotlib.
    from tuning_figures import draw_generalization, draw_valley

    draw_valley(judged, arguments.page.parent / "tuning-valley.png")
    draw_generalization(correlations([*fitted, *judged]), arguments.page.parent / "tuning-generalization.png")


def tables(judged: Sequence[Ladder], repaired: Sequence[Ladder]) -> dict[str, str]:
    """Every table of the page by its name."""
    trials = [trial for ladder in judged for trial in ladder.trials()]
    both = {PRIMARY: METHODS[PRIMARY], **REPAIRS}
    fresh = [trial for ladder in repaired for trial in ladder.trials(both)]
    return {
        "summary": summary_table(trials),
        "paired": summary_table(of_ladders_with("three runs", trials)),
        "goal": goal_table(trials, PRIMARY),
        "tasks": task_table(trials, (*METHODS, FINDER, DEFAULT, RANDOM)),
        "repair": summary_table(fresh, tuple(both)),
        "repair tasks": task_table(fresh, tuple(both)),
        "spread": spread_table(judged),
        "correlations": correlation_table(correlations(judged)),
    }


def correlation_table(found: Mapping[tuple[str, str], Mapping[str, tuple[float, int]]]) -> str:
    """Median and range over tasks and optimizers."""
    rows = ["| Spearman with the test score | ladders | median | range | above 0.5 | below -0.5 |", "|" + "---|" * 6]
    for name in ("rotation, all runs", "rotation, good runs", "kappa, all runs", "kappa, good runs"):
        values = sorted(entry[name][0] for entry in found.values() if name in entry)
        rows.append(
            f"| {name} | {len(values)} | {quantile(values, 0.5):.2f} | {values[0]:.2f} to {values[-1]:.2f} | "
            f"{sum(value > 0.5 for value in values)} | {sum(value < -0.5 for value in values)} |"
        )
    return "\n".join(rows).replace("kappa", "straightness")


def with_tables(text: str, made: Mapping[str, str]) -> str:
    """The page with each table between its two comments replaced."""
    for name, table in made.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"the page must have one table {name!r}, got {count}")
    return text


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the values; they are sorted."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


if __name__ == "__main__":
    main()
