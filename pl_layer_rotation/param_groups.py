"""Parameter groups for Layca: which tensors rotate, and how fast each layer does."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_layer_rotation.layer_selection import select_layers


def layca_param_groups(
    module: nn.Module,
    lr: float = 3**-3,
    plain_lr: float | None = None,
    layer_multipliers: float | Mapping[str, float] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> list[dict[str, Any]]:
    """Every trainable parameter of a module in exactly one group: ``rotating`` layers and ``plain`` all the rest.

    Layers are what :func:`~pl_layer_rotation.select_layers` finds. Biases, normalizations, embeddings and what
    ``exclude`` names are plain. So are layers of zeros (LoRA's B, zero-initialized residual outputs): they have no
    direction to turn and would never move; a warning names them. Frozen parameters are left out; callbacks that
    unfreeze (``BackboneFinetuning``) add them as a group of their own.

    Args:
        module: the module to train.
        lr: rotation rate, see :class:`~pl_layer_rotation.Layca`.
        plain_lr: learning rate of the plain group; ``lr`` where None.
        layer_multipliers: a factor on ``lr`` for each layer. A number is the paper's alpha in (-1, 1): with L layers in
            depth order, layer l gets ``(1 - alpha)^(5 (L-1-l) / (L-1))`` for alpha > 0 (early layers slower) and
            ``(1 + alpha)^(5 l / (L-1))`` for alpha < 0 (late layers slower). A mapping gives factors by layer name;
            layers that it lacks keep 1. With multipliers each rotating layer is a group of its own,
            ``rotating/<name>``.
        include: patterns of layers that rotate.
        exclude: patterns of layers that do not.

    Returns:
        Groups for ``Layca``, with ``name``, ``lr`` and ``rotate``; empty groups are left out.

    Raises:
        MisconfigurationException: If no layer is left to rotate, a pattern matches nothing, or a multiplier is invalid.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        >>> for group in layca_param_groups(net, lr=0.02, plain_lr=0.1):
        ...     print(group["name"], group["lr"], [tuple(p.shape) for p in group["params"]])
        rotating 0.02 [(3, 4), (2, 3)]
        plain 0.1 [(3,), (3,), (3,), (2,)]

    """
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise MisconfigurationException(
            f"`module` must be initialized before its layers can be told apart, got lazy parameters {lazy[:5]}. "
            "Run a batch through it first."
        )
    trainable = {id(p): p for p in module.parameters() if p.requires_grad}
    layers = {name: w for name, w in select_layers(module, include, exclude).items() if id(w) in trainable}
    zeros = [name for name, weight in layers.items() if _is_zero(weight)]
    for name in zeros:
        del layers[name]
    if not layers:
        raise MisconfigurationException(
            f"`module` must have a trainable layer to rotate, got {type(module).__name__} with "
            f"{len(trainable)} trainable parameters, none of them a layer that is not all zeros. "
            "Use a torch optimizer for it, or select other layers with `include`."
        )
    if zeros:
        rank_zero_warn(
            f"Layers of zeros have no direction to turn and take plain steps: {', '.join(zeros)}.",
            category=UserWarning,
        )
    turning = {id(weight) for weight in layers.values()}
    rest = [parameter for key, parameter in trainable.items() if key not in turning]
    groups: list[dict[str, Any]]
    if layer_multipliers is None:
        groups = [{"name": "rotating", "params": list(layers.values()), "lr": lr, "rotate": True}]
    else:
        factors = _factors(layer_multipliers, list(layers))
        groups = [
            {"name": f"rotating/{name}", "params": [weight], "lr": lr * factors[name], "rotate": True}
            for name, weight in layers.items()
        ]
    if rest:
        groups.append({"name": "plain", "params": rest, "lr": lr if plain_lr is None else plain_lr, "rotate": False})
    return groups


def _factors(multipliers: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    if isinstance(multipliers, Mapping):
        unknown = [name for name in multipliers if name not in names]
        if unknown:
            raise MisconfigurationException(
                f"`layer_multipliers` must name rotating layers, got {unknown}. The layers are {names[:8]}."
            )
        for name, factor in multipliers.items():
            if not 0 <= factor < math.inf:
                raise MisconfigurationException(
                    f"`layer_multipliers` must be finite and at least 0, got {factor!r} for {name!r}."
                    " Leave a layer out of the rotation with `exclude`."
                )
        return {name: float(multipliers.get(name, 1.0)) for name in names}
    if not -1 < multipliers < 1:
        raise MisconfigurationException(
            f"`layer_multipliers` must be an alpha between -1 and 1 (not included), got {multipliers!r}. "
            "Positive values slow early layers, negative values late ones; 0 turns all alike."
        )
    last = max(len(names) - 1, 1)
    if multipliers > 0:
        return {name: (1 - multipliers) ** (5 * (last - depth) / last) for depth, name in enumerate(names)}
    return {name: (1 + multipliers) ** (5 * depth / last) for depth, name in enumerate(names)}


def _is_zero(weight: Tensor) -> bool:
    # Weights on the meta device have no values yet; Layca looks again at its first step.
    return not weight.is_meta and not torch.any(weight.detach()).item()
