"""The mathematics: rotation of a layer from its sums, and the coefficients of Layca's update. Plain tensors only.

A layer is the vector of all its weights ``w``; its reference is ``o``. With a scale ``c`` and ``d = w - c·o`` four sums
say everything, and sums over pieces of a layer (shards) just add up:

    (d·d, d·w, w·w, c²·o·o)

    1 - cos(w, o) = (d·d - ((2·d·w - d·d) / (|w| + c|o|))²) / (2 |w| c|o|)

The usual ``1 - w·o / |w||o|`` subtracts two numbers that agree in all digits that a small rotation leaves alone; this
form subtracts only the radial part of the motion, which ``c = |w| / |o|`` makes vanish.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements that one fp32 dot product may sum on a CPU: torch's running fp32 sum of 38 M elements is 1.7e-3 off, that of
# 2^17 elements 4e-7 (and they stay in cache). Accelerators reduce in trees and want fewer, larger launches.
_CPU_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 22
# A radial part that outweighs the turn by more than this costs fp32 sums too many digits.
_RADIAL_LIMIT = 16.0
# Sums of squares outside of this range under- or overflow in fp32 products.
_SAFE_SQUARES = (1e-30, 1e30)
# Cosine distance below which a layer counts as still; the smallest of one that really moved was 1.2e-7.
STILL = 1e-8
# Share of the step that must be tangential: below, a step is radial and its direction round-off.
_RADIAL_STEP = 1e-12
# The same where products are rounded to fp32 and nobody can look whether they should be taken again.
_RADIAL_DEVICE_STEP = 1e-6
# Rates below cannot move weights of any dtype; keeping the norm would still round some.
_NO_TURN = 1e-20
# Below this share the tangential part of fp32 sums has lost the digits that an exact angle needs.
_NEARLY_RADIAL_STEP = 1e-2
# Share of the requested motion that normally distributed bfloat16 weights make, by lr.
_BF16_SHARES = ((1e-4, 0.06), (3e-4, 0.17), (1e-3, 0.52), (3e-3, 0.93))
BF16_LIMIT = _BF16_SHARES[-1][0]


def rotation_sums(
    weights: Sequence[Tensor],
    references: Sequence[Tensor],
    whole: Sequence[bool],
    reference_squares: Sequence[float] | None = None,
    *,
    close: bool = False,
) -> tuple[Tensor, Tensor]:
    """The four sums of each layer, as right as its dtype allows, and the scales that they were taken with.

    Products are taken in fp32 (float64 for float64 weights) and summed in float64; where that would lose digits
    (a motion that is almost only radial, squares near the limits of fp32) the layer is read again in float64 with the
    right scale. A piece of a layer does not know the layer's norm, so pieces are taken in float64 from the start.

    Args:
        weights: local tensors, one a layer.
        references: local tensors of the same shapes, maybe on another device.
        whole: whether the tensors are whole layers, not pieces.
        reference_squares: ``o·o`` of each layer where it is known from before, NaN elsewhere: saves a product.
        close: whether weights and references differ by single steps; with known squares that saves another product.

    Returns:
        Sums ``(layers, 4)`` and scales ``(layers,)``, both float64, on the CPU.

    """
    squares = [math.nan] * len(weights) if reference_squares is None else reference_squares
    rows: list[list[float] | Tensor] = []
    for weight, reference, is_whole, square in zip(weights, references, whole, squares, strict=True):
        if is_whole and math.isfinite(square) and weight.device.type == "cpu":
            rows.append(_sums_with_known_square(weight, reference, square, close=close))
        else:
            rows.append(_sums(weight, reference, 1.0, exact=not is_whole))
    scales = torch.ones(len(rows), dtype=torch.float64)
    if not rows:
        return torch.zeros(0, 4, dtype=torch.float64), scales
    sums = _gather(rows)
    again = doubtful(sums) & torch.tensor(list(whole))
    for i in again.nonzero().flatten().tolist():
        exact = _gather([_sums(weights[i], references[i], 1.0, exact=True)])[0]
        scale = float((exact[2] / exact[3]).sqrt())
        if math.isfinite(scale) and scale > 0:
            scales[i] = scale
            exact = _gather([_sums(weights[i], references[i], scale, exact=True)])[0]
        sums[i] = exact
    return sums, scales


def device_rotation_sums(weights: Sequence[Tensor], references: Sequence[Tensor], whole: Sequence[bool]) -> Tensor:
    """The four sums with scale 1 on an accelerator, ``(layers, 4)``, without waiting for it.

    Whole layers take products in fp32 (float64 for float64 weights), of which :func:`doubtful` tells the bad ones;
    pieces in float64.
    """
    wide = wide_dtype(weights[0].device)
    rows = []
    for weight, reference, is_whole in zip(weights, references, whole, strict=True):
        parts = []
        for w, o in _chunks(weight, reference, exact=not is_whole):
            d = w - o
            parts.append(torch.stack([(a * b).sum(dtype=wide) for a, b in ((d, d), (d, w), (w, w), (o, o))]))
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def cosine_distance(sums: Tensor) -> Tensor:
    """``1 - cos`` of each layer from its sums ``(..., 4)``: 0 … 2, NaN where a norm is zero."""
    turned, along, weight_square, reference_square = sums.unbind(-1)
    weight_norm, reference_norm = weight_square.sqrt(), reference_square.sqrt()
    radial = (2 * along - turned) / (weight_norm + reference_norm)
    distance = ((turned - radial.square()) / (2 * weight_norm * reference_norm)).clamp(0, 2)
    # Clamping would make 0 or 2 of round-off over a norm of zero.
    return distance.where(weight_norm * reference_norm > 0, torch.nan)


def angle(distance: Tensor) -> Tensor:
    """Angle in radians of a cosine distance."""
    return torch.atan2((distance * (2 - distance)).sqrt(), 1 - distance)


def straightness(distance: Tensor, path_square: Tensor, momentum: float) -> Tensor:
    """Angle from the start over the angle that a random walk of the same steps would have reached.

    ``arccos(1 - R) / arccos(exp(-c·S / 2))`` with the cosine distance ``R``, the sum ``S`` of the squared angles of all
    steps (radians), and ``c = (1 + m) / (1 - m)`` for how momentum ``m`` keeps steps parallel. 1 is a random walk;
    larger is straighter. NaN below a distance of 1e-8, where rounding is larger than the motion.
    """
    factor = (1 + momentum) / (1 - momentum)
    walk = angle(-torch.expm1(-0.5 * factor * path_square))
    return (angle(distance) / walk).where((distance >= STILL) & (path_square > 0), torch.nan)


def norm_ratio(sums: Tensor, scales: Tensor) -> Tensor:
    """``|w| / |o|`` of each layer: inf or NaN where the reference is zero."""
    return (sums[..., 2] / sums[..., 3]).sqrt() * scales


def step_sums(step: Tensor, weight: Tensor, *, exact: bool = False) -> Tensor:
    """``(s·w, s·s, w·w)`` of a step and its weights as a float64 vector on their device."""
    return _accumulate([(s.dot(w), s.dot(s), w.dot(w)) for s, w in _chunks(step, weight, exact=exact)], 3, weight)


def device_step_sums(step: Tensor, weight: Tensor) -> Tensor:
    """The same three sums on an accelerator in few launches: fp32 products, squares and sums in float64."""
    wide = wide_dtype(weight.device)
    if step.dtype in (torch.bfloat16, torch.float16):
        step, weight = step.float(), weight.float()
    squares = [torch.linalg.vector_norm(part, dtype=wide).square() for part in (step, weight)]
    return torch.stack([(step * weight).sum(dtype=wide), *squares])


def tangential_square(step: Tensor, weight: Tensor, along: float, weight_square: float) -> float:
    """``|s - (s·w / w·w) w|²`` in float64, for steps so radial that their sums do not know it any more."""
    rows = []
    for s, w in _chunks(step, weight, exact=True):
        part = s - (along / weight_square) * w
        rows.append((part.dot(part),))
    return float(_accumulate(rows, 1, weight))


def needs_exact_sums(along: float, step_square: float, weight_square: float) -> bool:
    """Whether ``(s·w, s·s, w·w)`` is too radial, or too large or small, for fp32 products."""
    low, high = _SAFE_SQUARES
    tangential = along * along < (1 - _NEARLY_RADIAL_STEP) * step_square * weight_square
    return not (low < step_square < high and low < weight_square < high and tangential)


def layca_coefficients(
    along: float,
    step_square: float,
    weight_square: float,
    lr: float,
    initial_norm: float,
    *,
    tangential: bool = True,
    tangent_square: float | None = None,
) -> tuple[float, float]:
    """``(a, b)`` of Layca's update ``w ← a·w - b·s`` (arXiv 1806.01603; the four steps of the paper in one).

    With ``p²`` the square of the step's tangential part: ``q = lr·√(w·w / p²)``, ``k = |w_0| / √(w·w (1 + lr²))``,
    ``a = k (1 + q·s·w / w·w)``, ``b = k·q``. Without projection (Hyperball) ``p² = s·s`` and ``k`` retracts
    ``w - q·s`` to the initial norm. A step that is zero or radial gives ``(1, 0)``; NaN stays NaN.

    Python's own numbers: two dozen operations on tiny tensors between two reads of a large layer took 0.1 ms a time,
    because the caches hold the layer then and not torch.

    Args:
        along: ``s·w`` with ``s`` the descent step (the base subtracts it).
        step_square: ``s·s``.
        weight_square: ``w·w``.
        lr: tangent of the requested angle.
        initial_norm: norm that the weights return to.
        tangential: False for the update without projection.
        tangent_square: the exact ``p²`` where it is known; computed from the sums otherwise.

    """
    if step_square == 0 or lr < _NO_TURN:
        return 1.0, 0.0
    if weight_square == 0:
        return math.nan, math.nan
    ratio = along / weight_square
    used = step_square
    if tangential:
        used = step_square - along * ratio if tangent_square is None else tangent_square
    # A NaN compares as False and stays.
    if used <= _RADIAL_STEP * step_square:
        return 1.0, 0.0
    q = lr * math.sqrt(weight_square / used)
    if tangential:
        grown = weight_square * (1 + lr * lr)
    else:
        grown, ratio = weight_square - 2 * q * along + q * q * step_square, 0.0
    k = math.nan if grown <= 0 else initial_norm / math.sqrt(grown)
    return k * (1 + q * ratio), k * q


def device_coefficients(
    sums: Tensor, lr: Tensor, initial_norm: Tensor, tangential: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`layca_coefficients` of many layers on an accelerator, without waiting for it.

    Nobody can look whether sums should be taken again, and products are rounded to fp32: a step is radial where less
    than 1e-6 of its square is tangential.

    Args:
        sums: ``(layers, 3)`` rows ``(s·w, s·s, w·w)``.
        lr: ``(layers,)``.
        initial_norm: ``(layers,)``.
        tangential: ``(layers,)`` bool. None: all True.

    Returns:
        Two tensors of shape ``(layers,)`` in the dtype of the sums, on their device.

    """
    along, step_square, weight_square = sums.unbind(-1)
    ratio = along / weight_square
    used = step_square - along * ratio
    grown = weight_square * (1 + lr.square())
    if tangential is not None:
        used = torch.where(tangential, used, step_square)
    q = lr * (weight_square / used).sqrt()
    if tangential is not None:
        grown = torch.where(tangential, grown, weight_square - 2 * q * along + q.square() * step_square)
        ratio = ratio * tangential
    k = initial_norm / grown.sqrt()
    # A NaN compares as False and stays.
    still = used <= _RADIAL_DEVICE_STEP * step_square
    moves = still.logical_or_(lr < _NO_TURN).logical_or_(step_square == 0).logical_not_()
    return torch.where(moves, k * (1 + q * ratio), 1.0), torch.where(moves, k * q, 0.0)


