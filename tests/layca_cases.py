"""Networks and layers that the tests of Layca step, and the bases that it steps them by."""

import pytest
import reference_optimizers as twins
import torch
from torch import nn

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


def layers(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 2, 3, 3), (40, 30), (1, 7), (3000, 100)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
