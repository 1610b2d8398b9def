"""Can straightness tell the right learning rate from a glance at a few short runs?

    uv run --no-dev --group benchmarks benchmarks/tuning.py fit --data-dir DATA
    uv run --no-dev --group benchmarks benchmarks/tuning.py judge --data-dir DATA
    uv run --no-dev --group benchmarks benchmarks/tuning_report.py

``fit`` trains ladders of rates on the tasks A, which the rules' constants were chosen on; ``judge`` trains what the
methods and their rivals ask for on the tasks B. ``--output results/tuning_fit.json``, ``results/tuning.json`` and, with
``--seeds 20 21 22 --methods "valley and below" "first valley, downhill"``, ``results/tuning_repair.json`` are what
``tuning_report.py`` makes the tables and figures of ``docs/tuning.md`` of. What was written down before each of them is
in ``tuning_plan.md``. Every run goes into the file ``--runs`` as it ends, and is not trained again.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import machine
from tuning_rules import DECADE, DEFAULT_RATE, GRID, METHODS, REPAIRS, STARTS, Show, Shown, rate, score
from tuning_runs import Runs, read
from tuning_tasks import OPTIMIZERS, SEEDS, TASKS
from tuning_trials import pack

SLOW = ("CIFAR conv", "CIFAR residual", "GPT, Shakespeare, long")
LADDER = {"SGD": range(-11, 4), "AdamW": range(-15, 1), "Layca(SGD)": range(-11, 2), "Layca(AdamW)": range(-13, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning rates by straightness, and their rivals.")
    parser.add_argument("what", choices=("fit", "judge"))
    parser.add_argument("--data-dir", type=Path, help="MNIST, CIFAR-10, Shakespeare; tasks without data are skipped")
    parser.add_argument("--runs", type=Path, default=Path("tuning.jsonl"), help="file of finished runs")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, help="only these")
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, help="only these")
    parser.add_argument("--methods", nargs="*", choices=[*METHODS, *REPAIRS], help="only these, besides all rivals")
    parser.add_argument("--no-training", action="store_true", help="only write what --runs holds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    group = "A" if arguments.what == "fit" else "B"
    runs = Runs(arguments.runs, arguments.data_dir)
    for seed in () if arguments.no_training else arguments.seeds or SEEDS[group]:
        for name in arguments.tasks or [task.name for task in TASKS.values() if task.group == group]:
            try:
                runs.data(name, seed)
            except FileNotFoundError as error:
                print(f"SKIPPED {name}: {error}", flush=True)
                continue
            for optimizer in arguments.optimizers or optimizers(name):
                if group == "A":
                    ladder(runs, name, optimizer, seed)
                else:
                    judge(runs, name, optimizer, seed, arguments.methods or list(METHODS))
                print(f"{name}, {optimizer}, seed {seed}: {len(runs.done)} runs", flush=True)
    if arguments.output:
        write(arguments.output, arguments, read(arguments.runs))


def optimizers(task: str) -> Sequence[str]:
    """Layca over SGD is left out where a run takes more than a second."""
    return [name for name in OPTIMIZERS if name != "Layca(SGD)" or task not in SLOW]


def ladder(runs: Runs, task: str, optimizer: str, seed: int) -> None:
    for place in LADDER[optimizer]:
        runs.train(task, optimizer, rate(place), None, seed)


def judge(runs: Runs, task: str, optimizer: str, seed: int, methods: Sequence[str]) -> None:
    """Train whatever the methods and their rivals ask for."""
    grid = {(place, decay): runs.train(task, optimizer, rate(place), decay, seed) for place, decay in GRID[optimizer]}
    best = max(grid, key=lambda point: score(grid[point], "val"))[0]
    show = shower(runs, task, optimizer, seed)
    for method, decades in itertools.product(methods, STARTS):
        runs.train(
            task, optimizer, rate({**METHODS, **REPAIRS}[method](best + DECADE * decades, show).place), None, seed
        )
    runs.train(task, optimizer, DEFAULT_RATE[optimizer], None, seed)
    suggestion = runs.find(task, optimizer, seed)["suggestion"]
    if suggestion:
        runs.train(task, optimizer, suggestion, None, seed)


def write(path: Path, arguments: argparse.Namespace, records: Sequence[dict[str, Any]]) -> None:
    """The runs, one a line, under what says where they come from."""
    options = [f"--seeds {' '.join(map(str, arguments.seeds))}"] if arguments.seeds else []
    options += ["--methods " + " ".join(f'"{name}"' for name in arguments.methods)] if arguments.methods else []
    command = " ".join(["benchmarks/tuning.py", arguments.what, "--data-dir DATA", *options])
    text = json.dumps({"command": command, **machine("cpu"), **pack(records)})
    path.write_text(text.replace(", [", ",\n[").replace(", {", ",\n{") + "\n", encoding="utf-8")


def shower(runs: Any, task: str, optimizer: str, seed: int) -> Show:
    """What a run at a place shows, trained when it is asked for."""

    def show(place: int, share: float) -> Shown:
        record = runs.train(task, optimizer, rate(place), None, seed, share)
        reading = record.get(f"at_{round(100 * share)}") or {}
        kappa, diverged = reading.get("kappa"), share == 1.0 and record["diverged"]
        return Shown(kappa, diverged, score(record, "val") if share == 1.0 else float("nan"))

    return show


if __name__ == "__main__":
    main()
