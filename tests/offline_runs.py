"""What an offline W&B run wrote, read back from its log without a server."""

import json
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import MetricRecord, Record

_BLOCK = 32768  # the log is cut into blocks; a chunk never crosses their border
_CHUNK = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _FIRST, _LAST = 1, 2, 4
_FILE_HEADER = 7


@dataclass
class OfflineRun:
    """One finished run; rows in the order of logging, metric definitions by name (or glob)."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, MetricRecord] = field(default_factory=dict)

    def series(self, key: str, x: str = "trainer/global_step") -> list[tuple[Any, Any]]:
        return [(row.get(x), row[key]) for row in self.rows if key in row]

    def media(self, key: str) -> list[Path]:
        return [self.folder / "files" / value["path"] for _, value in self.series(key)]


def read_offline_run(folder: str | Path, timeout: float = 20.0) -> OfflineRun:
    """Read a finished run, given its folder or its ``run.dir``.

    ``run.finish()`` can return before the last rows are on disk, so this waits for the record that ends the log.
    """
    folder = Path(folder)
    run = OfflineRun(folder.parent if folder.name == "files" else folder)
    records = _finished_records(run.folder, time.monotonic() + timeout)
    for record in records:
        if record.HasField("history"):
            run.rows.append(_values(record.history.item))
        elif record.HasField("summary"):
            run.summary.update(_values(record.summary.update))
        elif record.HasField("config"):
            run.config.update(_values(record.config.update))
        elif record.HasField("metric"):
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
    return run


def _finished_records(folder: Path, deadline: float) -> list[Record]:
    while True:
        records = [record for file in folder.glob("run-*.wandb") for record in _records(file.read_bytes())]
        if any(record.HasField("exit") for record in records):
            return records
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder} has {len(records)} records and no end. Call `run.finish()` first.")
        time.sleep(0.02)


def _records(log: bytes) -> Iterator[Record]:
    position, message = _FILE_HEADER, b""
    while position + _CHUNK.size <= len(log):
        if _BLOCK - position % _BLOCK < _CHUNK.size:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = _CHUNK.unpack_from(log, position)
        position += _CHUNK.size
        chunk = log[position : position + length]
        if len(chunk) < length or not kind:
            return  # still being written
        position += length
        message = chunk if kind in (_WHOLE, _FIRST) else message + chunk
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(message)


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
