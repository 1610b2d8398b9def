"""The options of Layca's groups: what they must be, and which of them are the base's."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._numbers import is_count, is_number
from pl_layer_rotation._scratch import rotates
from pl_layer_rotation._sharding import is_unknown_piece, original_shape

ParamGroup = dict[str, Any]

# Key of the state that is Layca's own.
NORM = "initial_norm"
OWN_OPTIONS = ("rotate", "tangential", "leading_dims")


def options_of_base(group: ParamGroup) -> ParamGroup:
    """What of a group goes to the base at construction."""
    return {key: value for key, value in group.items() if key not in ("params", "lr", *OWN_OPTIONS)}


def as_groups(params: Iterable[Any], own: Mapping[str, Any], base_options: Mapping[str, Any]) -> list[ParamGroup]:
    """The groups that tensors, named tensors or dictionaries stand for, each with all of Layca's options, checked.

    Args:
        params: what an optimizer is given; its dictionaries are copied.
        own: Layca's options where a group has none.
        base_options: the base's options where a group has none.

    Raises:
        TypeError: If a group is no dictionary, or a switch neither True nor False.
        ValueError: If an option is invalid, or a rotating group asks for weight decay.

    """
    groups = [dict(entry) if isinstance(entry, dict) else entry for entry in params]
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    if not all(isinstance(group, dict) for group in groups):
        raise TypeError("param_group must be a dict")  # as torch says it
    for group in groups:
        members = group["params"]
        group["params"] = members if isinstance(members, (Tensor, set)) else list(members)
        group.update({key: value for key, value in own.items() if key not in group})
        check_switches(group)
        check_leading_dims(group)
        if group["rotate"]:
            check_weight_decay({**base_options, **group})
    return groups


def make_one(make_base: Callable[[Any], Optimizer], groups: list[ParamGroup]) -> tuple[Optimizer, list[ParamGroup]]:
    """The base on all tensors, and the filled-in options of each group."""
    with warnings.catch_warnings():
        # torch says so again where Layca takes the groups itself.
        warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate parameters")
        made = make_base([{**options_of_base(group), "params": group["params"]} for group in groups])
    return made, made.param_groups


def make_two(
    make_base: Callable[[Any], Optimizer], make_plain: Callable[[Any], Optimizer], groups: list[ParamGroup]
) -> tuple[Optimizer, Optimizer, list[ParamGroup]]:
    """Both bases, each made on its own tensors alone (Muon refuses others), and the filled-in options of each group."""
    parts: tuple[list[ParamGroup], list[ParamGroup]] = ([], [])
    for group in groups:
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        turning = [bool(group["rotate"]) if is_lazy(tensor) else rotates(tensor, group) for tensor in tensors]
        for part, wanted in zip(parts, (True, False), strict=True):
            members = [entry for entry, turns in zip(group["params"], turning, strict=True) if turns is wanted]
            # The options of a group are those of the optimizer that its kind of tensor goes to.
            own = options_of_base(group) if bool(group["rotate"]) is wanted else {}
            part.append({**own, "params": members})
    made = []
    filled: list[ParamGroup] = [{}] * len(groups)
    for make, part, wanted, shape in zip((make_base, make_plain), parts, (True, False), ((2, 2), (1,)), strict=True):
        # Some refuse an empty group, so groups without tensors of this kind get one of their own.
        optimizer = make([{**group, "params": group["params"] or [nn.Parameter(torch.zeros(shape))]} for group in part])
        for index, (group, options) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
            if bool(group["rotate"]) is wanted:
                filled[index] = {**options, "params": group["params"]}
        made.append(optimizer)
    return made[0], made[1], filled


def check_lr(lr: float | Tensor) -> None:
    """Raise unless a rate is the tangent of an angle."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not is_rate(float(lr) if isinstance(lr, Tensor) else lr):
        raise ValueError(f"`lr` must be a finite number of at least 0, got {lr!r}. Try 3**-3, an angle of 2.1 degrees.")


def check_rate(argument: str, value: Any) -> None:
    """Raise unless an argument is a learning rate.

    Raises:
        ValueError: Naming it.

    """
    if not is_rate(value):
        raise ValueError(
            f"`{argument}` must be a finite number of at least 0, got {value!r}. Leave it out for the default."
        )


