"""The figures of ``docs/tuning.md``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from tuning_trials import Ladder

COLORS = {"SGD": "tab:blue", "AdamW": "tab:orange", "Layca(SGD)": "tab:green", "Layca(AdamW)": "tab:red"}


def draw_valley(ladders_b: Sequence[Ladder], path: Path) -> None:
    """κ of probes and points lost by whole runs, against the rate."""
    tasks = list(dict.fromkeys(ladder.task for ladder in ladders_b))
    figure, axes = plt.subplots(2, len(tasks), figsize=(2.3 * len(tasks), 5), sharex=True, sharey="row", squeeze=False)
    for ladder, column in ((ladder, tasks.index(ladder.task)) for ladder in ladders_b):
        color, best = COLORS[ladder.optimizer], ladder.best["rate"]
        kappas, losses = curves(ladder)
        axes[0, column].plot([x / best for x in kappas], list(kappas.values()), color=color, lw=0.8)
        axes[1, column].plot([x / best for x in losses], list(losses.values()), ".", color=color, ms=3)
    for column, task in enumerate(tasks):
        axes[0, column].set(title=task.replace(", ", ",\n"), xscale="log", xlim=(1e-3, 300), ylim=(0.4, 1.5))
        axes[0, column].title.set_fontsize(9)
        axes[1, column].set(xlabel="rate / grid's best", yscale="symlog", ylim=(-3, 120))
        for axis in axes[:, column]:
            axis.axvline(1.0, color="0.8", zorder=0)
    axes[0, 0].set_ylabel("straightness κ\nat 10 % of the run")
    axes[1, 0].set_ylabel("test points below\nthe grid's best")
    handles = [plt.Line2D([], [], color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curves(ladder: Ladder) -> tuple[dict[float, float], dict[float, float]]:
    """By rate: κ at a tenth of the run where a probe or a run read it, and regret of the whole runs."""
    kappas, losses = {}, {}
    for (value, decay), record in sorted(ladder.whole.items()):
        if decay == ladder.decay:
            losses[value] = ladder.regret(record)
            kappas[value] = (record.get("at_10") or {}).get("kappa")
    for (value, _), record in ladder.probes.items():
        kappas.setdefault(value, (record.get("at_10") or {}).get("kappa"))
    return {value: kappas[value] for value in sorted(kappas) if kappas[value] is not None}, losses


def draw_generalization(found: Mapping[tuple[str, str], Mapping[str, tuple[float, int]]], path: Path) -> None:
    """Rank correlations with the test score, one point for each task and optimizer."""
    tasks = list(dict.fromkeys(task for task, _ in found))
    names = ("rotation, all runs", "rotation, good runs", "kappa, all runs", "kappa, good runs")
    figure, axes = plt.subplots(1, 4, figsize=(11, 0.33 * len(tasks) + 1.6), sharex=True, sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for (task, optimizer), values in found.items():
            if name in values:
                shift = 0.15 * (list(COLORS).index(optimizer) - 1.5)
                axis.plot(values[name][0], tasks.index(task) + shift, "o", color=COLORS[optimizer], ms=5)
        axis.axvline(0, color="0.7", zorder=0)
        axis.set(title=name.replace("kappa", "straightness"), xlim=(-1.05, 1.05), xlabel="Spearman with the test score")
        axis.title.set_fontsize(10)
    axes[0].set_yticks(range(len(tasks)), tasks)
    axes[0].invert_yaxis()
    handles = [plt.Line2D([], [], color=color, marker="o", ls="", label=name) for name, color in COLORS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
