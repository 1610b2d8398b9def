"""The bounded scratch that a base steps in place of the weights, and the layers that turn by what it wrote there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parameter import is_lazy

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._base_optimizer import Loan
from pl_layer_rotation._sharding import distributed, local_tensor, original_shape, shard_count

T = TypeVar("T")
Item = tuple[int, Tensor]  # index of the param group, parameter
Kind = tuple[torch.device, torch.dtype]
Buffers = dict[Kind, "Scratch"]

# Elements of the scratch: it stays in cache beside the layers that turn by it, which was faster than four times as many
# or a buffer for every layer. A larger layer gets a scratch of its own size.
_ELEMENTS = 1 << 20
# From this size on a layer's norm is not read in every step, but in one of so many; a sample of its elements is.
_LARGE = 1 << 14
_READ_EVERY = 8
_SAMPLED = 16
_ALIGNMENT = 16


class Scratch:
    """Memory of one device and dtype that a base steps in the place of weights.

    Attributes:
        memory: one-dimensional; each run of tensors takes its first elements.

    """

    __slots__ = ("_unknown", "memory")

    def __init__(self, elements: int, kind: Kind) -> None:
        self.memory = torch.zeros(elements, dtype=kind[1], device=kind[0])
        self._unknown = 0  # so many of the first elements may hold infinities or NaN

    def is_finite(self) -> bool:
        """Whether it is known to hold nothing but finite numbers."""
        return self._unknown == 0

    def lend(self, elements: int, *, clear: bool) -> None:
        """Give the first elements away to be written, as zeros if asked."""
        if clear:
            self.memory[:elements].zero_()
        self._unknown = max(self._unknown, elements)

    def take_back(self, elements: int) -> None:
        """Note that what was written there is finite."""
        if self._unknown <= elements:
            self._unknown = 0


class Layer:
    """One direction that turns: a whole tensor, one of its leading slices, or the piece of either held here.

    Attributes:
        weights: the piece of the parameter.
        step: the same piece of what the base left of its step.

    """

    __slots__ = (
        "_flat",
        "_mark",
        "_pieces",
        "_round_off",
        "_sample",
        "_version",
        "step",
        "weights",
    )

    def __init__(self, weights: Tensor, step: Tensor) -> None:
        self.weights, self.step = weights, step
        self._pieces: list[tuple[Tensor, Tensor]] | None = None
        self._version, self._mark = -1, math.nan
        w, u = geometry.flat_view(weights), geometry.flat_view(step)
        if w is None or u is None or weights.stride() != step.stride():
            return
        if weights.device.type == "cpu" and weights.dtype in (torch.float32, torch.float64):
            self._pieces = geometry.chunks(u, w)
            self._flat = w, u, torch.ones(1, dtype=w.dtype)
            self._round_off = 1e-5 if w.dtype == torch.float32 else 1e-12
            self._sample = w[:: w.numel() // _SAMPLED] if w.numel() >= _LARGE else None

    def sums(self, initial_norm: float) -> tuple[float, float, float]:
        """``(u·w, u·u, w·w)`` of the step on the CPU, products in the dtype of the weights, but at least fp32.

        Each turn ends at the initial norm, so a large layer's norm is read only where somebody may have written to the
        weights, and now and then against drift. When that is depends on the weights alone, and
        round-off does not count as a change: a resumed training takes the same numbers as one that went on.
        """
        if self._pieces is None:
            along, step_square, weight_square = geometry.step_sums(self.step, self.weights).tolist()
            return along, step_square, weight_square
        is_due = is_changed = True
        if self._sample is not None:
            mark = self._sample.dot(self._sample).item()
            is_due = int(math.frexp(mark)[0] * (1 << 24)) % _READ_EVERY == 0 if math.isfinite(mark) else True
            # In-place operations count up the version of a tensor, but not those on `.data`: the sample shows these.
            is_changed = mark != self._mark or self.weights._version != self._version
        along = step_square = weight_square = 0.0
        for u, w in self._pieces:
            along += u.dot(w).item()
            step_square += u.dot(u).item()
            if is_due or is_changed:
                weight_square += w.dot(w).item()
        kept = initial_norm * initial_norm
        if not is_due and (not is_changed or abs(weight_square - kept) <= self._round_off * kept):
            weight_square = kept
        return along, step_square, weight_square

    def turn(self, scale: float, factor: float) -> None:
        """``w ← scale·w + factor·u`` in place, rounded once."""
        if self._pieces is not None:
            w, u, one = self._flat
            geometry.scale_and_add(w, scale, u, factor, one)
            if self._sample is not None:
                self._version, self._mark = self.weights._version, self._sample.dot(self._sample).item()
        elif self.weights.dtype in (torch.bfloat16, torch.float16):
            self.weights.copy_(self.weights.float().mul_(scale).add_(self.step.float(), alpha=factor))
        else:
            self.weights.mul_(scale).add_(self.step, alpha=factor)

    def turn_on_device(self, scale: Tensor, factor: Tensor) -> None:
        """The same by 0-dim tensors, without waiting for their values."""
        w, u = self.weights, self.step
        if w.dtype in (torch.bfloat16, torch.float16):
            w.copy_(w.float().mul_(scale).addcmul_(u.float(), factor.float()))
        else:
            w.mul_(scale).addcmul_(u, factor.to(w.dtype))


class Chunk:
    """Rotating tensors that are stepped by one call of the base, with their stand-ins and layers.

    Attributes:
        items: index of the param group and parameter.
        pieces: what this process holds of each parameter.
        lent: a stand-in for each parameter, in its shape, layout and distributed form, zero before the base's step.
        loan: the same as the base takes it.
        layers: the layers held here by their rows, which count all layers of the chunk, tensor after tensor, also
            those that other processes hold.
        starts: first row of each tensor, and the number of rows at the end.
        leading_shapes: shape of each tensor's rows: its leading dimensions.
        counts: in how many pieces each row's tensor is cut.
        is_whole: whether this process holds every layer whole.
        sign: 1 where the layers follow what the base adds to zero, -1 for what it subtracts.

    """

    def __init__(self, items: list[Item], leading_dims: Sequence[int], buffers: Buffers) -> None:
        self.items = items
        self._leading_dims = leading_dims
        self.pieces = [local_tensor(parameter) for _, parameter in items]
        self.lent: list[Tensor] = []
        self.layers: dict[int, Layer] = {}
        self.starts: list[int] = [0]
        self.counts: list[int] = []
        self.leading_shapes: list[torch.Size] = []
        needed = _needed(items)
        self._scratches = [(buffers[kind], elements) for kind, elements in needed.items()]
        used = dict.fromkeys(needed, 0)
        for (_, parameter), piece, leading in zip(items, self.pieces, leading_dims, strict=True):
            kind = (piece.device, piece.dtype)
            part = buffers[kind].memory[used[kind] : used[kind] + piece.numel()]
            used[kind] += _aligned(piece.numel())
            dense = geometry.flat_view(piece) is not None
            # Same layout as the weights where that has no gaps, so that elements pair up in memory.
            view = part.as_strided(piece.size(), piece.stride()) if dense else part.view(piece.size())
            self.lent.append(distributed(view, parameter))
            shape = original_shape(parameter)[:leading]
            rows = _held_slices(parameter, leading)
            for row, weights, step in zip(rows, _slices(piece, leading), _slices(view, leading), strict=True):
                self.layers[self.starts[-1] + row] = Layer(weights, step)
            self.starts.append(self.starts[-1] + shape.numel())
            self.counts += [shard_count(parameter)] * shape.numel()
            self.leading_shapes.append(shape)
        self.is_whole = all(count == 1 for count in self.counts)
        self.loan = Loan(items, self.lent)
        self.sign = 1
        self._followed = list(self.lent)

    def lend(self, *, clear: bool) -> None:
        """Give the stand-ins, whose memory serves other chunks too, to the base, as zeros if asked."""
        for scratch, elements in self._scratches:
            scratch.lend(elements, clear=clear)

    def is_finite(self) -> bool:
        """Whether the stand-ins are known to hold nothing but finite numbers."""
        return all(scratch.is_finite() for scratch, _ in self._scratches)

    def take_back(self) -> None:
        """Note that the steps that the layers follow are finite."""
        if all(step is lent for step, lent in zip(self._followed, self.lent, strict=True)):
            for scratch, elements in self._scratches:
                scratch.take_back(elements)

    def follow(self, steps: Sequence[Tensor], sign: int) -> None:
        """Turn by what the base left of its step in these tensors, one for each parameter; it adds sign times that."""
        self.sign = sign
        for position, step in enumerate(steps):
            if step is not self._followed[position]:
                rows = range(self.starts[position], self.starts[position + 1])
                for row, part in zip(rows, _slices(step, self._leading_dims[position]), strict=True):
                    self.layers[row] = Layer(self.layers[row].weights, part)
                self._followed[position] = step

    def position(self, parameter: Tensor) -> int:
        """Where a parameter stands in the chunk."""
        return next(position for position, (_, member) in enumerate(self.items) if member is parameter)

    def per_row(self, values: Sequence[T]) -> list[T]:
        """A value of each tensor for each of its rows."""
        if self.starts[-1] == len(values):
            return list(values)
        return [
            value
            for value, start, stop in zip(values, self.starts, self.starts[1:], strict=False)
            for _ in range(stop - start)
        ]


class Plan:
    """Which tensors are stepped how, worked out once for all steps with the same tensors in the same memory.

    Attributes:
        key: what the plan holds for.
        plain: what takes the base's plain step.
        calls: the base's steps: of each chunk of rotating tensors that this process holds whole, and of what is plain
            (None).
        rotating: both kinds of rotating tensors.
        bfloat16: indices of the groups that rotate bfloat16 weights.
        known: entries that the optimizer's state had after the last step with this plan; -1 before the first.
        whole: rotating tensors that this process holds whole, in runs that share one bounded scratch.
        sharded: rotating tensors of which this process holds pieces; None where there are none. Those without a
            gradient are among them: another process may have one.

    """

    def __init__(self, groups: Sequence[dict[str, Any]], buffers: Buffers) -> None:
        self.key = plan_key(groups)
        self.known = -1
        self.plain: list[Item] = []
        whole: list[Item] = []
        sharded: list[Item] = []
        for index, group in enumerate(groups):
            for parameter in group["params"]:
                if is_lazy(parameter):
                    continue  # neither shape nor gradient yet
                if rotates(parameter, group):
                    if shard_count(parameter) > 1:
                        if parameter.requires_grad:
                            sharded.append((index, parameter))
                    elif parameter.grad is not None:
                        whole.append((index, parameter))
                elif parameter.grad is not None:
                    self.plain.append((index, parameter))

        def chunk(items: list[Item], memory: Buffers) -> Chunk:
            return Chunk(items, [groups[index]["leading_dims"] for index, _ in items], memory)

        runs = _runs(whole)
        _provide(buffers, runs)
        self.whole = [chunk(run, buffers) for run in runs]
        self.calls: list[tuple[Loan, Chunk | None]] = [(chunk.loan, chunk) for chunk in self.whole]
        if self.plain:
            self.calls.append((Loan(self.plain, [parameter for _, parameter in self.plain]), None))
        # A base that takes no sparse gradients says so before it moves anything: calls with one go first.
        self.calls.sort(key=lambda call: not call[0].has_sparse)
        # Their sums meet in one collective, so their steps are in memory together.
        own: Buffers = {}
        _provide(own, [sharded])
        self.sharded = chunk(sharded, own) if sharded else None
        self.rotating = whole + sharded
        self.bfloat16 = {index for index, parameter in self.rotating if parameter.dtype == torch.bfloat16}


def plan_key(groups: Sequence[dict[str, Any]]) -> list[Any]:
    """What a plan depends on: who rotates how, which tensors have gradients, of what kind, and where in memory."""
    key: list[Any] = []
    for group in groups:
        key += [group["rotate"], group["leading_dims"]]
        for parameter in group["params"]:
            if is_lazy(parameter):
                key.append(id(parameter))  # no memory yet
                continue
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            grad: Any = parameter.grad
            if grad is not None:
                grad = grad.stride() if grad.layout is torch.strided else grad.layout
            key += [id(parameter), grad, local.data_ptr(), local.stride(), parameter.requires_grad]
    return key


def rotates(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a tensor has the two dimensions that a layer has, and a direction in each of its leading slices."""
    if not group["rotate"]:
        return False
    shape = original_shape(parameter)
    return len(shape) >= 2 and shape.numel() > 0 and shape[group["leading_dims"] :].numel() > 1


