"""Parameter groups for Layca: which tensors rotate, and how fast each layer does."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_layer_rotation._numbers import is_count, is_number
from pl_layer_rotation._options import check_lr, check_rate, is_rate
from pl_layer_rotation._sharding import are_zero, original_shape
from pl_layer_rotation.layer_selection import check_module, select_layers


def layca_param_groups(
    module: nn.Module,
    lr: float = 3**-3,
    *,
    plain_lr: float | None = None,
    layer_multipliers: float | Mapping[str, float] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    leading_dims: int | Mapping[str, int] = 0,
) -> list[dict[str, Any]]:
    """Every trainable parameter of a module in exactly one group: ``rotating`` layers and ``plain`` all the rest.

    Layers are what :func:`~pl_layer_rotation.select_layers` finds. Biases, normalizations, embeddings and what
    ``exclude`` names are plain. So are layers of zeros (LoRA's B, zero-initialized residual outputs): they have no
    direction to turn and would never move; a warning names them.

    Parameters that are frozen now are left out. Callbacks that unfreeze (``BackboneFinetuning``) add them as a group of
    their own, where everything with two or more dimensions rotates. What you unfreeze by hand, you add by hand, with
    ``optimizer.add_param_group``; or make the optimizer afterwards.

    Args:
        module: the module to train.
        lr: rotation rate, see :class:`~pl_layer_rotation.Layca`. The default, 3⁻³ or 2.12°, was better over SGD than
            3⁻⁴ and 3⁻⁵ in all five tasks of arXiv 1806.01603, which took 3⁻⁵ over Adam.
        plain_lr: learning rate of the plain group; ``lr`` where None.
        layer_multipliers: a factor on ``lr`` for each layer. A number is the paper's alpha in (-1, 1): with L layers in
            depth order, layer l gets ``(1 - alpha)^(5 (L-1-l) / (L-1))`` for alpha > 0 (early layers slower) and
            ``(1 + alpha)^(5 l / (L-1))`` for alpha < 0 (late layers slower). A mapping gives factors by layer name;
            layers that it lacks keep 1. With multipliers each rotating layer is a group of its own,
            ``rotating/<name>``.
        include: patterns of layers that rotate.
        exclude: patterns of layers that do not.
        leading_dims: how many leading dimensions of a tensor count separate layers, each of which turns by itself: 1
            for stacked experts ``(E, out, in)`` or a fused ``(3, d, d)``. One number, or numbers by pattern on names
            and class names as in ``include``; the last pattern that matches a layer counts. Layers with n > 0 are a
            group of their own, ``rotating/leading_dims=n``.

    Returns:
        Groups for ``Layca``, with ``name``, ``lr``, ``rotate`` and ``leading_dims``; empty groups are left out.

    Raises:
        TypeError: If ``module`` is no module.
        ValueError: If a rate is negative, not finite or no number.
        MisconfigurationException: If no layer is left to rotate, a pattern matches nothing (or, in ``leading_dims``,
            nothing that rotates), a multiplier is invalid, or a layer has too few dimensions.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        >>> for group in layca_param_groups(net, lr=0.02, plain_lr=0.1):
        ...     print(group["name"], group["lr"], [tuple(p.shape) for p in group["params"]])
        rotating 0.02 [(3, 4), (2, 3)]
        plain 0.1 [(3,), (3,), (3,), (2,)]

    """
    check_module(module)
    check_lr(lr)
    if plain_lr is not None:
        check_rate("plain_lr", plain_lr)
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise MisconfigurationException(
            f"`module` must be initialized before its layers can be told apart, got lazy parameters {lazy[:5]}. "
            "Run a batch through it first."
        )
    trainable = {id(p): p for p in module.parameters() if p.requires_grad}
    layers = {name: w for name, w in select_layers(module, include, exclude).items() if id(w) in trainable}
    leading = _leading_dims(leading_dims, module, layers)
    zeros = [
        name
        for (name, weight), is_zero in zip(layers.items(), are_zero(list(layers.values())), strict=True)
        if is_zero or _stacks_zeros(weight, leading[name])
    ]
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
    groups: list[dict[str, Any]] = []
    if layer_multipliers is None:
        for count in sorted({leading[layer] for layer in layers}):
            name = f"rotating/leading_dims={count}" if count else "rotating"
            members = [weight for layer, weight in layers.items() if leading[layer] == count]
            groups.append({"name": name, "params": members, "lr": lr, "rotate": True, "leading_dims": count})
    else:
        for name, factor in _factors(layer_multipliers, list(layers)).items():
            groups.append(
                {
                    "name": f"rotating/{name}",
                    "params": [layers[name]],
                    "lr": lr * factor,
                    "rotate": True,
                    "leading_dims": leading[name],
                }
            )
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
            if not is_rate(factor):
                raise MisconfigurationException(
                    f"`layer_multipliers` must be finite and at least 0, got {factor!r} for {name!r}."
                    " Leave a layer out of the rotation with `exclude`."
                )
        return {name: float(multipliers.get(name, 1.0)) for name in names}
    if not is_number(multipliers) or not -1 < multipliers < 1:
        raise MisconfigurationException(
            f"`layer_multipliers` must be an alpha between -1 and 1 (not included), got {multipliers!r}. "
            "Positive values slow early layers, negative values late ones; 0 turns all alike."
        )
    last = max(len(names) - 1, 1)
    if multipliers > 0:
        return {name: (1 - multipliers) ** (5 * (last - depth) / last) for depth, name in enumerate(names)}
    return {name: (1 + multipliers) ** (5 * depth / last) for depth, name in enumerate(names)}


def _leading_dims(
    leading_dims: int | Mapping[str, int], module: nn.Module, layers: Mapping[str, Tensor]
) -> dict[str, int]:
    """How many leading dimensions of each rotating layer count separate layers."""
    if not isinstance(leading_dims, Mapping):
        counts = dict.fromkeys(layers, leading_dims)
    else:
        counts = dict.fromkeys(layers, 0)
        for pattern, count in leading_dims.items():
            try:
                matching = select_layers(module, include=pattern)
            except MisconfigurationException as error:
                raise MisconfigurationException(str(error).replace("`include`", "`leading_dims`")) from None
            rotating = [name for name in matching if name in layers]
            if not rotating:
                raise MisconfigurationException(
                    f"`leading_dims` patterns must match a rotating layer, got {pattern!r}, which matches only "
                    f"{', '.join(list(matching)[:5])}. The rotating layers are {list(layers)[:8]}."
                )
            counts.update(dict.fromkeys(rotating, count))
    for name, count in counts.items():
        shape = tuple(original_shape(layers[name]))
        if not is_count(count) or count >= len(shape):
            raise MisconfigurationException(
                f"`leading_dims` must be a whole number from 0 to {len(shape) - 1} for layer {name!r} of shape "
                f"{shape}, got {count!r}. Give numbers by pattern where layers differ."
            )
    return counts


def _stacks_zeros(weight: Tensor, leading_dims: int) -> bool:
    """Whether one of the layers that a tensor stacks is all zeros.

    Pieces that FSDP1 cut, and weights on the meta device, are left for Layca to look at in its first step.
    """
    if weight.is_meta or not 0 < leading_dims < weight.dim():
        return False
    return not torch.any(weight.detach(), dim=tuple(range(leading_dims, weight.dim()))).all().item()
