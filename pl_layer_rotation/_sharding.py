"""Which part of a layer this process holds, and the one place that talks to the others."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# On a parameter that FSDP1 manages. Optimizers see parameters only, so what the wrapper knows travels with them, as
# FSDP1's own mark `_fsdp_flattened` does.
_PIECE = "_layer_rotation_piece"


class _Piece(NamedTuple):
    """What FSDP1 hides of a parameter: a process holds a run of its elements, in one dimension, maybe none of them.

    Plain data, so that parameters stay picklable.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    start: int  # number of the first element held here, in the order of memory
    pieces: int  # processes that share the parameter; 1 under NO_SHARD
    group: str  # name of their process group


def flattened_parameters(module: nn.Module) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """The parameters that FSDP1 manages in a module, by their owner and in their first order.

    The wrappers hold them also while modules show views of gathered weights in their place (after a forward pass under
    SHARD_GRAD_OP). What their original shapes were is kept on them, for :func:`original_shape` and the others here.

    FSDP1 may wrap a LightningModule from outside: its trainer knows that wrapper.
    """
    trainer = getattr(module, "_trainer", None)
    wrapped = getattr(getattr(trainer, "strategy", None), "model", None)
    found: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for root in (module, wrapped) if isinstance(wrapped, FullyShardedDataParallel) else (module,):
        for wrapper in root.modules():
            handle = wrapper._handle if isinstance(wrapper, FullyShardedDataParallel) else None
            if handle is None or handle.flat_param._params is None:
                continue
            flat = handle.flat_param
            parameters = [*(flat._params or ()), *(flat._shared_params or ())]
            for parameter, piece in zip(parameters, _pieces(handle), strict=False):
                setattr(parameter, _PIECE, piece)
            places = [(info.module, info.param_name) for info in flat._param_infos]
            places += [(info.module, info.param_name) for info in flat._shared_param_infos]
            for parameter, (owner, name) in zip(parameters, places, strict=True):
                found.setdefault(owner, {})[name] = parameter
    return found


def is_unknown_piece(tensor: Tensor) -> bool:
    """Whether FSDP1 cut the tensor, and nothing here has seen the wrapper that knows its shape."""
    return getattr(tensor, "_fsdp_flattened", False) and tensor.dim() < 2 and _piece(tensor) is None


def original_shape(tensor: Tensor) -> torch.Size:
    """Shape of the whole tensor, also where this process holds a piece of it."""
    piece = _piece(tensor)
    return tensor.shape if piece is None else piece.shape


def original_stride(tensor: Tensor) -> list[int]:
    """Strides of the whole tensor, also where this process holds a piece of it."""
    piece = _piece(tensor)
    return list(tensor.stride() if piece is None else piece.stride)


def flat_start(tensor: Tensor) -> int | None:
    """Number of the first element, in the order of memory, that this process holds of a tensor that FSDP1 cut.

    None for all other tensors.
    """
    piece = _piece(tensor)
    return None if piece is None or piece.pieces == 1 else piece.start


def distributed(local: Tensor, like: Tensor) -> Tensor:
    """This process's piece in the distributed form of another tensor; the piece itself where that is a plain one."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.size(), stride=like.stride()
    )


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, detached; empty where it holds nothing."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def shard_count(tensor: Tensor) -> int:
    """In how many pieces a tensor is cut; 1 for a tensor that every process holds whole.

    A placement is a shard unless it replicates: ``is_shard()`` denies it for the strided shards of 2-D parallelism.
    """
    if not isinstance(tensor, DTensor):
        piece = _piece(tensor)
        return 1 if piece is None else piece.pieces
    count = 1
    for dim, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            count *= tensor.device_mesh.size(dim)
    return count


def whole_tensor(piece: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every process of the mesh holds a piece, on the CPU. All of them must call it.

    The inverse of :func:`local_piece`; a copy of the piece where ``like`` is not cut.
    """
    cut = _piece(like)
    if cut is not None and cut.pieces > 1:
        # One sum of pieces among zeros: no process knows how long the others' pieces are.
        flat = piece.new_zeros(cut.shape.numel())
        flat[cut.start : cut.start + piece.numel()] = piece
        dist.all_reduce(flat, group=_resolve_process_group(cut.group))  # type: ignore[arg-type]
        return flat.as_strided(cut.shape, cut.stride).cpu()
    whole = distributed(piece, like)
    return whole.full_tensor().cpu() if isinstance(whole, DTensor) else piece.cpu().clone()


