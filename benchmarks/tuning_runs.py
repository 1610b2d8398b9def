"""One training of the tuning study, what it leaves in the file of runs, and Lightning's learning-rate finder on it.

Trainings are bare loops, so that thousands fit into an hour; straightness is read at the steps and by the code of
:class:`LayerRotationMonitor` (``tests/test_tuning.py`` compares the two).
"""

import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tuning_tasks import PART, TASKS, Data, Task

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation import layca_optimizers, select_layers
from pl_layer_rotation._running_sums import RunningSums, straightness

MOMENTUM = 0.9  # of SGD, and the first beta of AdamW
DECAY = {"SGD": 5e-4, "AdamW": 0.01}  # Layca's layers have none
MARKS = (0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the run at which straightness is kept
STILL = 1e-8  # rotation of a layer that hardly moved


class Gauge:
    """Reads angles as the monitor does by default: all of the first tenth, then 60 in all."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        self.layers = {name: weight.detach() for name, weight in select_layers(net).items()}
        self.start = self._copy()
        self.dense, self.every = min(1000, int(0.1 * steps)), max(1, min(50, steps // 60))
        self.sums, self.middle = RunningSums(), self.start
        self.squares_then = [0.0] * len(self.layers)
        self.before: list[Tensor] | None = None

    def before_step(self, step: int) -> None:
        """Copy the weights where this step's angle is read."""
        due = step <= self.dense or step % self.every == 0
        self.before = self._copy() if due else None

    def after_step(self, step: int) -> None:
        """Read the angle of the step."""
        if self.before is not None:
            self.sums.add(list(self.layers), geometry.angle(self._distance(self.before)), step)

    def reading(self) -> dict[str, list[float]]:
        """Rotation, path, sum of squares and straightness by layer."""
        rotation, sums = self._distance(self.start).tolist(), self.sums.values(list(self.layers))
        kappa = straightness(rotation, sums["path_square"], MOMENTUM)
        return {"rotation": rotation, "path": sums["path"], "square": sums["path_square"], "kappa": kappa}

    def start_window(self) -> None:
        """From here on, straightness of the second part alone."""
        self.middle, self.squares_then = self._copy(), self.sums.values(list(self.layers))["path_square"]

    def window(self) -> list[float]:
        """Straightness since :meth:`start_window`."""
        now = self.sums.values(list(self.layers))["path_square"]
        squares = [later - then for later, then in zip(now, self.squares_then, strict=True)]
        return straightness(self._distance(self.middle).tolist(), squares, MOMENTUM)

    def _copy(self) -> list[Tensor]:
        return [weight.clone() for weight in self.layers.values()]

    def _distance(self, reference: list[Tensor]) -> Tensor:
        weights = list(self.layers.values())
        return geometry.cosine_distance(geometry.rotation_sums(weights, reference, [True] * len(weights))[0])


def key(task: str, optimizer: str, rate: float, decay: float, seed: int, share: float = 1.0) -> str:
    """What makes a run the same run."""
    return f"{task}|{optimizer}|{rate:.4g}|{decay:g}|{seed}" + ("" if share == 1.0 else f"|{share:g}")


def recipe(net: nn.Module, optimizer: str, rate: float, decay: float, steps: int) -> tuple[Any, Any]:
    """The optimizer with its cosine schedule to 0."""

    def cosine(made: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(made, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    if optimizer.startswith("Layca"):
        if optimizer == "Layca(SGD)":
            made = layca_optimizers(net, lr=rate, base="SGD", momentum=MOMENTUM, schedule=cosine)
        else:
            made = layca_optimizers(net, lr=rate, base="AdamW", schedule=cosine)
        return made["optimizer"], made["lr_scheduler"]["scheduler"]
    if optimizer == "SGD":
        plain: Any = torch.optim.SGD(net.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=decay)
    else:
        plain = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=decay)
    return plain, cosine(plain)


def batches(task: Task, part: PART, seed: int) -> Iterator[PART]:
    """Batches drawn anew in every step."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(part[0]), (task.batch,), generator=generator)
        yield part[0][chosen], part[1][chosen]


def train(
    task: Task, data: Data, optimizer: str, rate: float, decay: float, seed: int, share: float = 1.0
) -> dict[str, Any]:
    """A run, or the first share of its steps: how it ended, and straightness on the way.

    A run that diverged scores as the untrained network does.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    net = task.network()
    made, scheduler = recipe(net, optimizer, rate, decay, task.steps)
    gauge, drawn, readings = Gauge(net, task.steps), batches(task, data.train, seed), {}
    marks = {int(mark * task.steps): mark for mark in MARKS}
    step, last, loss = 0, int(share * task.steps), torch.zeros(())
    for step in range(1, last + 1):
        inputs, targets = next(drawn)
        loss = task.loss(net(inputs), targets)
        made.zero_grad()
        loss.backward()
        gauge.before_step(step)
        made.step()
        scheduler.step()
        gauge.after_step(step)
        if not math.isfinite(loss.item()):
            break
        if step in marks:
            readings[marks[step]] = gauge.reading()
            if marks[step] == 0.5:
                gauge.start_window()
    finite = step == last and math.isfinite(loss.item())
    record: dict[str, Any] = {
        "key": key(task.name, optimizer, rate, decay, seed, share),
        **{"task": task.name, "optimizer": optimizer, "rate": float(f"{rate:.4g}"), "decay": decay, "seed": seed},
        "steps": step,
        **{f"at_{round(100 * mark)}": _summary(reading) for mark, reading in readings.items()},
    }
    if share == 1.0:
        scores = judge(task, net, data) if finite else {}
        finite = finite and all(map(math.isfinite, scores.values()))
        if finite:
            record["train_loss"], record["window"] = _short(loss.item()), _median(gauge.window())
            record["layers"] = {name: [_short(v) for v in readings[1.0][name]] for name in ("rotation", "kappa")}
        else:
            torch.manual_seed(seed)
            scores = judge(task, task.network(), data)
        record |= {name: _short(value) for name, value in scores.items()}
    return {**record, "diverged": not finite, "seconds": round(time.perf_counter() - start, 2)}


@torch.no_grad()
def judge(task: Task, net: nn.Module, data: Data) -> dict[str, float]:
    """Loss, and accuracy where targets are classes, on what chooses and on what is reported."""
    net.eval()
    scores = {}
    for name, (inputs, targets) in (("val", data.validation), ("test", data.test)):
        outputs = net(inputs)
        scores[f"{name}_loss"] = float(task.loss(outputs, targets))
        if task.metric == "accuracy":
            scores[f"{name}_accuracy"] = float((outputs.argmax(-1) == targets).float().mean())
    net.train()
    return scores


class Module(pl.LightningModule):
    """The same training for Lightning."""

    def __init__(self, task: Task, optimizer: str, decay: float) -> None:
        super().__init__()
        self.task, self.optimizer, self.decay = task, optimizer, decay
        self.net, self.lr = task.network(), 1e-3

    def training_step(self, batch: PART) -> Tensor:  # noqa: D102
        return self.task.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:  # noqa: D102
        made, scheduler = recipe(self.net, self.optimizer, self.lr, self.decay, self.task.steps)
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Batches(torch.utils.data.IterableDataset[PART]):
    """The batches of the bare loop."""

    def __init__(self, task: Task, part: PART, seed: int) -> None:
        self.task, self.part, self.seed = task, part, seed

    def __iter__(self) -> Iterator[PART]:
        drawn = batches(self.task, self.part, self.seed)
        return (next(drawn) for _ in range(self.task.steps))


def quiet_trainer(steps: int, folder: str | Path, **options: Any) -> pl.Trainer:
    """A trainer that writes nothing but into this folder."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def find(task: Task, data: Data, optimizer: str, decay: float, seed: int) -> dict[str, Any]:
    """The suggestion of Lightning's learning-rate finder with its defaults: 100 steps from 1e-8 to 1."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(seed)
    module, loader = Module(task, optimizer, decay), Batches(task, data.train, seed)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        found = Tuner(quiet_trainer(task.steps, folder)).lr_find(
            module, train_dataloaders=torch.utils.data.DataLoader(loader, batch_size=None)
        )
    suggestion = found.suggestion() if found else None
    return {
        "key": f"finder|{task.name}|{optimizer}|{seed}",
        **{"task": task.name, "optimizer": optimizer, "seed": seed, "finder": True},
        **{"suggestion": suggestion, "steps": len(found.results["lr"]) if found else 0},
    }


class Runs:
    """The file of finished runs, one line each: what is in it is not run again."""

    def __init__(self, path: Path, folder: Path | None) -> None:
        self.path, self.folder = path, folder
        self.done = {record["key"]: record for record in read(path)}
        self._data: tuple[str, int, Data] | None = None

    def train(
        self, task: str, optimizer: str, rate: float, decay: float | None, seed: int, share: float = 1.0
    ) -> dict[str, Any]:
        """The run, from the file or trained now; a whole run answers for its beginning."""
        decay = DECAY.get(optimizer, 0.0) if decay is None else decay
        names = [key(task, optimizer, rate, decay, seed, part) for part in (1.0, share)]
        for name in names:
            if name in self.done:
                return self.done[name]
        self._add(train(TASKS[task], self.data(task, seed), optimizer, rate, decay, seed, share))
        return self.done[names[1]]

    def find(self, task: str, optimizer: str, seed: int) -> dict[str, Any]:
        """The finder's suggestion, from the file or found now."""
        name = f"finder|{task}|{optimizer}|{seed}"
        if name not in self.done:
            self._add(find(TASKS[task], self.data(task, seed), optimizer, DECAY.get(optimizer, 0.0), seed))
        return self.done[name]

    def data(self, task: str, seed: int) -> Data:
        """A task's data, kept for the next run. Raises FileNotFoundError where there are none."""
        if self._data is None or self._data[:2] != (task, seed):
            self._data = (task, seed, TASKS[task].data(self.folder, seed))
        return self._data[2]

    def _add(self, record: Mapping[str, Any]) -> None:
        self.done[record["key"]] = dict(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file of runs; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _summary(reading: Mapping[str, list[float]]) -> dict[str, float | None]:
    """Medians over the layers that moved."""
    moving = [i for i, rotation in enumerate(reading["rotation"]) if rotation >= STILL]
    return {name: _median([values[i] for i in moving]) for name, values in reading.items()}


def _median(values: list[float]) -> float | None:
    """Of the values that are finite."""
    known = [value for value in values if math.isfinite(value)]
    return _short(statistics.median(known)) if known else None


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
