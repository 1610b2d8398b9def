"""The recorded runs of the tuning study, and the methods and rivals replayed over them."""

import contextlib
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tuning_rules import (
    DECADE,
    DEFAULT_RATE,
    GRID,
    METHODS,
    SHORT_RUN,
    STARTS,
    WHOLE_RUN,
    Outcome,
    Show,
    Shown,
    place_of,
    rate,
    score,
)
from tuning_tasks import OPTIMIZERS, TASKS

SCORES = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")
COLUMNS = (
    *("rate", "decay", "steps", "diverged", *SCORES, "train_loss", "at_5_kappa", "at_10_kappa", "at_20_kappa"),
    *("at_50_kappa", "at_100_kappa", "at_100_rotation", "at_100_path", "at_100_square", "window", "seconds"),
)
CAP = 10.0  # points that one regret may count in a mean
FINDER, DEFAULT, RANDOM = "learning-rate finder", "default rate", "three random grid points"
ONLY_FROM_BELOW = {"one probe": (-2, -1)}


class Trial(NamedTuple):
    """What one method or rival reached on one task, optimizer and seed from one start."""

    task: str
    optimizer: str
    seed: int
    method: str
    start: int  # decades from the grid's best; 0 for rivals
    regret: float  # points of the test score under the grid's choice
    cost: float  # in steps of a whole run
    off: float  # its rate over the grid's best


class Ladder:
    """The recorded runs of one task, optimizer and seed."""

    def __init__(self, task: str, optimizer: str, seed: int, records: Sequence[Mapping[str, Any]]) -> None:
        self.task, self.optimizer, self.seed = task, optimizer, seed
        self.finder = next((record for record in records if record.get("finder")), None)
        runs = [record for record in records if not record.get("finder")]
        self.whole = {(r["rate"], r["decay"]): r for r in runs if "val_loss" in r}
        self.probes = {(r["rate"], r["steps"] if not r["diverged"] else 0): r for r in runs if "val_loss" not in r}
        self.steps = max(record["steps"] for record in self.whole.values())
        decays = [record["decay"] for record in self.whole.values()]
        self.decay = statistics.mode(decays)

    def run(self, value: float) -> Mapping[str, Any]:
        """The whole run at this rate, with the decay of the methods."""
        return self.whole[value, self.decay]

    def show(self, place: int, share: float) -> Shown:
        """What a run at a place showed; KeyError where it was not trained."""
        record = self.whole.get((rate(place), self.decay))
        if record is None and share < 1.0:
            record = self.probes.get((rate(place), int(share * self.steps))) or self.probes.get((rate(place), 0))
        if record is None:
            raise KeyError((self.task, self.optimizer, self.seed, rate(place), share))
        reading = record.get(f"at_{round(100 * share)}") or {}
        whole = share == 1.0
        return Shown(reading.get("kappa"), whole and record["diverged"], score(record, "val") if whole else math.nan)

    @cached_property
    def grid(self) -> list[Mapping[str, Any]]:
        """The twelve runs."""
        return [
            self.whole[rate(place), self.decay if decay is None else decay] for place, decay in GRID[self.optimizer]
        ]

    @cached_property
    def best(self) -> Mapping[str, Any]:
        """The grid's choice by validation."""
        return max(self.grid, key=lambda record: score(record, "val"))

    def regret(self, record: Mapping[str, Any]) -> float:
        """Points of the test score under the grid's choice."""
        return score(self.best, "test") - score(record, "test")

    def trials(self, methods: Mapping[str, Callable[[int, Show], Outcome]] = METHODS) -> Iterator[Trial]:
        """All methods from all starts, and the rivals."""
        best = place_of(self.best["rate"])
        for name, method in methods.items():
            starts = ONLY_FROM_BELOW.get(name, STARTS)
            # All starts or none: those whose runs happen to be there would be the easy ones.
            with contextlib.suppress(KeyError):
                yield from [self._trial(name, start, method(best + DECADE * start, self.show)) for start in starts]
        for name, value, spent in self._rivals():
            yield Trial(
                *(self.task, self.optimizer, self.seed, name, 0, self.regret(self.run(value))),
                *(1 + spent / self.steps, value / self.best["rate"]),
            )
        triples = list(itertools.combinations(self.grid, 3))
        kept = [max(triple, key=lambda record: score(record, "val")) for triple in triples]
        mean = math.fsum(min(CAP, self.regret(record)) for record in kept) / len(kept)
        yield Trial(self.task, self.optimizer, self.seed, RANDOM, 0, mean, 3.0, math.nan)

    def _trial(self, name: str, start: int, outcome: Outcome) -> Trial:
        value = rate(outcome.place)
        regret, off = self.regret(self.run(value)), value / self.best["rate"]
        return Trial(self.task, self.optimizer, self.seed, name, start, regret, outcome.cost, off)

    def _rivals(self) -> Iterator[tuple[str, float, int]]:
        yield DEFAULT, float(f"{DEFAULT_RATE[self.optimizer]:.4g}"), 0
        if self.finder and self.finder["suggestion"]:
            yield FINDER, float(f"{self.finder['suggestion']:.4g}"), self.finder["steps"]


