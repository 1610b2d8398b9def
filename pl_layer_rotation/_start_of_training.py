"""How a recording starts: the weights that its layers are measured from, where they are kept, and facts of the run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from pl_layer_rotation._lightning import log_folder, nearby, run_facts
from pl_layer_rotation._output import Attempts
from pl_layer_rotation._recording import Recording
from pl_layer_rotation._reference import (
    SIDECAR,
    Reference,
    References,
    described,
    reference_weights,
    resolution,
    some_of,
)
from pl_layer_rotation._running_sums import RunningSums
from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.layer_selection import quantized_layers

Layers = Mapping[str, Tensor]


def resumed(
    trainer: "pl.Trainer", state: Mapping[str, Any], references: References, layers: Layers, attempt: Attempts
) -> Recording:
    """The recording that a checkpoint holds; layers whose weights to measure from are lost start now."""
    history, sums = RotationHistory.from_state_dict(state["history"]), RunningSums.from_state_dict(state["sums"])
    references.load_state_dict(state, layers)
    if "sidecar" in state:
        what = "reading the weights to measure from"
        attempt(what, _read_sidecar, trainer, references, state["sidecar"], layers, attempt)
    lost = [name for name in layers if name not in references.pieces]
    if lost:
        references.plan({name: layers[name] for name in lost})
        attempt.warn(f"the checkpoint holds no weights to measure {some_of(lost)} from: they are measured from now on")
    return Recording(references, attempt, history, sums)


def refer(recording: Recording, reference: Reference, layers: Layers) -> None:
    """Measure from the weights that were given.

    Raises:
        MisconfigurationException: If they hold none of the layers.

    """
    given = reference_weights(reference, layers)
    for name, whole in given.items():
        recording.references.give(name, whole, layers[name])
    lacking = [name for name in layers if name not in given]
    if lacking:
        recording.attempt.warn(
            f"`reference` has no weights for {some_of(lacking)}: measured from the start of training"
        )


def write_sidecar(trainer: "pl.Trainer", references: References, layers: Layers) -> None:
    """Write the weights that checkpoints do not carry into a folder next to the logs."""
    # Loggers of other processes may number the run otherwise.
    folder = Path(trainer.strategy.broadcast(os.path.abspath(log_folder(trainer) / SIDECAR)))
    references.write_sidecar(folder, layers, trainer.is_global_zero)


def _read_sidecar(
    trainer: "pl.Trainer", references: References, sidecar: Mapping[str, str], layers: Layers, attempt: Attempts
) -> None:
    places = [folder / SIDECAR for folder in nearby(trainer.ckpt_path)]
    if not references.read_sidecar(sidecar, places, layers, trainer.strategy.reduce_boolean_decision):
        attempt.warn(
            f"the weights to measure from are not in {sidecar['folder']}, or are those of another training. "
            "Put that folder back, or beside the checkpoint's"
        )


def note_facts(
    trainer: "pl.Trainer",
    pl_module: "pl.LightningModule",
    recording: Recording,
    reference: Reference,
    layers: Layers,
) -> None:
    """Note what a reader of the curves must know of the run, and warn of layers that cannot be read."""
    quantized = quantized_layers(pl_module)
    if quantized:
        recording.attempt.warn(f"{some_of(quantized)} hold quantized weights, which have no direction: not measured")
    recording.history.facts.update(run_facts(trainer, pl_module))
    recording.history.facts["reference"] = described(reference)
    rounding = resolution(recording.references.pieces, layers)
    if rounding:
        recording.history.facts["reference_resolution"] = rounding
