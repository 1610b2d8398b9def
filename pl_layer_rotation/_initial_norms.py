"""The norms that rotating tensors keep, from their first step on, in the optimizer's state."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._options import NORM
from pl_layer_rotation._scratch import Chunk, Plan, replicated
from pl_layer_rotation._sharding import local_tensor

State = MutableMapping[Tensor, dict[str, Any]]
Describe = Callable[[Tensor], str]


def drop_placeholders(plan: Plan, state: State) -> None:
    """Let tensors that took plain steps before and turn from now on start from today's norm."""
    for _, parameter in plan.rotating:
        entry = state.get(parameter, {})
        if NORM in entry and not local_tensor(entry[NORM]).any():
            del entry[NORM]


def new_norms(plan: Plan, state: Mapping[Tensor, Mapping[str, Any]], describe: Describe) -> dict[Tensor, Tensor]:
    """Norms of the whole tensors that step for the first time.

    Plain tensors get a 0: checkpoints of sharded models need an entry for every stepped parameter.

    Raises:
        RuntimeError: If a rotating tensor is all zeros.

    """
    norms = {p: zero_norm(p) for _, p in plan.plain if NORM not in state.get(p, ())}
    zeros = []
    for chunk in plan.whole:
        for position, (_, parameter) in enumerate(chunk.items):
            if NORM in state.get(parameter, ()):
                continue
            layers = [chunk.layers[row] for row in range(*chunk.starts[position : position + 2])]
            squares = [geometry.step_sums(layer.weights, layer.weights, exact=True)[2] for layer in layers]
            norm = torch.stack(squares).sqrt().view(chunk.leading_shapes[position]).to(_dtype(parameter))
            norms[parameter] = norm
            if not norm.all():
                zeros.append(parameter)
    _check_zeros(zeros, describe)
    return norms


def remember_sharded(chunk: Chunk, new: Sequence[Tensor], norms: Tensor, state: State, describe: Describe) -> None:
    """Put the norms of cut tensors that step for the first time into the state.

    Raises:
        RuntimeError: If a rotating tensor is all zeros, before anything moves.

    """
    zeros = []
    for parameter in new:
        position = chunk.position(parameter)
        start, stop = chunk.starts[position : position + 2]
        norm = norms[start:stop].view(chunk.leading_shapes[position]).to(_dtype(parameter), copy=True)
        state[parameter][NORM] = replicated(norm, parameter)
        if not norm.all():
            zeros.append(parameter)
    _check_zeros(zeros, describe)


def zero_norm(parameter: Tensor) -> Tensor:
    """What stands in the place of a norm that nobody needs, or knows yet."""
    return torch.zeros((), dtype=_dtype(parameter), device=local_tensor(parameter).device)


def _check_zeros(zeros: Sequence[Tensor], describe: Describe) -> None:
    if zeros:
        raise RuntimeError(
            f"`params` with `rotate=True` must not be all zeros, got {', '.join(map(describe, zeros))}: "
            "a layer of zeros has no direction to turn. Put it into a group with `rotate=False`, as "
            "`layca_optimizers` does, or initialize it."
        )


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32).to_real()