def load(path: Path) -> list[Ladder]:
    """The ladders of a result file."""
    return ladders(unpack(json.loads(path.read_text(encoding="utf-8"))))


def pack(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Records as rows of numbers under their ladders: the names of their columns would be most of the file."""
    packed = []
    for (task, optimizer, seed), group in _grouped(records).items():
        ladder: dict[str, Any] = {"task": task, "optimizer": optimizer, "seed": seed}
        for record in group:
            if record.get("finder"):
                ladder["finder"] = {name: record[name] for name in ("suggestion", "steps")}
        flat = [_flat(record) for record in group if not record.get("finder")]
        rows = sorted(([row.get(name) for name in COLUMNS] for row in flat), key=lambda row: (row[0], row[1], row[2]))
        packed.append({**ladder, "runs": rows})
    return {"columns": list(COLUMNS), "ladders": packed}


def unpack(packed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of :func:`pack`, without what it left out."""
    records = []
    for ladder in packed["ladders"]:
        names = {name: ladder[name] for name in ("task", "optimizer", "seed")}
        if "finder" in ladder:
            records.append({**names, **ladder["finder"], "finder": True})
        for row in ladder["runs"]:
            flat = {name: value for name, value in zip(packed["columns"], row, strict=True) if value is not None}
            record = {name: value for name, value in flat.items() if not name.startswith("at_")}
            for name, value in flat.items():
                if name.startswith("at_"):
                    mark, quantity = name.rsplit("_", 1)
                    record.setdefault(mark, {})[quantity] = value
            records.append({**names, **record})
    return records


def ladders(records: Sequence[Mapping[str, Any]]) -> list[Ladder]:
    """Records by task, optimizer and seed."""
    return [Ladder(*key, group) for key, group in _grouped(records).items()]


def spreads(ladders_b: Sequence[Ladder]) -> dict[str, list[float]]:
    """Best rate over suggested rate, by kind of reading. The best is that of all whole runs with the usual decay."""
    found: dict[str, list[float]] = {name: [] for name in ("one whole run", "one run at 20 %", "valley of probes")}
    for ladder in ladders_b:
        runs = [record for (_, decay), record in ladder.whole.items() if decay == ladder.decay]
        best = max(runs, key=lambda record: score(record, "val"))["rate"]
        kinds = (("one whole run", "at_100", WHOLE_RUN), ("one run at 20 %", "at_20", SHORT_RUN))
        for record, (name, mark, rule) in itertools.product(runs, kinds):
            kappa = (record.get(mark) or {}).get("kappa")
            below = 0.009 < record["rate"] / best < 1.01
            if kappa is not None and kappa > rule.threshold and below and not record["diverged"]:
                found[name].append(best / (record["rate"] * rule.factor * kappa**rule.exponent))
        start = place_of(ladder.best["rate"])
        found["valley of probes"].append(best / rate(METHODS["valley"](start, ladder.show).place))
    return found


def correlations(ladders_all: Sequence[Ladder]) -> dict[tuple[str, str], dict[str, tuple[float, int]]]:
    """Spearman of final rotation and of straightness with the test score, over whole runs that did not diverge.

    ``…, good runs`` are those within five points of the best by validation.
    """
    from scipy.stats import spearmanr

    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for ladder in ladders_all:
        runs = [r for r in ladder.whole.values() if not r["diverged"] and (r.get("at_100") or {}).get("kappa")]
        top = max(score(record, "val") for record in runs)
        groups[ladder.task, ladder.optimizer] += [{**r, "good": top - score(r, "val") <= 5} for r in runs]
    found: dict[tuple[str, str], dict[str, tuple[float, int]]] = {}
    for key, runs in groups.items():
        for name, chosen in (("all runs", runs), ("good runs", [r for r in runs if r["good"]])):
            if len(chosen) < 8:
                continue
            scores = [score(record, "test") for record in chosen]
            for quantity in ("rotation", "kappa"):
                values = [record["at_100"][quantity] for record in chosen]
                found.setdefault(key, {})[f"{quantity}, {name}"] = (float(spearmanr(values, scores)[0]), len(chosen))
    return found


def _grouped(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], list[Mapping[str, Any]]]:
    """In the order of the tasks."""
    order = {key: place for place, key in enumerate(itertools.product(TASKS, OPTIMIZERS))}
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (order[record["task"], record["optimizer"]], record["seed"])):
        groups[record["task"], record["optimizer"], record["seed"]].append(record)
    return groups


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    marks = {name: value for name, value in record.items() if name.startswith("at_")}
    parts = {f"{mark}_{name}": value for mark, reading in marks.items() for name, value in reading.items()}
    return {**record, **parts}
