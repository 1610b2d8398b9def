"""A network for layca_param_groups, and what the groups hold that it makes."""

from collections import Counter
from typing import Any

import torch
from torch import nn

Groups = list[dict[str, Any]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm([3, 3]), nn.Linear(3, 3), nn.Embedding(5, 2), nn.Linear(3, 2))


def by_name(groups: Groups) -> dict[str, dict[str, Any]]:
    assert len({group["name"] for group in groups}) == len(groups)
    return {group["name"]: group for group in groups}


def rates(groups: Groups) -> dict[str, float]:
    return {name: group["lr"] for name, group in by_name(groups).items()}


def params(groups: Groups, name: str) -> list[int]:
    return [id(parameter) for parameter in by_name(groups)[name]["params"]]


def assert_partition(groups: Groups, module: nn.Module) -> None:
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert counts == dict.fromkeys([id(p) for p in module.parameters() if p.requires_grad], 1)
