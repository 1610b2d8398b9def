"""A small network, and what a metric should read of it: cosine distances by numpy in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

Reading = dict[str, Tensor]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).to(dtype)


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    """The layers of `network` in float64."""
    return {name: module.get_parameter(f"{name}.weight").detach().double().numpy().copy() for name in ("0", "3")}


def move(module: nn.Module, seed: int = 1, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def distances(now: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> dict[str, float]:
    units = {name: (now[name] / np.linalg.norm(now[name]), o / np.linalg.norm(o)) for name, o in start.items()}
    return {name: float(((w - o) ** 2).sum() / 2) for name, (w, o) in units.items()}


def assert_reads(reading: Reading, expected: dict[str, float], rel: float = 1e-6) -> None:
    assert list(reading) == list(expected)
    assert {name: float(value) for name, value in reading.items()} == pytest.approx(expected, rel=rel, abs=0)
