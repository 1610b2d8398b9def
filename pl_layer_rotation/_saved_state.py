"""What Layca asks of a saved state before it loads it, and what torch's loading would spoil."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from pl_layer_rotation._base_optimizer import BorrowedOptimizer
from pl_layer_rotation._options import NORM, ParamGroup, options_of_base
from pl_layer_rotation._scratch import rotates
from pl_layer_rotation._sharding import local_tensor


def check_saved(
    state_dict: Mapping[str, Any],
    groups: Sequence[ParamGroup],
    base_of: Callable[[bool], BorrowedOptimizer],
    describe: Callable[[Tensor], str],
) -> None:
    """Raise unless a saved state is of these groups, and of the bases that step them.

    Args:
        state_dict: what is to be loaded.
        groups: the groups that it is for.
        base_of: the base of what rotates (True) and of what does not.
        describe: names a tensor in an error.

    Raises:
        ValueError: If it comes from another base or other tensors.

    """
    for saved, group in zip(state_dict["param_groups"], groups, strict=False):
        _check_options(saved, base_of(group["rotate"]))
    for saved, group in zip(state_dict["param_groups"], groups, strict=False):
        entries = [state_dict["state"].get(i, {}) for i in saved["params"]]
        _check_state(saved, entries, group, base_of, describe)


def restore_norms(
    state_dict: Mapping[str, Any], groups: Sequence[ParamGroup], state: MutableMapping[Tensor, dict[str, Any]]
) -> None:
    """Put the initial norms into a loaded state once more: torch cast them to the dtype of the weights."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        for i, parameter in zip(saved["params"], group["params"], strict=True):
            norm = state_dict["state"].get(i, {}).get(NORM)
            if norm is not None:
                state[parameter][NORM] = norm.detach().to(parameter.device, copy=True)


def _check_options(saved: ParamGroup, base: BorrowedOptimizer) -> None:
    """Raise for a saved group that lacks what the base needs."""
    wanted = [
        key for key, value in base.optimizer.defaults.items() if value is not None and not isinstance(value, bool)
    ]
    missing = [key for key in wanted if key not in saved]
    if missing:
        raise _of_another_base(base, "groups", missing)


def _check_state(
    saved: ParamGroup,
    entries: Sequence[Mapping[str, Any]],
    group: ParamGroup,
    base_of: Callable[[bool], BorrowedOptimizer],
    describe: Callable[[Tensor], str],
) -> None:
    """Raise for a saved group's state that comes from another base, or from tensors of other shapes.

    The base would miss entries at a step, and a fused kernel would read and write past the end of a shorter tensor.
    """
    needed: dict[bool, set[str]] = {}
    for parameter, entry in zip(group["params"], entries, strict=False):
        keys = entry.keys() - {NORM}
        if not keys or is_lazy(parameter):
            continue
        turns = rotates(parameter, group)
        base = base_of(turns)
        shapes = (parameter.shape, local_tensor(parameter).shape)
        for key in sorted(keys) if "fused" in base.optimizer.defaults else ():
            value = entry[key]
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape not in shapes:
                raise ValueError(
                    "`state_dict` must come from an optimizer over the same tensors in the same order, got "
                    f"{key} of shape {tuple(value.shape)} for {describe(parameter)}. Make the groups as they were."
                )
        if turns not in needed:
            needed[turns] = base.state_keys({**options_of_base({**group, **saved}), "lr": 1.0})
        if missing := needed[turns] - keys:
            raise _of_another_base(base, "a state", sorted(missing))


def _of_another_base(base: BorrowedOptimizer, what: str, missing: Sequence[str]) -> ValueError:
    return ValueError(
        f"`state_dict` must come from Layca over {type(base.optimizer).__name__}, got {what} without "
        f"{', '.join(missing)}. Make the optimizer with the base that was saved."
    )
