"""Layca against an independent numpy twin, and what users of torch's optimizers take for granted."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference_optimizers as twins
import torch
from torch import Tensor, nn

from pl_layer_rotation import Layca, layer_rotation

BASES = {
    "sgd": (torch.optim.SGD, {}, twins.sgd),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, lambda: twins.sgd(0.9)),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, lambda: twins.sgd(0.9, True)),
    "adam": (torch.optim.Adam, {}, twins.adam),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.99)}, lambda: twins.adam(0.8, 0.99)),
    "rmsprop": (torch.optim.RMSprop, {}, twins.rmsprop),
    "adagrad": (torch.optim.Adagrad, {}, twins.adagrad),
}
every_base = pytest.mark.parametrize(("base", "options", "twin"), BASES.values(), ids=BASES)


def angle(before: Tensor, after: Tensor) -> float:
    distance = float(layer_rotation(after, before))
    return math.atan2(math.sqrt(distance * (2 - distance)), 1 - distance)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def backward(net: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    dtype = next(net.parameters()).dtype
    net.zero_grad()
    net(torch.randn(5, 2, 4, 4, generator=generator, dtype=dtype)).square().mean().backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        backward(net, step)
        optimizer.step()


@every_base
@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"foreach": False}], ids=["default", "foreach", "loop"])
def test_sixty_steps_equal_the_four_steps_of_the_paper(
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    twin: Callable[[], twins.Direction],
    kernel: dict[str, Any],
) -> None:
    net = network(torch.float64)
    optimizer = Layca(net.parameters(), lr=0.03, base=base, **options, **kernel)
    layers = [p for p in net.parameters() if p.dim() > 1]
    initial = [p.detach().numpy().copy() for p in layers]
    expected = [array.copy() for array in initial]
    directions = [twin() for _ in layers]
    for step in range(60):
        backward(net, step)
        gradients = [p.grad.numpy().copy() for p in layers]
        optimizer.step()
        for i, gradient in enumerate(gradients):
            expected[i] = twins.layca(expected[i], initial[i], directions[i](gradient), 0.03)
    for parameter, array in zip(layers, expected, strict=True):
        error = np.linalg.norm(parameter.detach().numpy() - array) / np.linalg.norm(array)
        assert error < 1e-10


@every_base
@pytest.mark.parametrize("lr", [1e-6, 3**-5, 3**-3, 1.0])
def test_a_step_turns_by_the_requested_angle(base: Any, options: dict[str, Any], twin: Any, lr: float) -> None:
    net = network(torch.float64 if lr < 1e-4 else torch.float32)
    optimizer = Layca(net.parameters(), lr=lr, base=base, **options)
    for step in range(3):
        before = [p.detach().clone() for p in net.parameters()]
        train(net, optimizer, step, step + 1)
        for old, new in zip(before, net.parameters(), strict=True):
            if old.dim() > 1:
                assert angle(old, new) == pytest.approx(math.atan(lr), rel=1e-5)