def is_rate(value: Any) -> bool:
    """Whether it is a finite number of at least 0; True and False are none."""
    return is_number(value) and 0 <= float(value) < math.inf


def check_switches(group: Mapping[str, Any]) -> None:
    """Raise where a switch is neither True nor False: any text would count as True.

    Raises:
        TypeError: Naming the option.

    """
    for option in ("rotate", "tangential"):
        value = group.get(option, True)
        if not isinstance(value, bool):
            raise TypeError(f"`{option}` must be True or False, got {value!r}. Leave it out for the default.")


def check_leading_dims(group: Mapping[str, Any]) -> None:
    """Raise unless every tensor of a group keeps a dimension."""
    leading = group["leading_dims"]
    if not is_count(leading):
        raise ValueError(
            f"`leading_dims` must be an integer of at least 0, got {leading!r}. "
            "Pass 1 for stacked experts (E, out, in) or a fused projection (3, out, in)."
        )
    for entry in group["params"] if isinstance(group["params"], list) else ():
        tensor = entry[1] if isinstance(entry, tuple) else entry
        if leading and isinstance(tensor, Tensor) and not is_lazy(tensor) and tensor.dim() <= leading:
            raise ValueError(
                f"`leading_dims` must be below the dimensions of every tensor of its group, got {leading} for a tensor "
                f"of shape {tuple(tensor.shape)}. Put other tensors into a group with `leading_dims=0`."
            )


def check_weight_decay(group: Mapping[str, Any]) -> None:
    """Raise where a rotating group asks for weight decay."""
    decay = group.get("weight_decay", 0)
    if decay:
        raise ValueError(
            f"`weight_decay` must be 0 in a rotating group, got {decay!r}: the norm of a rotating layer is fixed. "
            "Set it where nothing rotates: in a group with `rotate=False`, or in a `plain_base` such as "
            "`lambda params: torch.optim.AdamW(params, weight_decay=0.1)`."
        )


def drop_weight_decay(group: ParamGroup) -> None:
    """Turn off in a rotating group what a base's defaults or a plain optimizer's state put there."""
    if group["rotate"] and "weight_decay" in group:
        group["weight_decay"] = 0.0


def check_pieces(
    plain: Sequence[tuple[int, Tensor]],
    rotating: Sequence[tuple[int, Tensor]],
    groups: Sequence[ParamGroup],
    describe: Callable[[Tensor], str],
) -> None:
    """Raise for tensors, given with the indices of their groups, of which nobody knows what they are pieces of."""
    flattened = [p for index, p in plain if groups[index]["rotate"] and is_unknown_piece(p)]
    if flattened:
        raise RuntimeError(
            f"`params` must keep their shape, got {', '.join(map(describe, flattened[:3]))}, flattened by "
            "FSDP1: a layer cannot be told from a bias. Use `layca_optimizers(self)`, which knows their shapes, or "
            "ModelParallelStrategy with `fully_shard` (FSDP2)."
        )
    cut = [p for index, p in rotating if groups[index]["leading_dims"] and original_shape(p) != p.shape]
    if cut:
        raise RuntimeError(
            f"`leading_dims` must be 0 where FSDP1 cuts layers, got {', '.join(map(describe, cut[:3]))}. "
            "Use ModelParallelStrategy with `fully_shard` (FSDP2)."
        )


def warn_of_rounding(groups: Sequence[ParamGroup]) -> bool:
    """Warn where bfloat16 weights of these groups round most of a step away; whether there was reason to."""
    rates = [group["lr"] for group in groups]
    # The value of a rate on an accelerator would have to be waited for.
    known = [float(rate) for rate in rates if not (isinstance(rate, Tensor) and rate.device.type != "cpu")]
    small = [rate for rate in known if 0 < rate < geometry.BF16_LIMIT]
    if small:
        warnings.warn(
            f"bfloat16 weights move by about {geometry.bf16_share(min(small)):.0%} of a step at lr "
            f"{min(small):.2g}; rounding takes the rest. Use rates of 3e-3 and more, or fp32 weights: "
            "`Trainer(precision='bf16-mixed')`.",
            stacklevel=5,
        )
    return bool(small)