def local_piece(whole: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor, cut as ``like`` is; the whole must be the same on all of them."""
    cut = _piece(like)
    if cut is not None and cut.pieces > 1:
        flat = torch.empty_strided(cut.shape, cut.stride, dtype=whole.dtype).copy_(whole)
        run = flat.as_strided((flat.numel(),), (1,))[cut.start : cut.start + like.numel()]
        return run.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return whole.to(like.device, copy=True)
    # `distribute_tensor` refuses the uneven rows of 2-D parallelism, and sends what every process has already.
    sizes, starts = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    block = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return whole[block].to(like.device, copy=True, memory_format=torch.contiguous_format)


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


def first_incomplete(tensors: Sequence[Tensor], group: object = None) -> int | None:
    """Place of the first tensor whose pieces the group does not hold equally often, as :func:`share_of_sums` takes.

    Of a tensor only the processes that share it with this one are looked at: others look at theirs.
    """
    even: dict[object, bool] = {}
    for number, tensor in enumerate(tensors):
        if shard_count(tensor) == 1:
            continue
        cut = _piece(tensor)
        way = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else cut
        if way not in even:
            members = dist.get_process_group_ranks(group)  # type: ignore[arg-type]
            even[way] = _mesh_is_even(tensor, members) if isinstance(tensor, DTensor) else _group_is_in(cut, members)
        if not even[way]:
            return number
    return None


def cut_alike(first: Tensor, second: Tensor) -> bool:
    """Whether processes hold the same pieces of two distributed tensors; plain tensors are whole."""
    if isinstance(first, DTensor) and isinstance(second, DTensor):
        return bool(first.device_mesh == second.device_mesh and first.placements == second.placements)
    return all(not isinstance(tensor, DTensor) or shard_count(tensor) == 1 for tensor in (first, second))


def sum_over_processes(sums: Tensor, counts: Sequence[int], device: torch.device) -> Tensor:
    """Sums of whole layers from each process's local sums.

    One collective whatever the number of layers, none when every layer is whole here. Every process must call it with
    the same layers, also one that holds only empty pieces.

    Args:
        sums: ``(layers, k)`` local sums, on the CPU or where the collective wants them.
        counts: in how many pieces each layer is cut.
        device: where the collective's backend wants tensors.

    """
    if all(count == 1 for count in counts):
        return sums
    shared = (sums * share_of_sums(counts).to(sums.device, non_blocking=True)[:, None]).to(device)
    dist.all_reduce(shared)
    return shared.to(sums.device)


def are_zero(tensors: Sequence[Tensor]) -> list[bool]:
    """Which tensors are zeros in all their pieces. One collective for all; every process must call it.

    Tensors on the meta device have no values yet, and are not.
    """
    nonzero = [0.0 if not tensor.is_meta and not torch.any(local_tensor(tensor)).item() else 1.0 for tensor in tensors]
    if not tensors:
        return []
    counts = [shard_count(tensor) for tensor in tensors]
    found = sum_over_processes(torch.tensor(nonzero, dtype=torch.float64)[:, None], counts, tensors[0].device)
    return [amount == 0 for amount in found[:, 0].tolist()]


def _piece(tensor: Tensor) -> _Piece | None:
    # Two dimensions are a whole tensor: NO_SHARD leaves them, `summon_full_params` puts them back.
    return getattr(tensor, _PIECE, None) if tensor.dim() < 2 else None


def _mesh_is_even(tensor: DTensor, members: Sequence[int]) -> bool:
    mesh = tensor.device_mesh.mesh
    cut = [dim for dim, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    places = torch.isin(mesh, torch.tensor(members)).nonzero()[:, cut]
    held = Counter(map(tuple, places.tolist()))
    return len(held) == shard_count(tensor) and len(set(held.values())) == 1


def _group_is_in(cut: _Piece | None, members: Sequence[int]) -> bool:
    shared = dist.get_process_group_ranks(_resolve_process_group(cut.group)) if cut else []  # type: ignore[arg-type]
    return set(members).issuperset(shared)


def _pieces(handle: FlatParamHandle) -> Iterator[_Piece]:
    """One for each parameter of the handle; parameters that are shared come once."""
    flat = handle.flat_param
    pieces = handle.world_size if handle.uses_sharded_strategy else 1
    for shape, stride, shard in zip(flat._shapes, flat._strides, flat._shard_param_infos, strict=True):
        yield _Piece(shape, tuple(stride), shard.intra_param_start_idx or 0, pieces, handle.process_group.group_name)
