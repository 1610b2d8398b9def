"""Weights from elsewhere to measure rotation from: a checkpoint or a state dict."""

import itertools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_layer_rotation._sharding import original_shape

Reference = str | os.PathLike[str] | Mapping[str, Any]


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
    loaded = torch.load(path, map_location="cpu", weights_only=True)
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
