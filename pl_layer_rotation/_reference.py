"""The weights to measure rotation from: where they come from, and how they are kept."""

import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._sharding import local_piece, local_tensor, original_shape, shard_count, whole_tensor

SIDECAR = "layer_rotation_reference"  # the folder of references that checkpoints do not carry
Reference = str | os.PathLike[str] | Mapping[str, Any]


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
# Bytes of whole references that travel in a checkpoint; larger ones are written once, into a folder of their own.
_MOST_CARRIED = 256 << 20
# Cosine distance that rounding of the reference alone gives, with room: angles of 1.7e-3 and 2.1e-4 rad.
_RESOLUTION = {torch.bfloat16: 3e-6, torch.float16: 5e-8}


class References:
    """What this process holds of the weights that layers are measured from, by layer, and how checkpoints get them.

    Args:
        device: ``"same"`` as the layer's, or ``"cpu"``.
        dtype: what they are rounded to; None keeps them.
        save: whether checkpoints get them.

    Attributes:
        pieces: of each layer what this process holds.
        sidecar: path and fingerprint of the folder, or None.

    """

    def __init__(self, device: str = "same", dtype: torch.dtype | None = None, save: bool = True) -> None:
        self.device, self.dtype, self.save = device, dtype, save
        self.pieces: dict[str, Tensor] = {}
        self.sidecar: dict[str, str] | None = None
        self._apart: list[str] = []  # layers that checkpoints do not carry
        self._whole: dict[str, Tensor] = {}  # of cut layers, on the CPU
        self._squares: dict[str, float] = {}

    def plan(self, layers: Mapping[str, Tensor]) -> None:
        """Decide what becomes of the references of these layers, before they are taken."""
        sizes = [original_shape(layer).numel() * (self.dtype or layer.dtype).itemsize for layer in layers.values()]
        if sum(sizes) > _MOST_CARRIED:
            self._apart += layers

    def take(self, name: str, layer: Tensor, first: bool = False) -> None:
        """Measure a layer from its weights of now. All processes must call it.

        Args:
            name: of the layer.
            layer: its weights.
            first: whether the plan holds for it; of layers that come later checkpoints always carry the weights.

        """
        if not first and name in self._apart:
            self._apart.remove(name)
        # Outside of inference mode also during validation: the copy must live in later steps.
        with torch.inference_mode(False), torch.no_grad():
            piece = local_tensor(layer).to(dtype=self.dtype, copy=True)
            if self.save and name not in self._apart and shard_count(layer) > 1:
                # Here, where all processes are: a checkpoint may be written by one that failed alone.
                self._whole[name] = whole_tensor(piece, layer)
            self._keep(name, piece)

    def give(self, name: str, whole: Tensor, layer: Tensor) -> None:
        """Measure a layer from given weights of its whole. All processes must call it."""
        piece = local_piece(whole.to(dtype=self.dtype), layer)
        if self.save and name not in self._apart and shard_count(layer) > 1:
            self._whole[name] = whole.to("cpu", self.dtype)
        self._keep(name, piece)

    def square(self, name: str) -> float:
        """Sum of the squares of a whole reference on the CPU, from the reference alone; NaN for others."""
        if name not in self._squares:
            piece = self.pieces[name]
            on_host = piece.device.type == "cpu" and not piece.is_complex()
            self._squares[name] = float(geometry.step_sums(piece, piece)[2]) if on_host else torch.nan
        return self._squares[name]

    def state_dict(self) -> dict[str, Any]:
        """Whole weights on the CPU, and where those are that a checkpoint does not carry."""
        carried = [name for name in self.pieces if self.save and name not in self._apart]
        state: dict[str, Any] = {
            "reference": {name: self._whole.get(name, self.pieces[name]).cpu() for name in carried}
        }
        return state if self.sidecar is None else {**state, "sidecar": dict(self.sidecar)}

    def load_state_dict(self, state: Mapping[str, Any], layers: Mapping[str, Tensor]) -> None:
        """Measure these layers from what a checkpoint carries of them. All processes must call it."""
        for name, layer in layers.items():
            whole = state["reference"].get(name)
            if whole is not None and whole.shape == original_shape(layer):
                self.give(name, whole, layer)

    def write_sidecar(self, folder: Path, layers: Mapping[str, Tensor], first: bool) -> None:
        """Write what checkpoints do not carry. All processes must call it; ``first`` describes the folder."""
        from pl_layer_rotation._sidecar import write_sidecar

        apart = {name: layers[name] for name in self._apart if name in layers}
        if apart and self.save:
            pieces = {name: self.pieces[name] for name in apart}
            self.sidecar = {"folder": str(folder), "fingerprint": write_sidecar(folder, pieces, apart, first)}

    def read_sidecar(
        self,
        sidecar: Mapping[str, str],
        nearby: Sequence[Path],
        layers: Mapping[str, Tensor],
        agree: Callable[[bool], bool],
    ) -> bool:
        """Measure layers that a checkpoint does not carry from its folder. All processes must call it.

        Args:
            sidecar: path and fingerprint.
            nearby: where else to look for the folder.
            layers: all layers.
            agree: whether something is so on all processes.

        Returns:
            Whether the folder was found.

        """
        from pl_layer_rotation._sidecar import holds, read_sidecar

        folders = [Path(sidecar["folder"]), *nearby]
        found = [folder for folder in folders if holds(folder, sidecar["fingerprint"])]
        if not agree(bool(found)):
            return False
        wanted = {name: layer for name, layer in layers.items() if name not in self.pieces}
        for name, piece in read_sidecar(found[0], wanted).items():
            self._keep(name, piece)
            self._apart.append(name)
        self.sidecar = {"folder": str(found[0]), "fingerprint": sidecar["fingerprint"]}
        return True

    def _keep(self, name: str, piece: Tensor) -> None:
        """Hold it where references are to live."""
        if self.device == "cpu" and piece.device.type != "cpu":
            held = torch.empty_like(piece, device="cpu", pin_memory=piece.device.type == "cuda")
            piece = held.copy_(piece)
        self.pieces[name] = piece if self.dtype is None else piece.to(self.dtype)
        self._squares.pop(name, None)


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that references are rounded to.

    Raises:
        MisconfigurationException: If it is no floating dtype that is known here.

    """
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise MisconfigurationException(
            f"`reference_dtype` must be None or one of {', '.join(_DTYPES)}, got {dtype!r}. "
            "None keeps the weights' own; 'bfloat16' takes half of the memory of fp32."
        )
    return found


def described(reference: Reference) -> str:
    """What a reader of the curves is told of the reference."""
    return "given weights" if isinstance(reference, Mapping) else os.fspath(reference)


def resolution(references: Mapping[str, Tensor], layers: Mapping[str, Tensor]) -> float:
    """Cosine distance below which rounding of the references is larger than a motion; 0 where they are not rounded."""
    rounded = [r.dtype for name, r in references.items() if name in layers and layers[name].dtype != r.dtype]
    return max((_RESOLUTION.get(dtype, 0.0) for dtype in rounded), default=0.0)


def check_reference(reference: Any) -> None:
    """Raise unless the argument can be a reference.

    Raises:
        MisconfigurationException: If it is neither "init", nor a state dict, nor a file that exists.

    """
    if isinstance(reference, Mapping):
        return
    if not isinstance(reference, (str, os.PathLike)):
        raise MisconfigurationException(
            f"`reference` must be 'init', a state dict or the path of a checkpoint, got {reference!r}. "
            "Pass for instance `reference='pretrained.ckpt'`."
        )
    if reference != "init" and not Path(reference).is_file():
        raise MisconfigurationException(
            f"`reference` must be 'init', a state dict or the path of a checkpoint, got {os.fspath(reference)!r}, "
            "which is no file. Check the path."
        )


def reference_weights(reference: Reference, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole weights of those layers that a reference holds, in the shape that the layer has.

    Args:
        reference: a state dict, or the path of one or of a Lightning checkpoint.
        layers: layers by name; their weights are looked up by that name, with or without a trailing ``.weight``.

    Raises:
        MisconfigurationException: If the file holds no state dict, or no layer has weights in it.

    """
    weights = reference if isinstance(reference, Mapping) else _load(Path(reference))
    if isinstance(weights.get("state_dict"), Mapping):
        weights = weights["state_dict"]
    found = {}
    for name, layer in layers.items():
        weight = weights.get(f"{name}.weight", weights.get(name))
        if isinstance(weight, Tensor) and weight.shape == original_shape(layer):
            found[name] = weight.detach()
    if layers and not found:
        raise MisconfigurationException(
            f"`reference` must hold weights of the layers ({some_of(layers)}), got {some_of(weights)}, of which none "
            "has the name and shape of a layer. Rename its keys to those of the module's own state dict."
        )
    return found


def _load(path: Path) -> Mapping[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever lies in the file: what torch says of it names neither the argument nor what its user can do.
        raise MisconfigurationException(
            "`reference` must be the path of weights that `torch.load(..., weights_only=True)` reads, got "
            f"{str(path)!r} ({type(error).__name__}). Write them with `torch.save(module.state_dict(), path)`."
        ) from error
    if not isinstance(loaded, Mapping):
        raise MisconfigurationException(
            f"`reference` must be the path of a state dict or a checkpoint, got {str(path)!r} with a "
            f"{type(loaded).__name__}. Save `module.state_dict()`."
        )
    return loaded


def some_of(names: Collection[str], most: int = 5) -> str:
    """The first names in a message, and how many more there are."""
    shown = ", ".join(map(repr, itertools.islice(names, most)))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
