"""Runs that W&B keeps on this machine, read back as histories without a server or an account."""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pl_layer_rotation.history import RotationHistory

# The log is LevelDB's: blocks of chunks, each with checksum, length and kind. wandb 0.30 removed its own reader.
_HEADER = b":W&B"
_HEADER_SIZE = 7
_BLOCK = 32_768
_CHUNK = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4

_STEP = "trainer/global_step"
_NO_ROTATION = "no layer rotation was logged in this W&B run. Train with `LayerRotationMonitor()`."
_MOST_LAYERS = 1000  # of which the sink lists all, and the monitor logs all


@dataclass
class OfflineRun:
    """What the log of a run holds, as far as it was written.

    Attributes:
        title: the name that W&B shows; empty where none was given.
        config: the run's config.
        rows: what was logged, in that order.
        finished: whether the run came to its end; a killed one did not.

    """

    title: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


def read_log(file: str | os.PathLike[str]) -> OfflineRun:
    """Read the ``run-….wandb`` file of a run; a last record that was cut is left out.

    Args:
        file: the log.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is no log of W&B, or is damaged.

    """
    run = OfflineRun()
    for record in _records(Path(file)):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.title = record.run.display_name or run.title
            run.config.update(_values(record.run.config.update))
        elif kind == "config":
            run.config.update(_values(record.config.update))
        elif kind == "history":
            run.rows.append(_values(record.history.item))
        elif kind == "exit":
            run.finished = True
    return run


def read_title(file: str | os.PathLike[str]) -> str:
    """The name that W&B shows for a run, from the start of its log.

    Args:
        file: the log.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is no log of W&B, or is damaged before the name.

    """
    first = next((record for record in _records(Path(file)) if record.HasField("run")), None)
    return "" if first is None else str(first.run.display_name)


def to_history(run: OfflineRun) -> RotationHistory:
    """The curves that :class:`~pl_layer_rotation.LayerRotationMonitor` sent to W&B.

    Layers come from the run's config, steps from ``trainer/global_step``. Facts are the config, the last value of every
    other number that was logged (``metrics``), and that of the median straightness with the number of its readings.
    Quantities are those that were logged: ``rotation`` by default, and the others that ``log_quantities`` asked for;
    findings that need more do not come. Where training went back to an earlier step, the later readings count.

    Args:
        run: what :func:`read_log` gave.

    Raises:
        ValueError: If the run holds no rotation of single layers.

    """
    layers, number = _layers(run.config)
    if not layers:
        raise ValueError(_NO_ROTATION)
    if number > _MOST_LAYERS:
        raise ValueError(
            f"a W&B run has the curves of single layers only up to {_MOST_LAYERS} layers, and this one has {number}. "
            "Pass its layer_rotation.jsonl."
        )
    prefix = str(layers[0]["key"]).rpartition("layer_rotation/")[0]
    columns = {str(layer["key"])[len(prefix) :].partition("/")[2]: i for i, layer in enumerate(layers)}
    history = RotationHistory([str(layer["name"]) for layer in layers], [tuple(layer["shape"]) for layer in layers])
    for step, reading in _readings(run.rows, prefix, columns).items():
        history.append(step, **reading)
    if not len(history):
        raise ValueError(_NO_ROTATION)
    history.facts = _facts(run, prefix)
    return history


def _records(file: Path) -> Iterator[Any]:
    # Importing wandb takes a second that a history file need not wait for.
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    log = file.read_bytes()
    if log[: len(_HEADER)] != _HEADER:
        raise ValueError("it is no log of W&B. Pass the folder of an offline run, or a layer_rotation.jsonl.")
    position, message = _HEADER_SIZE, b""
    while position + _CHUNK.size <= len(log):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK.size:
            position += left
            continue
        checksum, length, kind = _CHUNK.unpack_from(log, position)
        start = position + _CHUNK.size
        chunk = log[start : start + length]
        if len(chunk) < length or not kind:
            return  # cut, or still being written
        if zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(_damaged(position))
        message = chunk if kind in (_WHOLE, _FIRST) else message + chunk
        if kind in (_WHOLE, _LAST):
            try:
                yield Record.FromString(message)
            except DecodeError as error:
                raise ValueError(_damaged(position)) from error
        position = start + length


def _damaged(position: int) -> str:
    return f"it is damaged at byte {position:,}. Pass another copy."


def _values(items: Iterable[Any]) -> dict[str, Any]:
    """Items as a mapping; a nested value comes as one item a leaf."""
    values: dict[str, Any] = {}
    for item in items:
        *parents, leaf = list(item.nested_key) or [item.key]
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = json.loads(item.value_json)
    return values


def _layers(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The layers that the sink listed, and how many there were; none where the config holds something else."""
    ours = config.get("layer_rotation")
    listed = ours.get("layers") if isinstance(ours, Mapping) else None
    if (
        not isinstance(ours, Mapping)
        or not isinstance(listed, list)
        or not all(isinstance(layer, Mapping) and {"name", "shape", "key"} <= set(layer) for layer in listed)
    ):
        return [], 0
    return listed, int(ours.get("n_layers", len(listed)))


def _readings(
    rows: Iterable[Mapping[str, Any]], prefix: str, columns: Mapping[str, int]
) -> dict[int, dict[str, list[float]]]:
    """Values by step and quantity; steps increase."""
    readings: dict[int, dict[str, list[float]]] = {}
    key_pattern = re.compile(re.escape(prefix) + r"layer_(\w+)/(\w+)")
    for row in rows:
        matches = [(key_pattern.fullmatch(key), value) for key, value in row.items()]
        found = [(match[1], columns[match[2]], value) for match, value in matches if match and match[2] in columns]
        if not found or not isinstance(row.get(_STEP), (int, float)):
            continue
        step = int(row[_STEP]) + 1  # Lightning numbers the step after which it logs from 0
        while readings and (last := next(reversed(readings))) > step:
            del readings[last]
        for quantity, column, value in found:
            values = readings.setdefault(step, {}).setdefault(quantity, [math.nan] * len(columns))
            values[column] = _number(value)
    return readings


def _facts(run: OfflineRun, prefix: str) -> dict[str, Any]:
    facts = {key: value for key, value in run.config.items() if key not in ("_wandb", "layer_rotation")}
    median = f"{prefix}layer_straightness_stats/median"
    last = {key: value for row in run.rows for key, value in row.items() if math.isfinite(_number(value))}
    medians = [row[median] for row in run.rows if math.isfinite(_number(row.get(median)))]
    if medians:
        facts |= {"median_straightness": medians[-1], "angle_readings": len(medians)}
    named = {key.removeprefix(prefix): value for key, value in last.items()}
    not_metrics = re.compile(r"_.*|trainer/.*|epoch|layer_\w+/\w+")
    facts["metrics"] = {key: value for key, value in named.items() if not not_metrics.fullmatch(key)}
    return facts


def _number(value: Any) -> float:
    """A logged value as a float; W&B writes those that JSON lacks as words."""
    if isinstance(value, bool):
        return math.nan
    if isinstance(value, (int, float)):
        return float(value)
    return {"Infinity": math.inf, "-Infinity": -math.inf}.get(value, math.nan) if isinstance(value, str) else math.nan
