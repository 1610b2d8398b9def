"""Layers, gradients and float64 readings that the contract's tests of the optimizer share."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")

# A convolution, a matrix, a row, and a layer so large that its norm is not read in every step.
SHAPES: tuple[tuple[int, ...], ...] = ((4, 2, 3, 3), (40, 30), (1, 7), (130, 130))

# How torch may run one step; RMSprop has no fused kernel.
KERNELS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "loop": {"foreach": False},
}


def skip_on_torch_2_6(fault: str) -> None:
    """Skip under the oldest torch that is supported: what is tested fails there without Layca too."""
    if torch.__version__.startswith("2.6."):
        pytest.skip(f"torch 2.6 {fault}")


def layers(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 5
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(tensors: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale).to(tensor.dtype)


def take_steps(optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Steps with random gradients for every parameter, the same ones for the same step."""
    for step in range(start, stop):
        give_gradients([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()


def flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1).double()


def angle(before: Tensor, after: Tensor) -> float:
    """Angle between two tensors as vectors, in float64, right for small angles too."""
    unit = [flat(tensor) / flat(tensor).norm() for tensor in (before, after)]
    return 2 * math.asin(min(1.0, float((unit[0] - unit[1]).norm()) / 2))


def norm(tensor: Tensor) -> float:
    return float(flat(tensor).norm())


def snapshot(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def copy_weights(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for theirs, ours in zip(source, target, strict=True):
            ours.copy_(theirs)


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit by bit."""
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
