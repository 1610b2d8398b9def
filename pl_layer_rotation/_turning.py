"""From what the base wrote into the scratch to turned weights: sums, coefficients, one pass over the weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._scratch import Chunk
from pl_layer_rotation._sharding import local_tensor, sum_over_processes


class Turned(NamedTuple):
    """What one call turned a chunk's layers with; numbers stay where they are until someone asks."""

    chunk: Chunk
    groups: Sequence[Mapping[str, Any]]
    rates: Tensor  # lr of each row
    factors: Tensor  # what the steps were multiplied by: 0 where a layer was left as it was


def on_host(chunk: Chunk) -> bool:
    """Whether numbers of the chunk may be looked at: on an accelerator Python would have to wait for them."""
    return chunk.pieces[0].device.type == "cpu"


def sums_of_whole_layers(chunk: Chunk, initial_norms: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(u·w, u·u, w·w)`` of each layer of a chunk that this process holds whole; ``u`` is what the base added.

    On the CPU doubtful sums are taken again in float64, and the squares of the tangential parts of nearly radial steps
    come with them, from the steps themselves; NaN elsewhere, None where there are none.
    """
    if not on_host(chunk):
        return torch.stack([geometry.device_step_sums(layer.ascent, layer.weights) for layer in chunk.layers]), None
    rows: list[tuple[float, ...]] = []
    squares: dict[int, float] = {}
    for place, (layer, norm) in enumerate(zip(chunk.layers, initial_norms.tolist(), strict=True)):
        row = layer.sums(norm)
        if geometry.needs_exact_sums(*row):
            exact = geometry.step_sums(layer.ascent, layer.weights, exact=True).tolist()
            row = (exact[0], exact[1], exact[2])
            if exact[2] > 0:
                squares[place] = geometry.tangential_square(layer.ascent, layer.weights, exact[0], exact[2])
        rows.append(row)
    tangent = torch.full((len(rows),), math.nan, dtype=torch.float64) if squares else None
    for place, square in squares.items():
        assert tangent is not None
        tangent[place] = square
    return torch.tensor(rows, dtype=torch.float64), tangent


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


def turn(
    chunk: Chunk,
    sums: Tensor,
    initial_norms: Tensor,
    groups: Sequence[Mapping[str, Any]],
    tangent_squares: Tensor | None = None,
) -> Turned:
    """``w ← a·w - b·s`` for each layer, ``s = -u``.

    Args:
        chunk: the layers.
        sums: ``(rows, 3)`` as the functions above give them; changed.
        initial_norms: ``(rows,)`` norms that the layers return to.
        groups: the param group of each tensor.
        tangent_squares: ``(rows,)`` squares of the tangential parts where they are known better than from the sums.

    Returns:
        What :func:`angles` needs.

    """
    host = on_host(chunk)
    sums[:, 0].neg_()
    tangential = chunk.per_row([group["tangential"] for group in groups])
    rates = _vector(chunk.per_row([group["lr"] for group in groups]), sums)
    a, b = geometry.layca_coefficients(
        sums,
        rates,
        initial_norms.to(sums.dtype),
        None if all(tangential) else torch.tensor(tangential).to(sums.device, non_blocking=True),
        tangent_squares,
        fp32_products=not host,
    )
    if not host:
        for row, layer in zip(chunk.rows, chunk.layers, strict=True):
            layer.turn_on_device(a[row], b[row])
        return Turned(chunk, groups, rates, b)
    scales, factors = a.tolist(), b.tolist()
    for row, layer in zip(chunk.rows, chunk.layers, strict=True):
        if scales[row] != 1.0 or factors[row] != 0.0:
            layer.turn(scales[row], factors[row])
    return Turned(chunk, groups, rates, b)


def is_exact(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a rotating tensor as a whole turns by exactly ``atan(lr)``, or not at all."""
    wide = parameter.dtype in (torch.float32, torch.float64)
    return wide and bool(group["tangential"]) and not group["leading_dims"]


def angles(turned: Sequence[Turned]) -> tuple[list[Tensor], Tensor]:
    """The tensors that turned by an angle known beforehand, and that angle (radians): atan(lr), or 0 for a still one.

    Rounding of half-precision weights, several layers in one tensor and steps without projection change the angle.
    """
    members: list[Tensor] = []
    found = []
    for chunk, groups, rates, factors in turned:
        exact = [
            place
            for place, ((_, parameter), group) in enumerate(zip(chunk.items, groups, strict=True))
            if is_exact(parameter, group)
        ]
        members += [chunk.items[place][1] for place in exact]
        # A factor that is not finite has spoilt the weights.
        all_angles = torch.where(factors == 0, 0.0, rates.atan() + 0 * factors)
        rows = [chunk.starts[place] for place in exact]
        found.append(all_angles if len(rows) == len(all_angles) else all_angles[rows])
    return members, torch.cat([part.to(found[0]) for part in found]) if found else torch.zeros(0, dtype=torch.float64)


def _vector(values: list[Any], like: Tensor) -> Tensor:
    """One number a row, on a device without waiting for it."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value).to(like, non_blocking=True).view(()) for value in values])
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
