"""Angles that optimizers know themselves: nothing must be copied to read them."""

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor

from pl_layer_rotation._lightning import layca_optimizers_of, requested_angles


class KnownAngles:
    """Which layers a trainer's optimizers turn by angles that they know, and those angles.

    Parameters are told apart by identity; nothing here keeps them.
    """

    def __init__(self) -> None:
        self._exact: set[int] = set()
        self._names: dict[int, str] = {}

    def name(self, layers: Mapping[str, Tensor]) -> None:
        """Note whose parameters these are."""
        self._names = {id(layer): name for name, layer in layers.items()}

    def unknown(self, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layers whose angles must be read, by what the last :meth:`look` saw."""
        return {name: layer for name, layer in layers.items() if id(layer) not in self._exact}

    def look(self, trainer: "pl.Trainer", layers: Mapping[str, Tensor]) -> dict[str, float]:
        """Look at the optimizers before a step.

        Returns:
            The angle in radians that the rate of each layer asks for; without layers that turn by no set angle.

        """
        requested, self._exact = requested_angles(trainer)
        return {name: requested[id(layer)] for name, layer in layers.items() if id(layer) in requested}

    def take(self, trainer: "pl.Trainer") -> tuple[list[str], Tensor] | None:
        """Layers and the angles that the last step turned them by, 0 where it left one alone; None without Layca."""
        names: list[str] = []
        parts = []
        for optimizer in layca_optimizers_of(trainer):
            parameters, turned = optimizer._angles_for_the_monitor()
            known = [place for place, parameter in enumerate(parameters) if id(parameter) in self._names]
            names += [self._names[id(parameters[place])] for place in known]
            parts.append(turned if len(known) == len(parameters) else turned[known])
        if not parts:
            return None
        moved = set(names)
        left = [name for key, name in self._names.items() if key in self._exact and name not in moved]
        return names + left, torch.cat([*(part.to(parts[0]) for part in parts), parts[0].new_zeros(len(left))])
