"""Layca over shards where processes differ: no gradient here, one there; leading slices on other processes."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import launch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from pl_layer_rotation import Layca

PLACEMENTS: dict[str, list[Any]] = {"rows": [Shard(0)], "columns": [Shard(1)], "whole": [Replicate()]}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(whole: Tensor, placements: list[Any]) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (2,)), placements))


def gather(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


class Calls:
    """Counts the collectives that run while it is entered."""

    def __enter__(self) -> "Calls":
        self.count, self._real = 0, dist.all_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self._real(*args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self._real


def steps_with_gradients_on(rank: int, holders: list[int]) -> tuple[list[float], list[float], list[int]]:
    dist.init_process_group("gloo")
    first, second = spread(randn(5, 4, seed=1), [Shard(0)]), spread(randn(6, 3, seed=2), [Shard(1)])
    before = gather(first)
    optimizer = Layca([first, second], lr=0.05, momentum=0.9)
    counts = []
    for step in range(3):
        if rank in holders:
            first.grad = distribute_tensor(
                randn(5, 4, seed=10 + step), first.device_mesh, [Shard(0)], src_data_rank=None
            )
        with Calls() as calls:
            optimizer.step()
        counts.append(calls.count)
    return gather(first).flatten().tolist(), before.flatten().tolist(), counts


@pytest.mark.parametrize("holders", [[0], [1], [0, 1], []], ids=str)
def test_a_gradient_on_some_processes_turns_the_whole_layer(holders: list[int]) -> None:
    """What has no gradient counts as a step of zeros there: the layer keeps its norm and processes agree."""
    twin = nn.Parameter(randn(5, 4, seed=1))
    optimizer = Layca([twin], lr=0.05, momentum=0.9)
    rows = torch.tensor([row // 3 in holders for row in range(5)])
    for step in range(3):
        twin.grad = randn(5, 4, seed=10 + step) * rows[:, None]
        optimizer.step()
    for weights, before, counts in launch(steps_with_gradients_on, holders):
        np.testing.assert_allclose(weights, twin.detach().flatten(), rtol=1e-5, atol=1e-6)
        assert np.linalg.norm(weights) == pytest.approx(np.linalg.norm(before), rel=1e-6)
        assert counts == [1, 1, 1]


def count_collectives(rank: int, placements: list[Any]) -> list[int]:
    dist.init_process_group("gloo")
    layers = [spread(randn(4, 6, seed=seed), placements) for seed in range(12)]
    bias = spread(randn(4, seed=99), [Shard(0)])
    optimizer = Layca([*layers, bias], base="AdamW")
    counts = []
    for step in range(3):
        for place, layer in enumerate([*layers, bias]):
            whole = randn(*layer.shape, seed=50 * step + 100 + place)
            layer.grad = distribute_tensor(whole, layer.device_mesh, layer.placements)
        with Calls() as calls:
            optimizer.step()
        counts.append(calls.count)
    return counts


@pytest.mark.parametrize(("placements", "expected"), [("rows", 1), ("columns", 1), ("whole", 0)])
def test_one_collective_a_step_for_all_layers_and_none_without_shards(placements: str, expected: int) -> None:
    for counts in launch(count_collectives, PLACEMENTS[placements]):
        assert counts == [expected] * 3


def step_slices(rank: int, placements: list[Any], base: str) -> tuple[list[float], list[float], list[float]]:
    dist.init_process_group("gloo")
    weight = spread(randn(3, 4, 5, seed=1), placements)
    optimizer = Layca([weight], lr=0.05, base=base, leading_dims=1)

    def step(tensor: nn.Parameter, stepper: Layca, number: int) -> None:
        tensor.grad = distribute_tensor(randn(3, 4, 5, seed=10 + number), tensor.device_mesh, placements)
        stepper.step()

    for number in range(2):
        step(weight, optimizer, number)
    module = nn.Module()
    module.weight = weight
    state = copy.deepcopy(get_optimizer_state_dict(module, optimizer, options=StateDictOptions()))
    other = nn.Module()
    other.weight = nn.Parameter(weight.detach().clone())
    resumed = Layca([other.weight], lr=0.7, base=base, leading_dims=1)
    set_optimizer_state_dict(other, resumed, state, options=StateDictOptions())
    for number in range(2, 4):
        step(weight, optimizer, number)
        step(other.weight, resumed, number)
    norms = gather(optimizer.state[weight]["initial_norm"])
    return gather(weight).flatten().tolist(), gather(other.weight).flatten().tolist(), norms.tolist()


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("placements", PLACEMENTS.values(), ids=PLACEMENTS)
def test_leading_slices_over_processes_equal_one_process_and_resume(placements: list[Any], base: str) -> None:
    twin = nn.Parameter(randn(3, 4, 5, seed=1))
    optimizer = Layca([twin], lr=0.05, base=base, leading_dims=1)
    for step in range(4):
        twin.grad = randn(3, 4, 5, seed=10 + step)
        optimizer.step()
    for weights, resumed, norms in launch(step_slices, placements, base):
        np.testing.assert_allclose(weights, twin.detach().flatten(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norms, randn(3, 4, 5, seed=1).flatten(1).norm(dim=1), rtol=1e-6)
        assert weights == resumed