def chunks(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Matching pieces of two flat tensors on the CPU, each short enough for a dot product in its own dtype."""
    return list(zip(torch.split(first, _CPU_CHUNK), torch.split(second, _CPU_CHUNK), strict=True))


def bf16_share(lr: float) -> float:
    """The measured share of a step that rounding leaves, interpolated over the logarithm of lr."""
    for (low, less), (high, more) in itertools.pairwise(_BF16_SHARES):
        if lr <= high:
            return less + (more - less) * max(0.0, math.log(lr / low) / math.log(high / low))
    return _BF16_SHARES[-1][1]


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def flat_view(tensor: Tensor) -> Tensor | None:
    """A one-dimensional view of the tensor's memory, or None where the memory has gaps or overlaps.

    ``.view(-1)`` refuses channels_last and transposed tensors, and ``.reshape(-1)`` copies them silently.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    permuted = tensor.permute(order)
    return permuted.view(-1) if permuted.is_contiguous() else None


def scale_and_add(flat: Tensor, scale: float, other: Tensor, factor: float, one: Tensor) -> None:
    """``flat ← scale·flat + factor·other`` in place, for vectors on the CPU.

    An outer product with ``one``, a vector of a single 1: the only in-place kernel that does both in one pass.
    """
    flat.view(1, -1).addr_(one, other, beta=scale, alpha=factor)


def doubtful(sums: Tensor) -> Tensor:
    """Which layers' sums with scale 1 lost digits to fp32 products: almost only radial, or near the limits of fp32."""
    turned, along, weight_square, reference_square = sums.unbind(-1)
    low, high = _SAFE_SQUARES
    extreme = torch.zeros_like(turned, dtype=torch.bool)
    for square in (weight_square, reference_square):
        extreme |= (square < low) | ~(square < high)
    radial = (2 * along - turned) / (weight_square.sqrt() + reference_square.sqrt())
    return extreme | (turned > _RADIAL_LIMIT * (turned - radial.square()).clamp(min=0)) & (turned > 0)


def _sums_with_known_square(weight: Tensor, reference: Tensor, square: float, *, close: bool) -> list[float]:
    """The sums with scale 1, by fewer products."""
    rows: list[tuple[Tensor, ...]] = []
    for w, o in _chunks(weight, reference, exact=False):
        d = w - o
        rows.append((d.dot(d), d.dot(o)) if close else (d.dot(d), d.dot(w), w.dot(w)))
    turned, along, *rest = _totals(rows)
    # w·w = o·o + 2 d·o + d·d has its digits where d is small.
    return [turned, along, *rest, square] if rest else [turned, along + turned, square + 2 * along + turned, square]


def _sums(weight: Tensor, reference: Tensor, scale: float, *, exact: bool) -> Tensor:
    rows = []
    for w, o in _chunks(weight, reference, exact=exact):
        c = o if scale == 1.0 else o * scale
        d = w - c
        rows.append((d.dot(d), d.dot(w), w.dot(w), c.dot(c)))
    return _accumulate(rows, 4, weight)


def _chunks(first: Tensor, second: Tensor, *, exact: bool) -> list[tuple[Tensor, Tensor]]:
    """Matching flat pieces of two tensors in the dtype that products are taken in."""
    small = first.dtype == second.dtype == torch.float32 and first.numel() <= _CPU_CHUNK and not exact
    if small and first.is_contiguous() and second.is_contiguous() and first.device == second.device:
        # The common case, without the dozen of calls that the others need: networks have hundreds of small layers.
        return [(first.detach().view(-1), second.detach().view(-1))]
    first, second = first.detach(), second.detach()
    if first.is_complex() or second.is_complex():
        # A real tensor beside a complex one has no imaginary part; a cast would drop that of the other.
        dtype = torch.promote_types(first.dtype, second.dtype)
        first, second = (torch.view_as_real(tensor.to(dtype).resolve_conj()) for tensor in (first, second))
    flat = [flat_view(t) for t in (first, second)] if first.stride() == second.stride() else [None, None]
    a, b = (t.reshape(-1) if f is None else f for t, f in zip((first, second), flat, strict=True))
    exact = exact and a.device.type != "mps"
    dtype = torch.float64 if exact or a.dtype == torch.float64 else torch.float32
    size = _CPU_CHUNK if a.device.type == "cpu" else _DEVICE_CHUNK
    return [
        (x.to(dtype), y.to(dtype=dtype, device=x.device))
        for x, y in zip(torch.split(a, size), torch.split(b, size), strict=True)
    ]


def _accumulate(rows: Sequence[tuple[Tensor, ...]], width: int, like: Tensor) -> Tensor:
    """Sum of the pieces' rows, in float64 where the device has it."""
    wide = wide_dtype(like.device)
    if not rows:
        return torch.zeros(width, dtype=wide, device=like.device)
    if like.device.type == "cpu":
        return torch.tensor(_totals(rows), dtype=wide)
    return torch.stack([torch.stack(row) for row in rows]).sum(0, dtype=wide)


def _totals(rows: Sequence[tuple[Tensor, ...]]) -> list[float]:
    """Sums of the columns; Python's floats are float64, and cheaper than stacking scalars."""
    if len(rows) == 1:
        return [value.item() for value in rows[0]]
    return [math.fsum(value.item() for value in column) for column in zip(*rows, strict=True)]


def _gather(rows: Sequence[list[float] | Tensor]) -> Tensor:
    """Rows of several layers on the CPU, one transfer a device."""
    tensors = [row for row in rows if isinstance(row, Tensor)]
    if len(tensors) == len(rows) and len({row.device for row in tensors}) == 1:
        return torch.stack(tensors).cpu().double()
    return torch.tensor([row if isinstance(row, list) else row.tolist() for row in rows], dtype=torch.float64)
