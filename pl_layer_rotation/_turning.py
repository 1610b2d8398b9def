"""From what the base wrote into the scratch to turned weights: sums, coefficients, one pass over the weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._scratch import Chunk
from pl_layer_rotation._sharding import local_tensor, sum_over_processes


def on_host(chunk: Chunk) -> bool:
    """Whether numbers of the chunk may be looked at: on an accelerator Python would have to wait for them."""
    return chunk.pieces[0].device.type == "cpu"


def sums_of_whole_layers(chunk: Chunk, initial_norms: Tensor) -> Tensor:
    """``(u·w, u·u, w·w)`` of each layer of a chunk that this process holds whole; ``u`` is what the base added."""
    if on_host(chunk):
        # From the last to the first: the base has just written the last, and the turns begin with the first.
        norms = initial_norms.tolist()
        rows = [layer.sums(norm) for layer, norm in zip(reversed(chunk.layers), reversed(norms), strict=True)]
        return torch.tensor(rows[::-1], dtype=torch.float64)
    return torch.stack([geometry.device_step_sums(layer.ascent, layer.weights) for layer in chunk.layers])


def sums_of_sharded_layers(chunk: Chunk) -> Tensor:
    """The same over all processes, ``(rows, 3)``: one collective, in which every process must take part."""
    device = chunk.pieces[0].device
    if on_host(chunk):
        local = [geometry.step_sums(layer.ascent, layer.weights, exact=True) for layer in chunk.layers]
    else:
        local = [geometry.device_step_sums(layer.ascent, layer.weights) for layer in chunk.layers]
    sums = torch.zeros(chunk.starts[-1], 3, dtype=geometry.wide_dtype(device), device=device)
    if local:
        rows = torch.tensor(chunk.rows).to(device, non_blocking=True)
        sums.index_copy_(0, rows, torch.stack(local))
    return sum_over_processes(sums, chunk.counts, device)


def rows_of_norms(chunk: Chunk, norms: Sequence[Tensor | None], sums: Tensor | None = None) -> Tensor:
    """The initial norms of each tensor's layers as one vector ``(rows,)``; None stands for today's, from the sums."""
    known = [norm for norm in norms if norm is not None]
    if len(known) == chunk.starts[-1] and chunk.is_whole:
        return torch.stack(known)  # the usual case in one call
    rows = []
    for norm, start, stop in zip(norms, chunk.starts, chunk.starts[1:], strict=False):
        if norm is not None:
            rows.append(local_tensor(norm).view(-1))
        elif sums is not None:
            rows.append(sums[start:stop, 2].sqrt())
    return torch.cat(rows)


def turn(chunk: Chunk, sums: Tensor, initial_norms: Tensor, groups: Sequence[Mapping[str, Any]]) -> None:
    """``w ← a·w - b·s`` for each layer, ``s = -u``.

    Args:
        chunk: the layers.
        sums: ``(rows, 3)`` as the functions above give them; changed.
        initial_norms: ``(rows,)`` norms that the layers return to.
        groups: the param group of each tensor.

    """
    host = on_host(chunk)
    tangent = _measure_again(chunk, sums) if host and chunk.is_whole else None
    sums[:, 0].neg_()
    tangential = chunk.per_row([group["tangential"] for group in groups])
    a, b = geometry.layca_coefficients(
        sums,
        _vector(chunk.per_row([group["lr"] for group in groups]), sums),
        initial_norms.to(sums.dtype),
        None if all(tangential) else torch.tensor(tangential).to(sums.device, non_blocking=True),
        tangent,
        fp32_products=not host,
    )
    if not host:
        for row, layer in zip(chunk.rows, chunk.layers, strict=True):
            layer.turn_on_device(a[row], b[row])
        return
    scales, factors = a.tolist(), b.tolist()
    for row, layer in zip(chunk.rows, chunk.layers, strict=True):
        if scales[row] != 1.0 or factors[row] != 0.0:
            layer.turn(scales[row], factors[row])


def _measure_again(chunk: Chunk, sums: Tensor) -> Tensor | None:
    """Take doubtful sums again in float64, and the tangential part of nearly radial steps from the step itself."""
    doubtful = geometry.needs_exact_sums(sums)
    if not doubtful.any():
        return None
    tangent = torch.full((len(sums),), math.nan, dtype=torch.float64)
    for row in doubtful.nonzero().flatten().tolist():
        layer = chunk.layers[row]
        sums[row] = geometry.step_sums(layer.ascent, layer.weights, exact=True)
        along, _, square = sums[row].tolist()
        if square > 0:
            tangent[row] = geometry.tangential_square(layer.ascent, layer.weights, along, square)
    return tangent


def _vector(values: list[Any], like: Tensor) -> Tensor:
    """One number a row, on a device without waiting for it."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value).to(like, non_blocking=True).view(()) for value in values])
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