def _runs(items: list[Item]) -> list[list[Item]]:
    """Rotating tensors in runs that fit the scratch, by device and dtype."""
    kinds: dict[Kind, list[Item]] = {}
    for item in items:
        kinds.setdefault((item[1].device, item[1].dtype), []).append(item)
    runs: list[list[Item]] = []
    for alike in kinds.values():
        room = 0
        for item in alike:
            elements = item[1].numel()
            if elements > room or item is alike[0]:
                runs.append([])
                room = _ELEMENTS
            runs[-1].append(item)
            room -= elements
    return runs


def _aligned(elements: int) -> int:
    """Elements up to where the next tensor starts: at 64 bytes, off which dot products are slow."""
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _needed(items: list[Item]) -> dict[Kind, int]:
    """Elements that the stand-ins of some tensors take."""
    needed: dict[Kind, int] = {}
    for _, parameter in items:
        piece = local_tensor(parameter)
        kind = (piece.device, piece.dtype)
        needed[kind] = needed.get(kind, 0) + _aligned(piece.numel())
    return needed


def _provide(buffers: Buffers, runs: list[list[Item]]) -> None:
    """Memory for the largest of the runs: one that grew later would leave earlier runs on what it had before."""
    for run in runs:
        for kind, elements in _needed(run).items():
            if kind not in buffers or buffers[kind].memory.numel() < elements:
                buffers[kind] = Scratch(elements, kind)


def _slices(tensor: Tensor, leading: int) -> Sequence[Tensor]:
    if leading == 0:
        return [tensor]
    slices: list[Tensor] = [tensor]
    for _ in range(leading):
        slices = [part for whole in slices for part in whole.unbind(0)]
    return slices


def _held_slices(parameter: Tensor, leading: int) -> list[int]:
    """Which of a tensor's leading slices this process holds, whole or in part."""
    shape = original_shape(parameter)[:leading]
    if leading == 0:
        return [0]
    numbers = torch.arange(shape.numel()).view(shape)
    if isinstance(parameter, DTensor):
        local, offset = compute_local_shape_and_global_offset(
            parameter.size(), parameter.device_mesh, parameter.placements
        )
        for dim in range(leading):
            numbers = numbers.narrow(dim, offset[dim] if local[dim] else 0, local[dim])
    return [int(number) for number in numbers.flatten()]


def replicated(values: Tensor, like: Tensor) -> Tensor:
    """One value for each leading slice, in the distributed form of a parameter.

    Checkpoints of sharded models take whole tensors of one and more dimensions for pieces.
    """
    if not isinstance(like, DTensor) or values.dim() == 0:
        return values
    return DTensor.from_local(values, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
