"""One reading of all layers: from tensors to numbers, in at most one collective and one transfer."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._reference import References
from pl_layer_rotation._running_sums import QUANTITIES, RunningSums
from pl_layer_rotation._sharding import local_tensor, shard_count, sum_over_processes

Layers = Mapping[str, Tensor]


class Measured(NamedTuple):
    """Values of one reading.

    Attributes:
        values: by quantity a float64 value for each layer that was read, on the CPU; NaN where it is not known.
        not_finite: layers with weights that are not finite.
        started: layers that started at zero and have moved: their reference is to be taken now.
        dense: last step up to which the angles of every step of every layer were read; None before the first.

    """

    values: dict[str, Tensor]
    not_finite: list[str]
    started: list[str]
    dense: int | None


class Measuring:
    """What a monitor knows of the weights: where they started, where they were before this step, and their angles.

    Every process calls the same methods in the same order. Where one cannot read its pieces, all of them raise at the
    next :meth:`read`, so that none waits for another.

    Args:
        references: what layers are measured from.
        sums: what the angles of single steps have added up to.

    Attributes:
        references: the same.
        sums: the same, as they go on.

    """

    def __init__(self, references: References, sums: RunningSums | None = None) -> None:
        self.references = references
        self.sums = RunningSums() if sums is None else sums
        self._before: dict[str, Tensor] = {}
        self._copied: list[str] = []  # layers whose weights should have been copied before this step
        self._turned: tuple[int, list[str], Tensor] = (-1, [], torch.zeros(0))  # the optimizer's own angles, and when
        self._failure: Exception | None = None  # of this process
        self._failures: Tensor | None = None  # of all processes together, where layers are cut

    @property
    def waits(self) -> bool:
        """Whether weights were copied before a step that was not read yet."""
        return bool(self._copied)

    def copy(self, layers: Layers) -> None:
        """Copy weights before a step, into memory that is kept for the next copy until :meth:`free`."""
        self._copied = list(layers)
        local = {name: local_tensor(layer) for name, layer in layers.items()}
        # New memory costs more than the copy itself: the system hands it out page by page.
        kept = [name for name, weight in local.items() if _is_like(self._before.get(name), weight)]
        if kept:
            torch._foreach_copy_([self._before[name] for name in kept], [local[name] for name in kept])
        held = {name: self._before[name] for name in kept}
        self._before = {name: held[name] if name in held else weight.clone() for name, weight in local.items()}

    def free(self) -> None:
        """Give the memory of the copies back."""
        self._before, self._copied = {}, []

    def take_turned(self, names: list[str], angles: Tensor, step: int) -> None:
        """Take the angles that the optimizer itself knows."""
        self.sums.add(names, angles, step)
        self._turned = (step, names, angles)

    @torch.no_grad()
    def read_angles(self, layers: Layers, step: int) -> None:
        """Read only how far the step turned the layers that were copied; on an accelerator nothing waits for it."""
        held = {name: layers[name] for name in self._copied if name in layers}
        self._copied = []
        if held:
            sums = self._over_processes(held, 4, lambda: self._step_sums(held))
            self.sums.add(list(held), geometry.angle(geometry.cosine_distance(sums)), step)

    @torch.no_grad()
    def read(self, layers: Layers, step: int) -> Measured:
        """Read every layer as it is now, and how far the step turned those that were copied."""
        names = list(layers)
        stepped = [place for place, name in enumerate(names) if name in self._copied]
        self._copied = []
        held = {names[place]: layers[names[place]] for place in stepped}
        scales = torch.ones(len(names), dtype=torch.float64)

        def local_sums() -> Tensor:
            first = self._rotation_sums(layers, scales)
            if not held:
                return first
            second = torch.full_like(first, torch.nan)
            # On an accelerator their values would have to be waited for.
            squares = first[stepped, 2].tolist() if on_host(first) else None
            second[stepped] = self._step_sums(held, squares)
            return torch.cat([first, second], 1)

        sums = self._over_processes(layers, 8 if held else 4, local_sums)
        angles = torch.full_like(sums[:, 0], torch.nan)
        if held:
            angles[stepped] = geometry.angle(geometry.cosine_distance(sums[stepped, 4:]))
            self.sums.add(list(held), angles[stepped], step)
        when, turned, known = self._turned
        if when == step:
            places = {name: place for place, name in enumerate(turned)}
            rows = [row for row, name in enumerate(names) if name in places]
            angles[rows] = known[[places[names[row]] for row in rows]].to(angles)
        running = self.sums.rows(names).to(sums)
        packed = torch.cat([sums[:, :4], angles[:, None], running], 1)
        if self._failures is not None:
            packed = torch.cat([packed, self._failures.to(packed).expand(1, packed.shape[1])])
        packed = packed.cpu().double()
        if self._failures is not None:
            self._check_failures(packed[-1])
            packed = packed[:-1]
        rotation = packed[:, :4] if on_host(sums) else self._retaken(packed[:, :4], scales, layers)
        values = {
            "rotation": geometry.cosine_distance(rotation),
            "norm_ratio": geometry.norm_ratio(rotation, scales),
        }
        if held or when == step:
            values["angular_update"] = packed[:, 4]
        sums_of_angles, dense = packed[:, 5 : 5 + len(QUANTITIES)], packed[:, -1]
        if self.sums.readings:
            values.update(zip(QUANTITIES, sums_of_angles.unbind(1), strict=True))
        started = ((rotation[:, 3] == 0) & (rotation[:, 2] > 0)).nonzero().flatten().tolist()
        for place in started:
            values["rotation"][place], values["norm_ratio"][place] = 0.0, 1.0
            for quantity in values.keys() - {"rotation", "norm_ratio"}:
                values[quantity][place] = torch.nan
        lost = rotation[:, 2].isfinite().logical_not().nonzero().flatten().tolist()
        known = dense[dense.isfinite()]
        return Measured(
            values,
            not_finite=[names[place] for place in lost],
            started=[names[place] for place in started],
            dense=int(known.min()) if len(known) else None,
        )

    def _rotation_sums(self, layers: Layers, scales: Tensor) -> Tensor:
        """Sums of each layer and its reference; on the CPU with the scales that they were taken with."""
        weights = [local_tensor(layer) for layer in layers.values()]
        references = [self.references.pieces[name] for name in layers]
        whole = [shard_count(layer) == 1 for layer in layers.values()]
        if weights and not on_host(weights[0]):
            return geometry.device_rotation_sums(weights, references, whole)
        squares = [
            self.references.square(name) if is_whole else torch.nan
            for name, is_whole in zip(layers, whole, strict=True)
        ]
        sums, taken_with = geometry.rotation_sums(weights, references, whole, squares)
        scales.copy_(taken_with)
        return sums

    def _step_sums(self, layers: Layers, squares: Sequence[float] | None = None) -> Tensor:
        """Sums of each layer and its copy; ``squares`` are those of the weights of now."""
        weights = [local_tensor(layer) for layer in layers.values()]
        before = [self._before[name] for name in layers]
        whole = [shard_count(layer) == 1 for layer in layers.values()]
        if not on_host(weights[0]):
            return geometry.device_rotation_sums(weights, before, whole)
        # The angle is the same from either side, and of the weights of now the squares may be known.
        return geometry.rotation_sums(before, weights, whole, squares, close=True)[0]

    def _over_processes(self, layers: Layers, width: int, local_sums: Callable[[], Tensor]) -> Tensor:
        """Sums of whole layers, and how many processes have failed until now."""
        counts = [shard_count(layer) for layer in layers.values()]
        if all(count == 1 for count in counts):
            return local_sums()
        device = local_tensor(next(iter(layers.values()))).device
        try:
            sums = local_sums()
        except Exception as error:
            self._failure = error
            sums = torch.full((len(counts), width), torch.nan, dtype=geometry.wide_dtype(device), device=device)
        flag = torch.full((1, width), 0.0 if self._failure is None else 1.0, dtype=sums.dtype, device=sums.device)
        total = sum_over_processes(torch.cat([sums, flag]), [*counts, 1], device)
        self._failures = total[-1:, :1]
        return total[:-1]

    def _check_failures(self, failures: Tensor) -> None:
        if failures.any():
            raise self._failure or RuntimeError("another process could not read its part of the layers")

    def _retaken(self, sums: Tensor, scales: Tensor, layers: Layers) -> Tensor:
        """The sums of an accelerator with those taken again that lost digits to rounding."""
        sums = sums.clone()
        whole = torch.tensor([shard_count(layer) == 1 for layer in layers.values()])
        for place in (geometry.doubtful(sums) & whole).nonzero().flatten().tolist():
            name = list(layers)[place]
            again, scale = geometry.rotation_sums([local_tensor(layers[name])], [self.references.pieces[name]], [True])
            sums[place], scales[place] = again[0], scale[0]
        return sums


def on_host(tensor: Tensor) -> bool:
    """Whether numbers may be looked at: on an accelerator Python would have to wait for them."""
    return tensor.device.type == "cpu"


def _is_like(held: Tensor | None, weight: Tensor) -> bool:
    """Whether memory can take these weights in their layout."""
    return held is not None and (held.shape, held.dtype, held.device, held.stride()) == (
        *(weight.shape, weight.dtype, weight.device, weight.stride()),
    )
