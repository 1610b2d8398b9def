"""What LayerRotationMonitor adds to a training step, beside what others do to watch weights; and the memory it takes.

    uv run --no-dev --group benchmarks benchmarks/monitor.py

**Time.** A real `Trainer.fit` on one thread, fused AdamW, no logger. All contenders are callbacks of one trainer and
read the same weights in every step, one after the other; steps are the rounds. What is timed of the monitors are their
hooks `on_before_optimizer_step` and `on_train_batch_end`, as Lightning calls them. There is one monitor for each kind
of step: one that reads everything in every step (`every_n_steps=1`: a copy before the step, then rotation, norms and
the angle of the step, into the history); one in its dense first tenth, away from its cadence (copy and angles only);
one that has nothing to read, and then reads rotation and norms without angles, as it does before a validation. A step's
own time is forward, backward and fused AdamW, without the contenders. Before each timed hook 128 MB are written over,
untimed, so that nobody finds the weights in a cache that its neighbour left them in. The clock is the CPU time of this
process: it does not count what others do on a shared machine (nor what W&B's own process does). A figure is the median
over steps of (time of the hooks / own time of the step). "cadence" is one step that reads everything among 49 that read
nothing, "dense" one among 49 that read angles, both from times in the same step, and "whole" a training of 10,000
steps, of which 1,000 are dense.

Rivals: `1 - F.cosine_similarity(w, w0)` and `w·w0`, `|w|`, `|w0|`, each with `.item()`, layer by layer; and what
`wandb.watch(log="parameters")` does in a step that it logs: histograms of all parameters (also biases and embeddings)
and their commit, in an offline run.

Workloads are those of training_step.py, and stacks of 300 and 3,000 layers of 64×64. Each has several short fits, taken
in turns, so that a slower minute of a shared machine hits all of them; two steps of each warm up. Garbage collection is
off while they run. About five minutes.

**Memory.** In units of the monitored weights, from the allocator's own record of one hook each in a fit of its own:
what the start of training keeps, what the copy before a step adds, what is left of that after reading, and what hooks
take for a moment on top.
"""

import argparse
import gc
import json
import logging
import os
import shlex
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import wandb
from contenders import machine
from monitor_callbacks import (
    ANGLES,
    EVERYTHING,
    NOTHING,
    ROTATION,
    STEP,
    STEPS,
    First,
    Last,
    Recorded,
    Rivals,
    Stop,
    Timed,
    Times,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from training_step import WORKLOADS as NETWORKS

from pl_layer_rotation import select_layers

WARM_UP = 2
CADENCE = 50  # Lightning's log_every_n_steps
# Percent of a training step of the GPT.
AIMS = {EVERYTHING: 0.5, ROTATION: 0.5, "cadence": 0.05, "dense": 1.5}
FEW, MANY = "300 x 64x64", "3000 x 64x64"


class Stack(nn.Module):
    """So many layers of one small size, each added to its input."""

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for layer in self.layers:
            x = x + layer(x) / len(self.layers) ** 0.5
        return x


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 64), torch.randint(64, (64,))


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    **NETWORKS,
    FEW: (lambda: Stack(300), vectors),
    MANY: (lambda: Stack(3000), vectors),
}


class Endless(IterableDataset):
    """New batches."""

    def __init__(self, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batch after batch."""
        while True:
            yield self.make()


class Task(pl.LightningModule):
    """Classification by a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


def fit(workload: str, callbacks: list[pl.Callback], steps: int = STEPS) -> None:
    make_model, make_data = WORKLOADS[workload]
    torch.manual_seed(0)
    task = Task(make_model())
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(Endless(make_data), batch_size=None))


def measure_time(workload: str, rounds: int, run: Any) -> list[dict[str, float]]:
    """Seconds by contender in each step of one fit, after the warm-up."""
    times = Times()
    first = First(times)
    monitors = [Timed(kind, times) for kind in (EVERYTHING, ANGLES, NOTHING)]
    gc.collect()
    gc.disable()
    fit(workload, [first, *monitors, Rivals(times, run), Last(first, WARM_UP + rounds)])
    gc.enable()
    # Each did what it stands for (the last row of the others is that of the end of training).
    readings = [monitor.history.facts.get("angle_readings", 0) for monitor in monitors]
    assert readings == [WARM_UP + rounds, WARM_UP + rounds, 0]
    assert [len(monitor.history) for monitor in monitors] == [WARM_UP + rounds, 1, 1]
    return times.rows[WARM_UP:]


def measure_memory(workload: str) -> dict[str, Any]:
    """Bytes in units of the monitored weights, by kind of step."""
    result: dict[str, Any] = {}
    for kind in (EVERYTHING, ANGLES):
        monitor = Recorded(kind)
        # Ten times as many steps are announced, so that both are dense.
        fit(workload, [monitor, Stop(1)], steps=10)
        start, copied, read = (monitor.bytes[name] for name in ("start", "copy", "read"))
        result[kind] = {
            "reference": round(start["lasting"] / monitor.unit, 4),
            "copy": round(copied["lasting"] / monitor.unit, 4),
            "after reading": round((copied["lasting"] + read["lasting"]) / monitor.unit, 4),
            "momentary": round(max(copied["peak"] - copied["lasting"], read["peak"]) / monitor.unit, 4),
        }
        result["megabytes of weights"] = round(monitor.unit / 2**20, 1)
    return result


