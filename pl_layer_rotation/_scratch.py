"""The bounded scratch that a base steps in place of the weights, and the pass that moves the weights by it."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._sharding import local_tensor

Item = tuple[int, Tensor]  # index of the param group, parameter
Buffers = dict[tuple[torch.device, torch.dtype], Tensor]

# Elements of the scratch: it stays in cache, which was faster than a buffer for every layer. A larger layer gets a
# scratch of its own size.
_ELEMENTS = 1 << 22


def chunks(rotating: list[Item]) -> Iterator[list[Item]]:
    """The rotating tensors in runs that fit the scratch, by device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Item]] = {}
    for item in rotating:
        kinds.setdefault((item[1].device, item[1].dtype), []).append(item)
    for items in kinds.values():
        chunk: list[Item] = []
        size = 0
        for item in items:
            elements = local_tensor(item[1]).numel()
            if chunk and size + elements > _ELEMENTS:
                yield chunk
                chunk, size = [], 0
            chunk.append(item)
            size += elements
        yield chunk


def stand_ins(parameters: list[Tensor], buffers: Buffers) -> list[Tensor]:
    """A zeroed tensor in the shape and layout of each parameter, all in the one buffer of their device and dtype."""
    pieces = [local_tensor(parameter) for parameter in parameters]
    needed = sum(piece.numel() for piece in pieces)
    kind = (pieces[0].device, pieces[0].dtype)
    buffer = buffers.get(kind)
    if buffer is None or buffer.numel() < needed:
        buffer = buffers[kind] = torch.empty(needed, dtype=kind[1], device=kind[0])
    buffer[:needed].zero_()
    views, start = [], 0
    for parameter, piece in zip(parameters, pieces, strict=True):
        part = buffer[start : start + piece.numel()]
        start += piece.numel()
        dense = geometry.flat_view(piece) is not None
        # Same layout as the weights where that has no gaps, so that elements pair up in memory.
        view = part.as_strided(piece.size(), piece.stride()) if dense else part.view(piece.size())
        views.append(_like(parameter, view))
    return views


def combine(weights: Tensor, ascent: Tensor, scale: float, factor: float) -> None:
    """``w ← scale·w + factor·u`` in place, rounded once."""
    w, u = geometry.flat_view(weights), geometry.flat_view(ascent)
    if w is None or u is None or weights.stride() != ascent.stride():
        w, u = weights, ascent
    if w.dtype in (torch.bfloat16, torch.float16):
        w.copy_(w.float().mul_(scale).add_(u.float(), alpha=factor))
    elif w.dim() == 1 and w.device.type == "cpu":
        # An outer product with a vector of one element: the only in-place kernel that does both in one pass.
        w.view(1, -1).addr_(torch.ones(1, dtype=w.dtype), u, beta=scale, alpha=factor)
    else:
        w.mul_(scale).add_(u, alpha=factor)


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """The local tensor in the distributed form of a parameter."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.size(),
        stride=parameter.stride(),
    )
