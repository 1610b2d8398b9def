"""What a reading costs to log to W&B, beside other ways to log something of every layer.

    uv run --no-dev --group benchmarks benchmarks/loggers.py

Real `Trainer.fit`s on one thread with a `WandbLogger(mode="offline")`, of a module with 30, 300 or 1,000 layers of
64×64 whose training step does next to nothing but log one loss. In every step each contender logs something of every
layer: `LayerRotationMonitor` its rotation and aggregates (values that were read before: this is the cost of logging,
benchmarks/monitor.py has that of reading); "one call" the same number of values in one `logger.log_metrics`, the least
that anybody can do; "key by key" one `logger.log_metrics` a layer; "log_dict" the module's own `log_dict`;
"wandb.watch" `logger.watch(log="parameters")`, which makes histograms of the weights first. A step's time is that from
its start to the start of the next, so that work which Lightning or W&B put off until then is in it; a figure is the
median over steps, less the median step of fits without a contender. Every contender has a run and a fit of its own,
taken in turns. Beside the median stand the fastest step, and the CPU time of this process: neither counts what others
do on a shared machine, the latter nor what W&B's own process does.

"charts" is one sending of the three figures of 400 readings, of which a training makes five.

(Called logging.py, this file would hide Python's module of that name from every script in the folder.)
"""

import argparse
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import wandb
from contenders import machine
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_layer_rotation import RotationHistory
from pl_layer_rotation._log_keys import log_keys
from pl_layer_rotation._output import Attempts, Output
from pl_layer_rotation.report.wandb_sink import log_charts, prepare_run

WARM_UP = 2
READINGS = 400
NOTHING, MONITOR = "nothing", "LayerRotationMonitor"
AIM = 10.0  # milliseconds a reading of 1,000 layers


class Task(pl.LightningModule):
    """Many layers and hardly any work."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(layers))
        self.head = nn.Linear(1, 1)
        self.logs: Callable[[int], None] = lambda step: None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: D102
        self.logs(batch_idx)
        loss = self.head(batch).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.SGD(self.head.parameters(), lr=0.0)


class Clock(pl.Callback):
    """Wall and CPU seconds from the start of each step to that of the next."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: D102
        self.ticks.append((time.perf_counter(), time.process_time()))

    def times(self) -> list[tuple[float, float]]:
        """Of all steps but the first ones and the last."""
        pairs = zip(self.ticks[WARM_UP:], self.ticks[WARM_UP + 1 :], strict=False)
        return [(b[0] - a[0], b[1] - a[1]) for a, b in pairs]


def with_nothing(task: Task, logger: WandbLogger) -> None:
    """The step alone."""


def with_monitor(task: Task, logger: WandbLogger) -> None:
    """What LayerRotationMonitor does with a reading."""
    names = [f"layers.{i}" for i in range(len(task.layers))]
    history = RotationHistory(names, [(64, 64)] * len(names), {"total_steps": 10**6})
    output = Output(["rotation"], False, Attempts())

    def log(step: int) -> None:
        if step == 0:
            output.prepare(task.trainer, history)
        reading = {"rotation": values(names), "norm_ratio": values(names), "straightness": values(names)}
        history.append(step + 1, **reading)
        output.log(task.trainer, history, step + 1, reading, False)

    task.logs = log


def with_one_call(task: Task, logger: WandbLogger) -> None:
    """All values in one row."""
    keys = log_keys([f"layers.{i}" for i in range(len(task.layers))])
    task.logs = lambda step: logger.log_metrics(dict(zip(keys, values(keys), strict=True)), step)


def with_key_by_key(task: Task, logger: WandbLogger) -> None:
    """One row a layer."""
    keys = log_keys([f"layers.{i}" for i in range(len(task.layers))])

    def log(step: int) -> None:
        for key, value in zip(keys, values(keys), strict=True):
            logger.log_metrics({key: value}, step)

    task.logs = log


def with_log_dict(task: Task, logger: WandbLogger) -> None:
    """Lightning's own way."""
    keys = log_keys([f"layers.{i}" for i in range(len(task.layers))])
    task.logs = lambda step: task.log_dict(dict(zip(keys, values(keys), strict=True)))


def with_watch(task: Task, logger: WandbLogger) -> None:
    """Histograms of the weights."""
    logger.watch(task, log="parameters", log_freq=1)
    # Its hook waits for a forward pass of the module itself, which Lightning does not make.
    task.forward = lambda: None  # type: ignore[method-assign]
    task.logs = lambda step: task()


