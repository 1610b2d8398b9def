"""Which part of a layer this process holds, and the one place that talks to the others."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, detached; empty where it holds nothing."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def shard_count(tensor: Tensor) -> int:
    """In how many pieces a tensor is cut; 1 for a tensor that every process holds whole.

    A placement is a shard unless it replicates: ``is_shard()`` denies it for the strided shards of 2-D parallelism.
    """
    if not isinstance(tensor, DTensor):
        return 1
    count = 1
    for dim, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            count *= tensor.device_mesh.size(dim)
    return count


def whole_tensor(piece: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every process of the mesh holds a piece, on the CPU. All of them must call it.

    The inverse of :func:`local_piece`; a copy of the piece where ``like`` is not cut.
    """
    if not isinstance(like, DTensor):
        return piece.cpu().clone()
    whole = DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.size(), stride=like.stride()
    )
    return whole.full_tensor().cpu()


def local_piece(whole: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor, cut as ``like`` is. All processes of its mesh must call it."""
    if not isinstance(like, DTensor):
        return whole.to(like.device, copy=True)
    return local_tensor(distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)).clone()


def world_size(group: object = None) -> int:
    """Number of processes in the group; 1 without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)  # type: ignore[arg-type]


def share_of_sums(counts: Sequence[int], group: object = None) -> Tensor:
    """What to weigh each layer's local sums with, so that the sum over processes is the sum over the layer.

    Of ``n`` processes ``n / pieces`` hold the same piece, so each counts ``pieces / n``. float64, ``(layers,)``.
    """
    return torch.tensor(counts, dtype=torch.float64) / world_size(group)


def sum_over_processes(sums: Tensor, counts: Sequence[int], device: torch.device) -> Tensor:
    """Sums of whole layers from each process's local sums.

    One collective whatever the number of layers, none when every layer is whole here. Every process must call it with
    the same layers, also one that holds only empty pieces.

    Args:
        sums: ``(layers, k)`` local sums on the CPU.
        counts: in how many pieces each layer is cut.
        device: where the collective's backend wants tensors.

    """
    if all(count == 1 for count in counts):
        return sums
    shared = (sums * share_of_sums(counts)[:, None]).to(device)
    dist.all_reduce(shared)
    return shared.cpu()
