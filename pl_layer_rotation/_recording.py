"""The curves of one training while it runs: what its layers are measured from, the last reading, the history."""

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from pl_layer_rotation._known_angles import KnownAngles
from pl_layer_rotation._lightning import current_rates
from pl_layer_rotation._measuring import Measuring
from pl_layer_rotation._output import Attempts, Reading
from pl_layer_rotation._reference import References, some_of
from pl_layer_rotation._running_sums import RunningSums, straightness
from pl_layer_rotation._sharding import local_tensor, original_shape, shard_count
from pl_layer_rotation.history import RotationHistory

# Readings that the history keeps, and values of one quantity: a long training of many layers must not fill the memory.
_MOST_READINGS, _MOST_VALUES, _FEWEST_KEPT = 500, 500_000, 100


class Recording:
    """Reads layers step by step, and records what it read where it is told to.

    Steps are counted in batches that stepped. All processes call the same methods in the same order.

    Args:
        references: what layers are measured from.
        attempt: what guards the training; kept under the same name.
        history: curves that go on.
        sums: what the angles of steps have added up to.

    Attributes:
        history: the curves.
        measuring: references, copies and sums.
        latest: the last reading and its step, recorded or not; None before the first.
        diverged: whether it met weights that are not finite.

    """

    def __init__(
        self,
        references: References,
        attempt: Attempts,
        history: RotationHistory | None = None,
        sums: RunningSums | None = None,
    ) -> None:
        self.history = RotationHistory([]) if history is None else history
        self.measuring = Measuring(references, sums)
        self.latest: tuple[int, Reading] | None = None
        self.diverged = False
        self.attempt = attempt
        self._known = KnownAngles()
        self._requested: dict[str, float] = {}  # angles that rates ask for, by layer
        self._rates: tuple[float, ...] = ()
        self._ends_with_extra_row = False

    @property
    def references(self) -> References:
        """What layers are measured from."""
        return self.measuring.references

    def state_dict(self) -> dict[str, Any]:
        """The curves, their sums and the weights to measure from; empty without layers."""
        if not self.references.pieces:
            return {}
        history = self.history
        if self._ends_with_extra_row:
            # It is there because that fit ended; a resumed one has its rows on the cadence.
            history = copy.deepcopy(history)
            history.drop_from(history.steps[-1])
        # Lightning stores what the first process returns, and gives it to all: never a piece of a layer.
        return {
            "history": history.state_dict(),
            "sums": self.measuring.sums.state_dict(),
            **self.references.state_dict(),
        }

    def __getstate__(self) -> dict[str, Any]:
        # Parameters are told apart by identity, which a copy does not share.
        return vars(self) | {"_known": KnownAngles()}

    def adopt(self, layers: Mapping[str, Tensor], step: int, first: bool = False) -> None:
        """Give layers that are new, or have another shape than before, the weights of now to measure from."""
        pieces = self.references.pieces
        local = {name: local_tensor(weight).shape for name, weight in layers.items()}
        new = [name for name, shape in local.items() if name not in pieces or pieces[name].shape != shape]
        for name in new:
            self._take_reference(name, layers[name], first)
        self._known.name(layers)
        shapes = {name: tuple(original_shape(weight)) for name, weight in layers.items()}
        known = dict(zip(self.history.layer_names, self.history.layer_shapes, strict=True))
        gone = {name: shape for name, shape in known.items() if name not in shapes}
        everything = {**shapes, **gone}
        if list(everything.items()) != list(known.items()):
            self.history = self.history.reindex(list(everything), list(everything.values()))
            self.history.keep_at_most(max(_FEWEST_KEPT, min(_MOST_READINGS, _MOST_VALUES // len(everything))))
        if new and step:
            self._note_reference_step(new, step)
        whole = [name for name in new if shard_count(layers[name]) == 1]
        zeros = [name for name in whole if not torch.any(pieces[name]).item()]
        if zeros:
            self.attempt.warn(
                f"{some_of(zeros)} start at zero and have no direction: measured from the first non-zero weights"
            )

    def unknown(self, trainer: "pl.Trainer", layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layers whose angles no optimizer knows: they must be copied before a step that is read."""
        self._known.look(trainer, layers)
        return self._known.unknown(layers)

    def before_step(self, trainer: "pl.Trainer", layers: Mapping[str, Tensor], copies: bool) -> None:
        """Note the angles that rates ask for in a step that is read, and copy layers whose angles must be measured."""
        self._requested = self._known.look(trainer, layers)
        if copies:
            self.measuring.copy(self._known.unknown(layers))

    def take_turned(self, trainer: "pl.Trainer", step: int) -> None:
        """Take the angles that optimizers know."""
        known = self._known.take(trainer)
        if known is not None:
            self.measuring.take_turned(*known, step)

    def read(self, layers: Mapping[str, Tensor], step: int) -> None:
        """Measure every layer as it is now."""
        self.adopt(layers, step)
        measured = self.measuring.read(layers, step)
        for name in measured.started:
            self._take_reference(name, layers[name])
        if measured.started:
            self._note_reference_step(measured.started, step)
        self.diverged = bool(measured.not_finite)
        if measured.not_finite or "not_finite" in self.history.facts:
            self.history.facts["not_finite"] = measured.not_finite
        reading = {quantity: self._filled(layers, values) for quantity, values in measured.values.items()}
        if self._requested:
            reading["requested_angle"] = [self._requested.get(name, math.nan) for name in self.history.layer_names]
        momentum = self.history.facts.get("momentum")
        if momentum is not None and "path_square" in reading:
            reading["straightness"] = straightness(reading["rotation"], reading["path_square"], momentum)
        if measured.dense is not None:
            self.history.facts.update(angle_readings=self.measuring.sums.readings, dense_steps=measured.dense)
        self.latest = (step, reading)

    def record(self, trainer: "pl.Trainer", *, extra: bool = False) -> tuple[int, Reading]:
        """Put the last reading into the history.

        Args:
            trainer: the one that trains.
            extra: whether it is there only because training ends here.

        Returns:
            Its step and values.

        """
        assert self.latest is not None
        step, reading = self.latest
        # After an interrupt, or a resume with another accumulation, Lightning may number a step twice.
        self.history.drop_from(step)
        self.history.append(step, **reading)
        self.attempt("noting the learning rate", self._watch_rates, trainer)
        self._ends_with_extra_row = extra
        return step, reading

    def _take_reference(self, name: str, layer: Tensor, first: bool = False) -> None:
        self.measuring.sums.forget(name)
        self.references.take(name, layer, first)

    def _note_reference_step(self, names: Collection[str], step: int) -> None:
        self.history.facts.setdefault("reference_steps", {}).update(dict.fromkeys(names, step))

    def _filled(self, names: Collection[str], values: Tensor) -> list[float]:
        """Values in the order of the history's layers; NaN for layers that are gone and where undefined."""
        measured = dict(zip(names, values.tolist(), strict=True))
        return [
            value if math.isfinite(value := measured.get(n, math.nan)) else math.nan for n in self.history.layer_names
        ]

    def _watch_rates(self, trainer: "pl.Trainer") -> None:
        rates = current_rates(trainer)
        if self._rates and rates != self._rates:
            self.history.facts["constant_learning_rate"] = False
        else:
            self.history.facts.setdefault("constant_learning_rate", True)
        self._rates = rates