CONTENDERS = {
    NOTHING: with_nothing,
    MONITOR: with_monitor,
    "one call": with_one_call,
    "key by key": with_key_by_key,
    "log_dict": with_log_dict,
    "wandb.watch": with_watch,
}


def values(names: list[str]) -> list[float]:
    return [random.random() for _ in names]


def start_run(folder: str) -> Any:
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True)
    return wandb.init(mode="offline", dir=folder, project="-", settings=settings)


def measure(contender: str, layers: int, steps: int, folder: str) -> list[tuple[float, float]]:
    """Seconds of each step of one fit."""
    run, task, clock = start_run(folder), Task(layers), Clock()
    logger = WandbLogger(experiment=run)
    CONTENDERS[contender](task, logger)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[clock],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(torch.ones(WARM_UP + steps + 1, 1)))
    keys = [key for key in dict(run.summary) if str(key).startswith(("layer_rotation/", "parameters/"))]
    # Each logged something of every layer (`watch` also of the head).
    assert contender == NOTHING or len(keys) in (layers, layers + 2), (contender, len(keys))
    run.finish()
    return clock.times()


def measure_charts(layers: int, folder: str) -> tuple[float, float]:
    """Seconds of one sending of the charts."""
    history = RotationHistory([f"layers.{i}" for i in range(layers)], [(64, 64)] * layers)
    for step in range(READINGS):
        history.append(step + 1, rotation=values(history.layer_names))
    with start_run(folder) as run:
        prepare_run(run, history, [])
        start = time.perf_counter(), time.process_time()
        log_charts(run, history, READINGS)
        return time.perf_counter() - start[0], time.process_time() - start[1]


def milliseconds(times: list[tuple[float, float]], base: list[tuple[float, float]] | None = None) -> dict[str, float]:
    """Median and fastest by the wall clock, and median CPU time, less those of the base."""
    wall, cpu = zip(*times, strict=True)
    own = {"wall": statistics.median(wall), "fastest": min(wall), "cpu": statistics.median(cpu)}
    less = milliseconds(base) if base else dict.fromkeys(own, 0.0)
    return {name: round(1000 * seconds - less[name], 3) for name, seconds in own.items()}


def summary(fits: dict[str, list[tuple[float, float]]], charts: list[tuple[float, float]]) -> dict[str, Any]:
    own = {name: milliseconds(times, fits[NOTHING]) for name, times in fits.items() if name != NOTHING}
    ratios = {
        name: {clock: round(cost[clock] / own[MONITOR][clock], 2) for clock in cost} for name, cost in own.items()
    }
    return {
        "step_milliseconds": milliseconds(fits[NOTHING]),
        "milliseconds_a_reading": own,
        "ratio_to_monitor": ratios,
        "charts_milliseconds": milliseconds(charts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of logging a reading to W&B.")
    parser.add_argument("--layers", type=int, nargs="+", default=[30, 300, 1000])
    parser.add_argument("--steps", type=int, default=15, help="timed steps of a fit")
    parser.add_argument("--fits", type=int, default=3, help="fits of each contender")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    results, load = {}, [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        for layers in arguments.layers:
            fits: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
            charts = []
            for _ in range(arguments.fits):
                for name in CONTENDERS:
                    fits[name] += measure(name, layers, arguments.steps, folder)
                charts.append(measure_charts(layers, folder))
            results[layers] = summary(fits, charts)
            load.append(os.getloadavg()[0])
            costs = results[layers]["milliseconds_a_reading"]
            cells = [f"{name} {' / '.join(f'{value:.1f}' for value in cost.values())}" for name, cost in costs.items()]
            print(f"{layers} layers, ms a reading (median / fastest / CPU): ", "  ".join(cells), flush=True)
            step, drawing = (results[layers][key] for key in ("step_milliseconds", "charts_milliseconds"))
            print(f"  a step without: {step['wall']:.2f} ms, the charts once: {drawing['wall']:.0f} ms")
    if 1000 in results:
        cost = results[1000]["milliseconds_a_reading"][MONITOR]
        for clock, value in cost.items():
            print(f"1,000 layers, {clock}: {value} ms a reading, aim {AIM}: {'met' if value <= AIM else 'MISSED'}")
    if arguments.output:
        facts = machine("cpu")
        facts["versions"].update({name: version(name) for name in ("pytorch-lightning", "wandb", "plotly")})
        result = {
            "command": f"benchmarks/loggers.py {shlex.join(sys.argv[1:])}",
            "milliseconds": "median step of fits with a contender less that of fits without",
            **facts,
            "load_average": [round(value, 1) for value in load],
            "aim_milliseconds_for_1000_layers": AIM,
            "layers": results,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
