"""References too large for a checkpoint: a folder beside the logs, written once by torch's distributed checkpoint."""

import hashlib
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._sharding import (
    distributed,
    flat_start,
    local_piece,
    local_tensor,
    original_shape,
    original_stride,
    shard_count,
    sum_over_processes,
)

_DESCRIPTION = "reference.json"
# All that the index of a folder of tensors is made of.
_INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    **{module: {"PosixPath", "WindowsPath"} for module in ("pathlib", "pathlib._local")},
}


def write_sidecar(folder: Path, pieces: Mapping[str, Tensor], layers: Mapping[str, Tensor], first: bool) -> str:
    """Write the references of some layers, each process what it holds of them. All processes must call it.

    Args:
        folder: where to; the same folder for all processes. What it held before is replaced.
        pieces: what this process holds of each reference.
        layers: the layers, cut as the references are.
        first: whether this is the process that describes the folder.

    Returns:
        Fingerprint of the references: names, shapes, dtypes and norms.

    """
    if first:
        # An interrupted replacement must not pass for what stood here before. Where this fails, so will the writing.
        with suppress(OSError):
            (folder / _DESCRIPTION).unlink(missing_ok=True)
    parts = {key: part for name, piece in pieces.items() for key, part in _parts(name, piece, layers[name])}
    with _quiet():
        save(
            parts,
            storage_writer=FileSystemWriter(folder, overwrite=True),
            # Processes of another machine may not see this folder: one writes what all hold.
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
        )
    squares = _squares(pieces, layers)
    description = {
        name: {
            "shape": list(original_shape(layers[name])),
            "stride": original_stride(layers[name]),
            "dtype": str(piece.dtype),
            "square": squares[name],
        }
        for name, piece in pieces.items()
    }
    text = json.dumps(description, sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    if first:
        content = {"fingerprint": fingerprint, "layers": description}
        (folder / _DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return fingerprint


def holds(folder: Path, fingerprint: str) -> bool:
    """Whether this is the folder that :func:`write_sidecar` gave a fingerprint to."""
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(description, dict) and description.get("fingerprint") == fingerprint


def read_sidecar(folder: Path, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds of each layer's reference, cut as the layer is now. All processes must call it.

    The folder's index is a pickle, as that of every distributed checkpoint: one that holds anything but the description
    of tensors is refused, and nothing in it executed.

    Args:
        folder: what :func:`write_sidecar` wrote, see :func:`holds`.
        layers: the layers whose references are wanted; those that the folder lacks are left out.

    """
    known = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))["layers"]
    entries = _Reader(folder).read_metadata().state_dict_metadata
    stored = {key: entry.size for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        about = known.get(name)
        if about is None or tuple(about["shape"]) != tuple(original_shape(layer)):
            continue
        dtype = getattr(torch, about["dtype"].removeprefix("torch."))
        if name in stored and isinstance(layer, DTensor) and shard_count(layer) > 1:
            target = distributed(torch.empty_like(layer.to_local(), dtype=dtype), layer)
            _load(folder, {name: target})
            found[name] = local_tensor(target)
        elif name in stored:
            whole = torch.empty(about["shape"], dtype=dtype)
            _load(folder, {name: whole})
            found[name] = local_piece(whole, layer)
        else:
            runs = {key: torch.empty(stored[key], dtype=dtype) for key in sorted(stored) if _is_run(key, name)}
            _load(folder, runs)
            flat = torch.cat(list(runs.values()))
            found[name] = local_piece(flat.as_strided(about["shape"], about["stride"]), layer)
    return found


class _Reader(FileSystemReader):
    """Looks at the index before torch unpickles it: a checkpoint may come from a stranger, and its folder with it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path, ".metadata"), "rb") as stream:
            _Index(stream).load()
        return super().read_metadata(*args, **kwargs)


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in _INDEX_NAMES.get(module, ())
        if known or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index holds {module}.{name}, which is no description of a tensor")


def _parts(name: str, piece: Tensor, layer: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What this process gives to the checkpoint, by key: FSDP1 cuts layers where no distributed tensor can."""
    start = flat_start(layer)
    if start is None:
        yield name, distributed(piece.to(local_tensor(layer).device), layer)
    elif piece.numel():
        # Keys of one layer sort by the place of their elements.
        yield f"{name}@{start:020d}", piece


def _is_run(key: str, name: str) -> bool:
    return key.rpartition("@")[0] == name


def _load(folder: Path, into: dict[str, Tensor]) -> None:
    with _quiet():
        load(into, storage_reader=_Reader(folder))


def _squares(pieces: Mapping[str, Tensor], layers: Mapping[str, Tensor]) -> dict[str, float]:
    """Sum of the squares of each whole reference."""
    counts = [shard_count(layers[name]) for name in pieces]
    local = [geometry.step_sums(piece, piece, exact=True)[2].double().cpu() for piece in pieces.values()]
    device = local_tensor(next(iter(layers.values()))).device
    sums = sum_over_processes(torch.stack(local)[:, None], counts, device)
    return dict(zip(pieces, sums[:, 0].tolist(), strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says about its own parts, and about running in one process; failures as ordinary errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as error:  # no `Exception`: it would end the training
            first = next(iter(error.failures.values()))[0]
            raise OSError(f"{type(first).__name__}: {first}") from error