def shares(row: dict[str, float]) -> dict[str, float]:
    """Percent of a step's own time: each contender, and what a monitor takes on average in stretches of training."""
    result = {name: 100 * seconds / row[STEP] for name, seconds in row.items() if name != STEP}
    result["cadence"] = (result[EVERYTHING] + (CADENCE - 1) * result[NOTHING]) / CADENCE
    result["dense"] = (result[EVERYTHING] + (CADENCE - 1) * result[ANGLES]) / CADENCE
    result["whole"] = 0.1 * result["dense"] + 0.9 * result["cadence"]
    return result


def summary(workload: str, fits: list[list[dict[str, float]]]) -> dict[str, Any]:
    rows = [row for fit_ in fits for row in fit_]
    columns = [shares(row) for row in rows]
    percent = {}
    for name in columns[0]:
        values = sorted(column[name] for column in columns)
        percent[name] = {
            "median": float(f"{statistics.median(values):.4g}"),
            "quartiles": [float(f"{values[i]:.4g}") for i in (len(values) // 4, -1 - len(values) // 4)],
        }
    return {
        "layers": len(select_layers(WORKLOADS[workload][0]())),
        "step_milliseconds": round(1000 * statistics.median(row[STEP] for row in rows), 2),
        "milliseconds": {
            name: round(1000 * statistics.median(row[name] for row in rows), 4) for name in rows[0] if name != STEP
        },
        "percent_of_step": percent,
    }


def per_layer(results: dict[str, Any], fits: dict[str, list[list[dict[str, float]]]]) -> dict[str, Any]:
    """Microseconds a layer at 300 and 3,000 layers, and their ratio: over all steps, and in each turn of fits."""
    result = {}
    for name in results[FEW]["milliseconds"]:
        few, many = (1000 * results[w]["milliseconds"][name] / results[w]["layers"] for w in (FEW, MANY))
        turns = [
            statistics.median(row[name] for row in b) / statistics.median(row[name] for row in a) / 10
            for a, b in zip(fits[FEW], fits[MANY], strict=True)
        ]
        result[name] = {
            "microseconds": [round(few, 3), round(many, 3)],
            "ratio": round(many / few, 3),
            "ratio_by_turn": [round(turn, 3) for turn in turns],
        }
    return result


def print_aims(results: dict[str, Any], layers: dict[str, Any]) -> None:
    gpt = results.get("GPT 10.8 M")
    for name, aim in AIMS.items() if gpt else ():
        value = gpt["percent_of_step"][name]["median"]
        print(f"GPT, {name}: {value:.3f} % of a step, aim {aim} %: {'met' if value <= aim else 'MISSED'}")
    for name in (EVERYTHING, ANGLES, ROTATION) if layers else ():
        few, many = layers[name]["microseconds"]
        verdict = "met" if many <= few else "MISSED"
        print(f"{name}: {few:.2f} µs a layer of 300, {many:.2f} of 3,000, aim no more: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of LayerRotationMonitor in a training step, and its memory.")
    parser.add_argument("--rounds", type=int, default=5, help="steps of a fit")
    parser.add_argument("--fits", type=int, default=3, help="fits of each workload")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--no-wandb", action="store_true", help="leave wandb.watch out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    fits: dict[str, list[list[dict[str, float]]]] = {name: [] for name in arguments.workloads}
    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True)
        run = None if arguments.no_wandb else wandb.init(mode="offline", dir=folder, project="-", settings=settings)
        for _ in range(arguments.fits):
            for name in arguments.workloads:
                fits[name].append(measure_time(name, arguments.rounds, run))
        if run:
            run.finish()
    results = {name: summary(name, measured) for name, measured in fits.items()}
    for name, row in results.items():
        cells = (
            f"{k} {v:.3f} ms ({row['percent_of_step'][k]['median']:.3f} %)" for k, v in row["milliseconds"].items()
        )
        print(f"{name}: step {row['step_milliseconds']:.0f} ms, {row['layers']} layers  ", "  ".join(cells))
        averages = (f"{k} {row['percent_of_step'][k]['median']:.4f} %" for k in ("cadence", "dense", "whole"))
        print(f"{name}: ", "  ".join(averages), flush=True)
    layers = per_layer(results, fits) if {FEW, MANY} <= fits.keys() else {}
    memory = {name: measure_memory(name) for name in arguments.workloads if name in ("GPT 10.8 M", FEW)}
    for name, row in memory.items():
        print(f"{name}: memory in units of the weights", row)
    print_aims(results, layers)
    if arguments.output:
        facts = machine("cpu")
        facts["versions"].update({name: version(name) for name in ("pytorch-lightning", "wandb")})
        result = {
            "command": f"benchmarks/monitor.py {shlex.join(sys.argv[1:])}",
            "percent_of_step": "median over steps of the hooks' time / that of forward + backward + fused AdamW",
            "memory": "in units of the monitored weights",
            **facts,
            "aims_percent_of_gpt_step": AIMS,
            "workloads": results,
            "per_layer": layers,
            "memories": memory,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
