"""The learning rates of an optimizer by the names of its groups."""

import torch


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
