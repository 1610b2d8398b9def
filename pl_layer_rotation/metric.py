"""Cosine distance between layers and their reference: a function on tensors and a torchmetrics metric on modules."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._sharding import local_tensor, shard_count, share_of_sums, sum_over_processes
from pl_layer_rotation.layer_selection import select_layers


def layer_rotation(weights: Tensor, reference: Tensor) -> Tensor:
    r"""Cosine distance :math:`1 - \cos(w, w_0)` between two tensors (layer rotation, arXiv 1806.01603).

    Right from 1e-10 to 2 for tensors of any size: products are taken in fp32 or better and summed in float64, in a
    form that does not subtract nearly equal numbers (``1 - F.cosine_similarity(...)`` in fp32 is noise below 1e-7 and
    far off for large tensors). A tensor of bf16 or fp16 weights is read as it is; its rounding alone is an angle of
    about 1.7e-3 or 2.1e-4 rad.

    Args:
        weights: the weights now, any shape, dtype and layout.
        reference: the weights to measure from, of the same shape.

    Returns:
        float64 tensor of shape ``()`` on the CPU, between 0 and 2; NaN where a norm is zero or a value is NaN.

    Raises:
        ValueError: If the shapes differ.

    Example::

        >>> layer_rotation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor(1., dtype=torch.float64)

    """
    # Sharded tensors (DTensor): every process that holds a piece must call.
    if weights.shape != reference.shape:
        raise ValueError(
            f"`weights` and `reference` must have the same shape, got {tuple(weights.shape)} and "
            f"{tuple(reference.shape)}. Pass the same layer at two times."
        )
    counts = [shard_count(weights)]
    pieces = local_tensor(weights), local_tensor(reference)
    if pieces[0].shape != pieces[1].shape:
        raise ValueError(
            "`weights` and `reference` must be sharded alike, got local pieces of shapes "
            f"{tuple(pieces[0].shape)} and {tuple(pieces[1].shape)}. Distribute the reference as the weights are."
        )
    sums, _ = geometry.rotation_sums([pieces[0]], [pieces[1]], [counts[0] == 1])
    return geometry.cosine_distance(sum_over_processes(sums, counts, pieces[0].device))[0]


class LayerRotation(Metric):
    """How far each layer of a module has turned from where it was: cosine distance by layer.

    The metric remembers the layers' weights at construction (or takes ``reference``) and is called with the module. It
    is a reading of a state, not of a stream of data: ``update`` replaces the last reading. It keeps tensors, never the
    module. In a plain loop and in Fabric (after ``setup``) make it before the first step; in a LightningModule make it
    in ``on_train_start`` and use ``self.log_dict(self.rotation(self))``.

    Its one state holds this process's sums in float64, ``(layers, 4)``, weighted by how often a piece of a layer stands
    in the group of processes, so that ``compute`` is exact for replicated layers, sharded ones (DTensor) and mixtures.
    Half precision of a parent module leaves state and reference alone. Devices without float64 (MPS) sum in fp32; the
    relative error of small rotations is then about 1e-4.

    Args:
        module: the module whose layers are measured.
        include: patterns of layers to measure, see :func:`~pl_layer_rotation.select_layers`.
        exclude: patterns of layers to leave out.
        reference: weights to measure from instead of the present ones: a state dict of the module, or a mapping from
            layer names. It must hold every measured layer; other entries are ignored.
        **metric_kwargs: what every torchmetrics metric takes (``process_group``, ``sync_on_compute``, …).

    Raises:
        ValueError: If the module has no layers, a reference has another shape, or ``update`` gets a module with other
            layers.
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
    full_state_update = True
    plot_lower_bound = 0.0
    plot_upper_bound = 2.0
    __jit_unused_properties__: ClassVar[list[str]] = [*Metric.__jit_unused_properties__, "sums"]

    def __init__(
        self,
        module: nn.Module,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
        reference: Mapping[str, Tensor] | None = None,
        **metric_kwargs: Any,
    ) -> None:
        # The result is a dictionary: a caller that edits it must not edit the cache.
        super().__init__(**{"compute_with_cache": False, **metric_kwargs})
        self.include, self.exclude = include, exclude
        layers = select_layers(module, include, exclude)
        if not layers:
            raise ValueError(
                f"`module` must have a layer to measure, got {type(module).__name__} without a parameter of two or "
                "more dimensions. Pass the module that holds the network."
            )
        self.layer_names = list(layers)
        start: Mapping[str, Tensor] = layers if reference is None else _by_layer(reference, layers, module)
        self._references = [local_tensor(start[name]).to(w.device, copy=True) for name, w in layers.items()]
        # A collection merges metrics whose states have one name and one value at first. These of other layers may start
        # with equal sums (a copy of a network), so the name says which layers it holds.
        self._state = f"sums_{zlib.crc32(repr(self.layer_names).encode()):08x}"
        self.add_state(self._state, torch.zeros(len(layers), 4, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def sums(self) -> Tensor:
        """This process's weighted sums of the last reading, float64, ``(layers, 4)``."""
        return cast(Tensor, getattr(self, self._state))

    def update(self, module: nn.Module) -> None:
        """Read the layers of the module; replaces the last reading."""
        layers = select_layers(module, self.include, self.exclude)
        weights = [local_tensor(weight) for weight in layers.values()]
        if list(layers) != self.layer_names or any(
            weight.shape != reference.shape for weight, reference in zip(weights, self._references, strict=True)
        ):
            raise ValueError(
                f"`module` must have the layers that this metric was made for, {_describe(self._layers())}, got "
                f"{_describe(dict(zip(layers, weights, strict=True)))}. Make a new LayerRotation for this module."
            )
        counts = [shard_count(weight) for weight in layers.values()]
        sums, _ = geometry.rotation_sums(weights, self._references, [count == 1 for count in counts])
        # A new tensor, not an update in place: a reading under inference mode must leave a usable state behind.
        weighted = sums * share_of_sums(counts, self.process_group)[:, None]
        setattr(self, self._state, weighted.to(self.sums))

    def compute(self) -> dict[str, Tensor]:
        """Cosine distance by layer name, float64 scalars."""
        return dict(zip(self.layer_names, geometry.cosine_distance(self.sums).unbind(), strict=True))

    @torch.jit.unused
    def forward(self, module: nn.Module) -> dict[str, Tensor]:
        """Read the module and return the cosine distance by layer; every process of the group must call it."""
        self.update(module)
        reading = self.compute()
        self._forward_cache = reading  # type: ignore[assignment]  # torchmetrics declares it as None
        return reading

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Matplotlib figure and axes of the last reading, or of ``val``, one reading or a list of them."""
        return self._plot(val, ax)

    def _layers(self) -> dict[str, Tensor]:
        return dict(zip(self.layer_names, self._references, strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        # A parent module's `.half()` or `.to(torch.bfloat16)` moves state and reference, but must not round them.
        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor.to(device, torch.float32 if device.type == "mps" and tensor.is_floating_point() else None)

        self._references = [move(reference) for reference in self._references]
        return super()._apply(move, *args, **kwargs)


def _by_layer(reference: Mapping[str, Tensor], layers: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The entries of a state dict of the module, or of a mapping from layer names, that belong to the layers."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {
        layer: next((reference[n] for n in (layer, *names.get(id(weight), ())) if n in reference), None)
        for layer, weight in layers.items()
    }
    missing = {name: layers[name] for name, weights in found.items() if weights is None}
    if missing:
        raise ValueError(
            f"`reference` must hold every measured layer, got none for {_describe(missing)}. "
            "Leave these layers out with `exclude`, or pass the state dict of this module."
        )
    start = {name: weights for name, weights in found.items() if weights is not None}
    for name, weights in start.items():
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
