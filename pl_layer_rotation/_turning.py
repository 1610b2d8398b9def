"""From what the base wrote into the scratch to turned weights: sums, coefficients, one pass over the weights."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._scratch import Chunk, Layer
from pl_layer_rotation._sharding import local_tensor, sum_over_processes


class Turned(NamedTuple):
    """What one call turned a chunk's layers with; numbers stay where they are until someone asks."""

    chunk: Chunk
    groups: Sequence[Mapping[str, Any]]
    rates: Sequence[float] | Tensor  # lr of each row
    factors: Sequence[float] | Tensor  # what the steps were multiplied by: 0 where a layer was left as it was


class Sums(NamedTuple):
    """What the update takes of one layer on the CPU; ``u`` is what the base left of its step."""

    along: float  # u·w
    step_square: float  # u·u
    weight_square: float  # w·w
    tangent_square: float | None = None  # of the part of u across w, where it is known better than from the others


def on_host(chunk: Chunk) -> bool:
    """Whether numbers of the chunk may be looked at: on an accelerator Python would have to wait for them."""
    return chunk.pieces[0].device.type == "cpu"


def turn_whole_layers(chunk: Chunk, initial_norms: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> Turned:
    """``w ← a·w - b·s`` for each layer of a chunk that this process holds whole.

    Args:
        chunk: the layers, with the base's step in their stand-ins.
        initial_norms: norms that each tensor's layers return to.
        groups: the param group of each tensor.

    Returns:
        What :func:`angles` needs.

    """
    if on_host(chunk):
        norms = _numbers(initial_norms)
        # One layer is summed and turned before the next: its second pass finds it in cache.
        return _turn_on_host(chunk, map(_sums, chunk.layers.values(), norms), norms, groups)
    sums = torch.stack([geometry.device_step_sums(layer.step, layer.weights) for layer in chunk.layers.values()])
    return _turn_on_device(chunk, sums, torch.cat([norm.view(-1) for norm in initial_norms]), groups)


def sums_of_sharded_layers(chunk: Chunk) -> Tensor:
    """``(u·w, u·u, w·w)`` of each row over all processes: one collective, in which every process must take part."""
    device = chunk.pieces[0].device
    if on_host(chunk):
        local = [geometry.step_sums(layer.step, layer.weights, exact=True) for layer in chunk.layers.values()]
    else:
        local = [geometry.device_step_sums(layer.step, layer.weights) for layer in chunk.layers.values()]
    sums = torch.zeros(chunk.starts[-1], 3, dtype=geometry.wide_dtype(device), device=device)
    if local:
        rows = torch.tensor(list(chunk.layers)).to(device, non_blocking=True)
        sums.index_copy_(0, rows, torch.stack(local))
    return sum_over_processes(sums, chunk.counts, device)


def turn_sharded_layers(
    chunk: Chunk, sums: Tensor, initial_norms: Sequence[Tensor | None], groups: Sequence[Mapping[str, Any]]
) -> Turned:
    """The same for a chunk of which this process holds pieces; a norm of None stands for today's, from the sums."""
    norms = [
        sums[start:stop, 2].sqrt() if norm is None else local_tensor(norm).view(-1)
        for norm, start, stop in zip(initial_norms, chunk.starts, chunk.starts[1:], strict=False)
    ]
    if on_host(chunk):
        return _turn_on_host(chunk, itertools.starmap(Sums, sums.tolist()), _numbers(norms), groups)
    return _turn_on_device(chunk, sums, torch.cat(norms), groups)


def _sums(layer: Layer, initial_norm: float) -> Sums:
    """The sums of a whole layer; doubtful ones are taken again in float64."""
    along, step_square, weight_square = layer.sums(initial_norm)
    if not geometry.needs_exact_sums(along, step_square, weight_square):
        return Sums(along, step_square, weight_square)
    along, step_square, weight_square = geometry.step_sums(layer.step, layer.weights, exact=True).tolist()
    tangent_square = None
    if weight_square > 0:
        tangent_square = geometry.tangential_square(layer.step, layer.weights, along, weight_square)
    return Sums(along, step_square, weight_square, tangent_square)


def _numbers(norms: Sequence[Tensor]) -> list[float]:
    return [number for norm in norms for number in (norm.view(-1).tolist() if norm.dim() else [norm.item()])]


def _turn_on_host(
    chunk: Chunk, sums: Iterable[Sums], norms: Sequence[float], groups: Sequence[Mapping[str, Any]]
) -> Turned:
    rates = chunk.per_row([float(group["lr"]) for group in groups])
    tangential = chunk.per_row([group["tangential"] for group in groups])
    factors, is_finite = [], True
    for row, (known, norm, rate, projects) in enumerate(zip(sums, norms, rates, tangential, strict=True)):
        a, b = geometry.layca_coefficients(
            -chunk.sign * known.along,
            known.step_square,
            known.weight_square,
            rate,
            norm,
            tangential=projects,
            tangent_square=known.tangent_square,
        )
        factors.append(b)
        is_finite &= math.isfinite(known.step_square)
        if row in chunk.layers and (a != 1.0 or b != 0.0):
            chunk.layers[row].turn(a, chunk.sign * b)
    if is_finite:
        chunk.take_back()
    return Turned(chunk, groups, rates, factors)


def _turn_on_device(chunk: Chunk, sums: Tensor, norms: Tensor, groups: Sequence[Mapping[str, Any]]) -> Turned:
    sums[:, 0] *= -chunk.sign
    tangential = chunk.per_row([group["tangential"] for group in groups])
    rates = _vector(chunk.per_row([group["lr"] for group in groups]), sums)
    a, b = geometry.device_coefficients(
        sums,
        rates,
        norms.to(sums.dtype),
        None if all(tangential) else torch.tensor(tangential).to(sums.device, non_blocking=True),
    )
    signed = chunk.sign * b
    for row, layer in chunk.layers.items():
        layer.turn_on_device(a[row], signed[row])
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
        of_row, factor = (
            numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.float64)
            for numbers in (rates, factors)
        )
        # A factor that is not finite has spoilt the weights.
        all_angles = torch.where(factor == 0, 0.0, of_row.atan() + 0 * factor)
        rows = [chunk.starts[place] for place in exact]
        found.append(all_angles if len(rows) == len(all_angles) else all_angles[rows])
    return members, torch.cat([part.to(found[0]) for part in found]) if found else torch.zeros(0, dtype=torch.float64)


def _vector(values: list[Any], like: Tensor) -> Tensor:
    """One number a row, on a device without waiting for it."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value).to(like, non_blocking=True).view(()) for value in values])
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
