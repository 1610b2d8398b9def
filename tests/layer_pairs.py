"""Pairs of a layer and its reference, at known angles or of any numbers, and their exact distance."""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor

RELATIVE_ERROR = {torch.float32: 1e-4, torch.float64: 1e-9}
every_dtype = pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=["fp32", "float64"])
quick = settings(deadline=None, max_examples=50, derandomize=True)
numbers = st.floats(-8, 8, width=32)
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=16)
triples = st.lists(st.tuples(numbers, numbers, numbers), min_size=2, max_size=16)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second element": lambda t: torch.stack([t, torch.full_like(t, 9)], -1)[..., 0],
    "narrowed": lambda t: torch.cat([t, torch.full_like(t, 9)], 1)[:, : t.shape[1]],
    "requires grad": lambda t: t.clone().requires_grad_(),
}


def turned(size: int, angle: float, ratio: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A layer and its reference at about this angle and ratio of norms; rounded to the dtype."""
    generator = torch.Generator().manual_seed(size)
    reference, other = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    other -= (other @ reference) / (reference @ reference) * reference
    other *= reference.norm() / other.norm()
    weights = ratio * (math.cos(angle) * reference + math.sin(angle) * other)
    return weights.to(dtype), reference.to(dtype)


def exact_distance(weights: Tensor, reference: Tensor) -> float:
    """``1 - cos`` of the numbers that the tensors hold, in 60 digits."""
    with mpmath.workdps(60):
        w, o = ([mpmath.mpf(x) for x in t.double().flatten().tolist()] for t in (weights, reference))
        return float(1 - mpmath.fdot(w, o) / mpmath.sqrt(mpmath.fdot(w, w) * mpmath.fdot(o, o)))


def long_double_distance(weights: Tensor, reference: Tensor) -> float:
    """The same from the chord between unit vectors, for sizes where mpmath takes minutes."""
    w, o = (t.double().numpy().astype(np.longdouble) for t in (weights, reference))
    chord = w / np.sqrt((w * w).sum()) - o / np.sqrt((o * o).sum())
    return float((chord * chord).sum() / 2)


def vectors(rows: list[tuple[float, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The columns as tensors, none of them nearly zero."""
    columns = torch.tensor(rows, dtype=dtype).unbind(1)
    assume(all(column.norm() > 1e-3 for column in columns))
    return [column.clone() for column in columns]
