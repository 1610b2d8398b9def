"""A network of four layers among other tensors, and what select_layers finds in a module."""

from typing import Any

from torch import Tensor, nn

from pl_layer_rotation import select_layers

NAMES = ["stem", "block.conv", "block.fc", "head"]


def network() -> nn.ModuleDict:
    block = nn.ModuleDict({"norm": nn.LayerNorm([4, 4]), "conv": nn.Conv2d(2, 2, 3), "fc": nn.Linear(4, 4)})
    return nn.ModuleDict({"stem": nn.Conv2d(1, 2, 3), "bn": nn.BatchNorm2d(2), "block": block, "head": nn.Linear(4, 3)})


def holder(**parameters: Tensor) -> nn.Module:
    """A module with these bare parameters."""
    module = nn.Module()
    for name, tensor in parameters.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return module


def shapes(module: nn.Module, **options: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in select_layers(module, **options).items()}


def names(module: nn.Module, **options: Any) -> list[str]:
    return list(select_layers(module, **options))
