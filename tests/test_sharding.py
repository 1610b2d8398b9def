"""What processes hold of a layer, on real meshes of four: a wrong share cancels in every ratio of sums.

FSDP1's pieces are tested in `distributed/test_fsdp1`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import launch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from pl_layer_rotation._sharding import (
    are_zero,
    cut_alike,
    first_incomplete,
    local_piece,
    local_tensor,
    original_shape,
    shard_count,
    share_of_sums,
    sum_over_processes,
    whole_tensor,
    world_size,
)

WORLD = 4
# Rows that four processes do not share evenly, and fewer of them than processes.
SHAPES = ((6, 5), (2, 3), (1, 4))
Placements = list[Any]
# Sizes of the mesh, placements, and the pieces that a tensor is cut in.
CUTS: dict[str, tuple[tuple[int, ...], Placements, int]] = {
    "replicated": ((4,), [Replicate()], 1),
    "replicated twice": ((2, 2), [Replicate(), Replicate()], 1),
    "rows": ((4,), [Shard(0)], 4),
    "columns": ((4,), [Shard(1)], 4),
    "rows by pairs": ((2, 2), [Replicate(), Shard(0)], 2),
    "columns by pairs, the other way": ((2, 2), [Shard(1), Replicate()], 2),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)], 4),
    "rows twice": ((2, 2), [Shard(0), Shard(0)], 4),
    "rows twice, strided": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], 4),
}
every_cut = pytest.mark.parametrize("cut", CUTS)


def whole(shape: tuple[int, ...]) -> Tensor:
    """Integers, whose sums are exact."""
    return torch.arange(1.0, 1 + shape[0] * shape[1], dtype=torch.float64).view(shape)


def cut_up(cut: str, shape: tuple[int, ...]) -> DTensor:
    sizes, placements, _ = CUTS[cut]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor")[: len(sizes)])
    if not isinstance(placements[0], _StridedShard):
        return distribute_tensor(whole(shape), mesh, placements)
    # As 2-D parallelism makes them; torch itself does not distribute uneven ones.
    module = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False).double())
    with torch.no_grad():
        module[0].weight.copy_(whole(shape))
    parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(module, mesh=mesh["data"])
    tensor = module[0].weight.detach()
    assert list(tensor.placements) == placements
    return tensor


def shares(rank: int, cut: str) -> list[Any]:
    """Counts and shares; sums of squares over all processes, by the helper and by hand; the tensor put together."""
    dist.init_process_group("gloo")
    results = []
    for shape in SHAPES:
        tensor = cut_up(cut, shape)
        count = shard_count(tensor)
        (share,) = share_of_sums([count]).tolist()
        local = local_tensor(tensor).square().sum().view(1, 1)
        by_hand = share * local
        dist.all_reduce(by_hand)
        summed = sum_over_processes(local, [count], torch.device("cpu"))
        together = whole_tensor(local_tensor(tensor), tensor)
        piece = torch.equal(local_piece(whole(shape), tensor), local_tensor(tensor))
        results.append((count, share, float(by_hand), float(summed), torch.equal(together, whole(shape)), piece))
        assert original_shape(tensor) == shape
    return results


@every_cut
def test_shares_of_all_processes_make_the_whole_once(cut: str) -> None:
    pieces = CUTS[cut][2]
    for results in launch(shares, cut, world=WORLD):
        for shape, (count, share, by_hand, summed, together, piece) in zip(SHAPES, results, strict=True):
            square = float(whole(shape).square().sum())
            assert (count, share) == (pieces, pieces / WORLD)
            assert (by_hand, summed) == (square, square)
            assert (together, piece) == (True, True)


def shares_in_a_subgroup(rank: int) -> list[Any]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    group = mesh["shard"].get_group()
    cut = distribute_tensor(whole((6, 5)), mesh["shard"], [Shard(0)])
    sums = torch.stack([whole((3, 2)).sum(), local_tensor(cut).sum()])
    weighted = sums * share_of_sums([1, shard_count(cut)], group)
    dist.all_reduce(weighted, group=group)
    return [world_size(), world_size(group), share_of_sums([1, 2], group).tolist(), weighted.tolist()]


def test_shares_in_a_subgroup_count_its_processes() -> None:
    totals = [float(whole((3, 2)).sum()), float(whole((6, 5)).sum())]
    assert launch(shares_in_a_subgroup, world=WORLD) == [[4, 2, [0.5, 1.0], totals]] * WORLD


def test_without_processes_everything_is_whole_here() -> None:
    assert world_size() == 1
    assert share_of_sums([1, 1]).tolist() == [1.0, 1.0]
    sums = torch.ones(2, 4)
    assert sum_over_processes(sums, [1, 1], torch.device("cpu")) is sums
    assert first_incomplete([torch.ones(2, 2)]) is None


# --- groups that hold all pieces ---


def first_incomplete_in(rank: int, cut: str, members: list[list[int]]) -> list[int | None]:
    dist.init_process_group("gloo")
    tensors = [torch.ones(3, 3), *(cut_up(cut, shape) for shape in SHAPES)]
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in members}
    return [first_incomplete(tensors, group) for ranks, group in groups.items() if rank in ranks]


PAIRS = [[0, 1], [2, 3], [0, 2], [1, 3], [0, 3], [1, 2]]
# For process 0: the pairs with 1, 2 and 3, in this order; None where every piece is there equally often.
COMPLETE: dict[str, list[int | None]] = {
    "replicated": [None, None, None],
    "rows": [1, 1, 1],
    "rows by pairs": [None, 1, None],
    "columns by pairs, the other way": [1, None, None],
    "rows twice, strided": [1, 1, 1],
}


@pytest.mark.parametrize("cut", COMPLETE)
def test_a_group_is_complete_where_it_holds_each_piece_equally_often(cut: str) -> None:
    assert launch(first_incomplete_in, cut, PAIRS, world=WORLD)[0] == COMPLETE[cut]


@every_cut
def test_all_processes_are_always_complete(cut: str) -> None:
    assert launch(first_incomplete_in, cut, [[0, 1, 2, 3]], world=WORLD) == [[None]] * WORLD


def test_three_of_four_processes_hold_some_pieces_twice() -> None:
    answers = launch(first_incomplete_in, "rows by pairs", [[0, 1, 2]], world=WORLD)
    assert answers == [[1], [1], [1], []]


# --- tensors that are cut alike ---


def alike(rank: int) -> dict[str, bool]:
    dist.init_process_group("gloo")
    rows, plain = cut_up("rows", (6, 5)), whole((6, 5))
    pairs = {
        "plain tensors": (plain, plain),
        "the same cut": (rows, cut_up("rows", (6, 5))),
        "rows and columns": (rows, cut_up("columns", (6, 5))),
        "rows in another order": (cut_up("rows twice", (6, 5)), cut_up("rows twice, strided", (6, 5))),
        "a piece and a plain tensor": (rows, plain),
        "a plain tensor and a replica": (plain, cut_up("replicated", (6, 5))),
    }
    return {name: cut_alike(*pair) for name, pair in pairs.items()}


def test_tensors_are_cut_alike_only_where_processes_hold_the_same_pieces() -> None:
    expected = {
        "plain tensors": True,
        "the same cut": True,
        "rows and columns": False,
        "rows in another order": False,
        "a piece and a plain tensor": False,
        "a plain tensor and a replica": True,
    }
    assert launch(alike, world=WORLD) == [expected] * WORLD


# --- sums of several layers ---


def several(rank: int) -> tuple[list[list[float]], int]:
    dist.init_process_group("gloo")
    tensors = [cut_up(cut, (6, 5)) for cut in CUTS]
    counts = [shard_count(tensor) for tensor in tensors]
    local = torch.stack([torch.stack([t.sum(), t.square().sum()]) for t in map(local_tensor, tensors)])
    before = local.clone()
    calls = 0
    reduce: Callable[..., Any] = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        summed = sum_over_processes(local, counts, torch.device("cpu"))
    assert torch.equal(local, before)
    return summed.tolist(), calls


def test_layers_of_all_kinds_are_added_up_in_one_collective() -> None:
    total = [float(whole((6, 5)).sum()), float(whole((6, 5)).square().sum())]
    for sums, calls in launch(several, world=WORLD):
        assert sums == [total] * len(CUTS)
        assert calls == 1


def zeros(rank: int) -> list[bool]:
    """Zeros, one value in the last row, and zeros on the meta device, which has no values."""
    dist.init_process_group("gloo")
    tensors = [cut_up("rows", (6, 5)) * 0 for _ in range(2)]
    if rank == 2:
        local_tensor(tensors[1])[-1, -1] = 3.0
    return are_zero([*tensors, torch.zeros(2), torch.ones(2), torch.empty(2, 2, device="meta")])


def test_a_layer_is_zero_where_all_its_pieces_are() -> None:
    assert launch(zeros, world=WORLD) == [[True, False, True, False, False]] * WORLD
