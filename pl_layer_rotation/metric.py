"""Cosine distance between layers and their reference: a function on tensors and a torchmetrics metric on modules."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._sharding import (
    cut_alike,
    first_incomplete,
    local_tensor,
    original_shape,
    shard_count,
    share_of_sums,
    sum_over_processes,
    world_size,
)
from pl_layer_rotation.layer_selection import as_patterns, select_layers

# Columns of the metric's state: the sums of a layer, a number that stands for its name and shape, and NaN.
_SUMS = 4
_LAYER = 4


def layer_rotation(weights: Tensor, reference: Tensor) -> Tensor:
    r"""Cosine distance :math:`1 - \cos(w, w_0)` between two tensors (layer rotation, arXiv 1806.01603).

    Right from 1e-10 to 2 for tensors of any size: products are taken in fp32 or better and summed in float64, in a
    form that does not subtract nearly equal numbers (``1 - F.cosine_similarity(...)`` in fp32 is noise below 1e-7 and
    far off for large tensors). A tensor of bf16 or fp16 weights is read as it is; its rounding alone is an angle of
    about 1.7e-3 or 2.1e-4 rad. With sharded tensors (DTensor) every process must call it. It is a reading: no gradient
    flows through it.

    Args:
        weights: the weights now, any shape, dtype and layout.
        reference: the weights to measure from, of the same shape.

    Returns:
        float64 tensor of shape ``()`` on the CPU, between 0 and 2; NaN where a norm is zero or a value is NaN.

    Raises:
        ValueError: If the shapes differ, the tensors are sharded otherwise, or one is sparse or on the meta device.

    Example::

        >>> layer_rotation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor(1., dtype=torch.float64)

    """
    if weights.shape != reference.shape:
        raise ValueError(
            f"`weights` and `reference` must have the same shape, got {tuple(weights.shape)} and "
            f"{tuple(reference.shape)}. Pass the same layer at two times."
        )
    for name, tensor in (("weights", weights), ("reference", reference)):
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(
                f"`{name}` must be a dense tensor with values, got {tensor.layout} on {tensor.device}. "
                "Pass it once it is materialized, or its `to_dense()`."
            )
    if not cut_alike(weights, reference):
        raise ValueError(
            "`weights` and `reference` must be sharded alike, got placements "
            f"{getattr(weights, 'placements', None)} and {getattr(reference, 'placements', None)}. "
            "Distribute the reference as the weights are."
        )
    counts = [shard_count(weights)]
    sums, _ = geometry.rotation_sums([local_tensor(weights)], [local_tensor(reference)], [counts[0] == 1])
    return geometry.cosine_distance(sum_over_processes(sums, counts, local_tensor(weights).device))[0]


class LayerRotation(Metric):
    """How far each layer of a module has turned from where it was: cosine distance by layer.

    The metric remembers the layers' weights at construction (or takes ``reference``) and is called with the module. It
    is a reading of a state, not of a stream of data: ``update`` replaces the last reading. It keeps tensors, never the
    module. In a plain loop and in Fabric (after ``setup``) make it before the first step; in a LightningModule make it
    in ``on_train_start`` and use ``self.log_dict(self.rotation(self))``. Its reference is in no checkpoint: made in a
    resumed training it measures from there, unless ``reference`` brings the first weights. The monitor needs no help.

    Its one state holds this process's sums in float64, weighted by how often a piece of a layer stands in the group of
    processes, so that ``compute`` is exact for replicated layers, sharded ones (DTensor, FSDP1) and mixtures of them.
    Every process of the group must call ``compute`` and the metric itself, which always add up over the processes,
    whatever ``dist_sync_on_step`` says. With ``sync_on_compute=False`` a process reads the pieces that it holds: layers
    that are whole there are right, of others it is the rotation of the piece. ``merge_state`` puts such readings of
    the same weights together as the sum over processes would. Two readings of one process at different times give no
    mean that way, and metrics in a ``MetricCollection`` never share a state: each has a reference of its own.

    Half precision of a parent module leaves state and reference alone. Devices without float64 (MPS) keep float64
    weights and sums in fp32; the relative error of small rotations is then about 1e-4.

    Args:
        module: the module whose layers are measured.
        include: patterns of layers to measure, see :func:`~pl_layer_rotation.select_layers`.
        exclude: patterns of layers to leave out.
        reference: weights to measure from instead of the present ones: a state dict of the module, or a mapping from
            layer names. It must hold every measured layer; other entries are ignored.
        **metric_kwargs: what every torchmetrics metric takes (``process_group``, ``sync_on_compute``, …).

    Raises:
        ValueError: If the module has no layers, a reference is shaped or sharded otherwise, ``update`` gets a module
            with other layers or finds that ``process_group`` lacks pieces of a layer, or a reading of other layers is
            merged, loaded or added up over processes.
        MisconfigurationException: If a pattern matches nothing.

    Example::

        >>> model = nn.Linear(2, 1, bias=False)
        >>> nn.init.ones_(model.weight).shape
        torch.Size([1, 2])
        >>> rotation = LayerRotation(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[1.0, 0.0]]))
        >>> {name: round(float(value), 4) for name, value in rotation(model).items()}
        {'weight': 0.2929}

    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 2.0
    reading: Tensor
    __jit_unused_properties__: ClassVar[list[str]] = [*Metric.__jit_unused_properties__, "sums"]

    def __init__(
        self,
        module: nn.Module,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
        *,
        reference: Mapping[str, Tensor] | None = None,
        **metric_kwargs: Any,
    ) -> None:
        # The result is a dictionary: a caller that edits it must not edit the cache.
        super().__init__(**{"compute_with_cache": False, **metric_kwargs})
        self.include, self.exclude = as_patterns("include", include), as_patterns("exclude", exclude)
        layers = select_layers(module, self.include, self.exclude)
        if not layers:
            raise ValueError(
                f"`module` must have a layer to measure, got {type(module).__name__}, of whose parameters none is "
                "selected (two or more dimensions, no normalization, no embedding, initialized). Pass the module that "
                "holds the network, after its first batch where it is lazy, or other patterns."
            )
        self.layer_names = list(layers)
        # Rows of the state go by name, not by depth: processes may register their layers in any order.
        self._rows = sorted(layers)
        start: Mapping[str, Tensor] = layers if reference is None else _by_layer(reference, layers, module)
        self._references = [local_tensor(start[name]).to(layers[name].device, copy=True) for name in self._rows]
        self.add_state("reading", _no_reading(layers, self._rows), dist_reduce_fx=_sum_of_readings)

    @property
    def sums(self) -> Tensor:
        """This process's weighted sums of the last reading, float64, ``(layers, 4)``, layers by name."""
        return self.reading[:, :_SUMS]

    def update(self, module: nn.Module) -> None:
        """Read the layers of the module; replaces the last reading.

        Args:
            module: one with the layers that the metric was made for, in any order.

        Raises:
            ValueError: If it has other layers, or ``process_group`` lacks pieces of a layer.

        """
        layers = select_layers(module, self.include, self.exclude)
        weights = [local_tensor(layers[name]) for name in self._rows if name in layers]
        if sorted(layers) != self._rows or any(
            weight.shape != reference.shape for weight, reference in zip(weights, self._references, strict=True)
        ):
            raise ValueError(
                f"`module` must have the layers that this metric was made for, {_describe(self._layers())}, got "
                f"{_describe({name: local_tensor(weight) for name, weight in layers.items()})}. "
                "Make a new LayerRotation for this module."
            )
        parameters = [layers[name] for name in self._rows]
        if self.sync_on_compute:
            self._check_group(parameters)
        counts = [shard_count(parameter) for parameter in parameters]
        sums, _ = geometry.rotation_sums(weights, self._references, [count == 1 for count in counts])
        # A new tensor, not an update in place: a reading under inference mode must leave a usable state behind.
        weighted = sums * share_of_sums(counts, self.process_group)[:, None]
        self.reading = torch.cat([weighted.to(self.reading), self.reading[:, _SUMS:]], 1)

    def compute(self) -> dict[str, Tensor]:
        """The last reading, over all processes of the group.

        Returns:
            Cosine distance by layer name in depth order, float64 scalars of shape ``()``.

        Example::

            >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
            >>> rotation = LayerRotation(net)
            >>> rotation.update(net)
            >>> {name: float(value) for name, value in rotation.compute().items()}
            {'0': 0.0, '2': 0.0}

        """
        by_name = dict(zip(self._rows, geometry.cosine_distance(self.sums).unbind(), strict=True))
        return {name: by_name[name] for name in self.layer_names}

    @torch.jit.unused
    def forward(self, module: nn.Module) -> dict[str, Tensor]:
        """Read the module and return the cosine distance by layer; every process of the group must call it."""
        if self._is_synced:
            raise TorchMetricsUserError(
                "The Metric shouldn't be synced when performing ``forward``. Call ``unsync`` before."
            )
        self.update(module)
        reading = self.compute()
        self._forward_cache = reading  # type: ignore[assignment]  # torchmetrics declares it as None
        return reading

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of another process's reading of the same weights, a metric or its ``metric_state``."""
        state = incoming_state.metric_state if isinstance(incoming_state, LayerRotation) else incoming_state
        reading = state.get("reading") if isinstance(state, dict) else None
        if isinstance(reading, Tensor) and not _of_same_layers(reading, self.reading):
            raise ValueError(
                f"`incoming_state` must be a reading of the same layers, {_describe(self._layers())}, got one of "
                f"{len(reading)} others. Merge what processes read of one module."
            )
        super().merge_state(incoming_state)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Matplotlib figure and axes of the last reading, or of ``val``, one reading or a list of them."""
        return self._plot(val, ax)

    def _layers(self) -> dict[str, Tensor]:
        references = dict(zip(self._rows, self._references, strict=True))
        return {name: references[name] for name in self.layer_names}

    def _check_group(self, parameters: Sequence[Tensor]) -> None:
        if world_size(self.process_group) < 1:
            raise ValueError(
                "`process_group` must be one that this process is in, got one of others. Read the module on its "
                "members only."
            )
        row = first_incomplete(parameters, self.process_group)
        if row is not None:
            raise ValueError(
                f"`process_group` must hold every piece of a layer equally often, got one of "
                f"{world_size(self.process_group)} processes, which does not for {self._rows[row]!r}, cut in "
                f"{shard_count(parameters[row])}. Leave it out, or pass the group of the layer's device mesh."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}reading")
        if loaded is not None and not _of_same_layers(loaded, self.reading):
            errors: list[str] = args[-1]
            errors.append(
                f"`state_dict` must hold a reading of the same layers, {_describe(self._layers())}, got one of "
                f"{len(loaded)} others. Load it into a metric of the module that it was of."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        # A parent module's `.half()` or `.to(torch.bfloat16)` moves state and reference, but must not round them.
        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor.to(device, geometry.wide_dtype(device) if tensor.dtype == torch.float64 else None)

        self._references = [move(reference) for reference in self._references]
        return super()._apply(move, *args, **kwargs)


def _no_reading(layers: Mapping[str, Tensor], rows: Sequence[str]) -> Tensor:
    """The state before any reading: sums of zero, what tells the layers apart, and NaN.

    A collection merges metrics whose states are nearly equal at first, and so are those of two references a short way
    from each other. NaN equals nothing.
    """
    state = torch.zeros(len(rows), _SUMS + 2, dtype=torch.float64)
    # Below 2^20, which fp32 holds too.
    layers_by_row = ((name, tuple(original_shape(layers[name]))) for name in rows)
    state[:, _LAYER] = torch.tensor([zlib.crc32(repr(layer).encode()) >> 12 for layer in layers_by_row])
    state[:, _LAYER + 1] = torch.nan
    return state


def _of_same_layers(reading: Tensor, other: Tensor) -> bool:
    return reading.shape == other.shape and torch.equal(reading[:, _LAYER].to(other), other[:, _LAYER])


def _sum_of_readings(readings: Tensor) -> Tensor:
    """Sum over processes of their states ``(processes, layers, 6)``."""
    if any(not _of_same_layers(reading, readings[0]) for reading in readings[1:]):
        raise ValueError(
            "`process_group` must be of processes with the same layers, got one with other names or shapes. Pass the "
            "group of the processes that share this module."
        )
    return torch.cat([readings[..., :_SUMS].sum(0), readings[0, :, _SUMS:]], 1)


def _by_layer(reference: Mapping[str, Tensor], layers: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The entries of a state dict of the module, or of a mapping from layer names, that belong to the layers."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    # The last one is for state dicts of a module inside of wrappers: Fabric's own leaves its wrapper's name out.
    found = {
        layer: next((reference[n] for n in (layer, *names.get(id(w), ()), f"{layer}.weight") if n in reference), None)
        for layer, w in layers.items()
    }
    missing = {name: layers[name] for name, weights in found.items() if weights is None}
    if missing:
        raise ValueError(
            f"`reference` must hold every measured layer, got none for {_describe(missing)}. "
            "Leave these layers out with `exclude`, or pass the state dict of this module."
        )
    start = {name: weights for name, weights in found.items() if weights is not None}
    for name, weights in start.items():
        if not cut_alike(weights, layers[name]):
            raise ValueError(
                f"`reference` must be sharded as the module is, got placements {getattr(weights, 'placements', None)} "
                f"for {name!r}, whose weights have {getattr(layers[name], 'placements', None)}. "
                "Distribute it as the module's parameters are."
            )
        expected, got = (tuple(local_tensor(tensor).shape) for tensor in (layers[name], weights))
        if got != expected:
            raise ValueError(
                f"`reference` must have the shape of the layer, {expected} for {name!r}, got {got}. "
                "Pass weights of the same architecture, sharded as the module is."
            )
    return start


def _describe(layers: Mapping[str, Tensor], most: int = 8) -> str:
    shown = [f"{name} {tuple(weight.shape)}" for name, weight in list(layers.items())[:most]]
    return ", ".join(shown) + (f" and {len(layers) - most} more" if len(layers) > most else "")
