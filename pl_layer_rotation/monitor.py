"""The callback that measures, records, logs and reports layer rotation while Lightning trains."""

import copy
import math
import os
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from pl_layer_rotation._arguments import check_choices, check_every_n_steps, check_log_quantities
from pl_layer_rotation._cadence import Cadence, planned
from pl_layer_rotation._known_angles import KnownAngles
from pl_layer_rotation._lightning import (
    CallbackBase,
    averages_are_in,
    current_rates,
    expected_steps,
    log_folder,
    nearby,
    run_facts,
    stepped_batches,
)
from pl_layer_rotation._measuring import Measuring
from pl_layer_rotation._output import Attempts, Output, Reading
from pl_layer_rotation._reference import (
    SIDECAR,
    References,
    check_dtype,
    check_reference,
    described,
    reference_weights,
    resolution,
    some_of,
)
from pl_layer_rotation._running_sums import RunningSums, straightness
from pl_layer_rotation._sharding import local_tensor, original_shape, shard_count
from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.layer_selection import UnreadableLayersError, quantized_layers, select_layers

# Bytes of a second copy of the layers that `angular_update="auto"` takes.
_MOST_COPIED = 1 << 30
# Readings that the history keeps, and values of one quantity: a long training of many layers must not fill the memory.
_MOST_READINGS, _MOST_VALUES, _FEWEST_KEPT = 500, 500_000, 100


class LayerRotationMonitor(CallbackBase):
    """Record and log how far each layer has turned from its initialization (layer rotation, arXiv 1806.01603).

    Takes a copy of the layers' weights when training starts, reads them on the trainer's log cadence and once more at
    the end, and says what it saw: scalars to every logger, :attr:`history`, a table, and a self-contained HTML page.
    Works on one device, under DDP, FSDP and tensor parallelism, resumes with the checkpoint, and never ends a training
    because of itself: what goes wrong in logging or reporting is a warning.

    Logged keys, with the layer's depth in front of its name so that alphabetical order is depth order:

    - ``layer_rotation/007_block_conv1``: cosine distance from the weights at the start, 0 … 2;
    - ``layer_rotation_stats/mean``, ``min``, ``max``: over layers; also in ``trainer.callback_metrics`` from the first
      reading or validation on, for ``EarlyStopping`` and ``ModelCheckpoint``; NaN there once weights are not finite;
    - ``layer_straightness_stats/median``: over layers, how much straighter than a random walk of the same steps they
      moved; also in ``callback_metrics``. Near 1 in well-tuned trainings; above 1.7 the learning rate is too low, see
      ``benchmarks/findings.py``. Usable from a tenth of a training on; absent where the
      optimizer's momentum is not known.
    - ``layer_angular_update/…`` (radians turned by the optimizer steps of one batch), ``layer_norm_ratio/…`` (norm
      over norm at the start) and ``layer_straightness/…`` where ``log_quantities`` asks for them; the history always
      has them, with the sums over steps that :meth:`RotationHistory.findings` needs.

    Angles of layers that :class:`~pl_layer_rotation.Layca` turns come from the optimizer, in every step and for nothing
    (fp32 and float64 weights; ``requested_angle`` in the history is the angle that its rate asks for). Those of other
    layers are read in every step of the first tenth of a training (at most 1000), then on the cadence and at least 60
    times in all; each reading takes a second copy of the weights for the length of a step.

    With more than 1000 layers loggers get the aggregates only. The history keeps at most 500 readings (fewer of more
    than 1000 layers): of longer trainings every second, fourth, … of them. A layer that starts at zero has no
    direction: it is measured from its first non-zero weights, and a warning says so once. Layers that appear during
    training join with the weights at their first reading. Steps that Lightning counts though nothing took them (no
    loss, an overflow that the gradient scaler skipped) are read as they are, with an angle of 0. Figures go to W&B and
    the page only, other loggers get the scalars. Should a measurement fail, a warning says why and reading stops. Where
    layers cannot be told (FSDP with ``use_orig_params=False``, DeepSpeed stage 3) or read (quantized weights), a
    warning at the start names them, and training goes on without the monitor, or without those layers.

    Checkpoints carry the weights to measure from where they take no more than 256 MB. Larger ones are written once,
    when training starts, into the folder ``layer_rotation_reference`` next to the logs (each process what it holds;
    torch's distributed checkpoint), and checkpoints hold its path and fingerprint. It must stay there, or move with
    the checkpoints beside it; where it is gone, a resumed run warns and measures from where it resumes.

    Limits: strategies that start processes of their own (``ddp_spawn``, ``ddp_notebook``) leave ``history`` in them,
    the files remain. Of two monitors in one trainer the later one's files and aggregates count. LightningCLI of
    ``lightning.pytorch`` wants that package imported before this one. Aggregates of the angular update exist from the
    first reading on only.

    Args:
        include: patterns of layers to measure, see :func:`~pl_layer_rotation.select_layers`.
        exclude: patterns of layers to leave out.
        every_n_steps: batches that stepped between readings; None takes the trainer's ``log_every_n_steps``.
        log_quantities: what goes to the loggers of each layer: ``"rotation"``, ``"angular_update"``,
            ``"norm_ratio"``, ``"straightness"``.
        angular_update: whether to read angles of layers that the optimizer does not know, for which weights must be
            copied: True, False, or ``"auto"``, where the copy takes no more than 1 GB in any process.
        reference: what to measure from: ``"init"``, the weights when training starts; or a state dict, or the path of
            one or of a Lightning checkpoint, for instance pretrained weights that are fine-tuned. Its keys are those of
            the module's own state dict; layers that it lacks are measured from the start of training, and a warning
            names them. A resumed training goes on with the reference of its checkpoint.
        reference_device: where those weights live: ``"same"`` as the layers, or ``"cpu"``, pinned, from where each
            reading streams them layer by layer; nothing stays on the accelerator then.
        reference_dtype: what they are rounded to, such as ``"bfloat16"`` for half of the memory of fp32; None keeps
            the weights' own. Rounding alone is an angle of about 1.7e-3 rad (bfloat16) or 2.1e-4 rad (float16), so
            cosine distances below 3e-6 or 5e-8 mean nothing then.
        save_reference: whether checkpoints carry the weights to measure from (of sharded layers every process keeps
            them whole in host memory). Without them a resumed run measures from where it resumes, and says so.
        report: whether to print the table and write ``layer_rotation.html`` and ``layer_rotation.jsonl`` next to the
            logs: the file grows with every reading, the page is renewed after epochs and when training ends, also by
            an exception. ``"wandb"`` puts the page into the run of a ``WandbLogger`` too.

    Raises:
        MisconfigurationException: If an argument is out of range; at the start of training, if a pattern matches
            nothing.

    Example::

        >>> monitor = LayerRotationMonitor(exclude="head", every_n_steps=10)
        >>> trainer = pl.Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        *,
        every_n_steps: int | None = None,
        log_quantities: list[str] | tuple[str, ...] = ("rotation",),
        angular_update: bool | Literal["auto"] = "auto",
        reference: str | os.PathLike[str] | Mapping[str, Any] = "init",
        reference_device: Literal["same", "cpu"] = "same",
        reference_dtype: str | torch.dtype | None = None,
        save_reference: bool = True,
        report: bool | Literal["wandb"] = True,
    ) -> None:
        super().__init__()
        check_reference(reference)
        check_choices(reference_device=reference_device, report=report, angular_update=angular_update)
        check_every_n_steps(every_n_steps)
        check_log_quantities(log_quantities)
        self.include, self.exclude = include, exclude
        self.every_n_steps = every_n_steps
        self.log_quantities = tuple(log_quantities)
        self.reference = reference
        self.reference_device, self.reference_dtype = reference_device, check_dtype(reference_dtype)
        self.save_reference = save_reference
        self.angular_update = angular_update
        self.report = report
        self.history = RotationHistory([])
        self._measuring = Measuring(References())
        self._restored: Mapping[str, Any] | None = None
        self._layers: dict[str, Tensor] = {}  # during a step that is read, as they were found before it
        self._known = KnownAngles()
        self._requested: dict[str, float] = {}  # angles that rates ask for, by layer
        self._cadence, self._copies = Cadence(0), True
        self._rates: tuple[float, ...] = ()
        self._training = False
        self._broken = False  # a measurement failed: nothing is read any more in this fit
        self._diverged = False  # the last reading met weights that are not finite
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._global_step = 0
        self._step = 0
        self._latest: tuple[int, Reading] | None = None  # the last reading and its step, recorded or not
        self._ends_with_extra_row = False
        self._attempt = Attempts()
        self._output = Output(self.log_quantities, report, self._attempt)

    @property
    def state_key(self) -> str:
        """Tells monitors of other layers apart in a checkpoint; a resumed run may read or log otherwise."""
        include, exclude = ([p] if isinstance(p, str) else p and list(p) for p in (self.include, self.exclude))
        return self._generate_state_key(include=include, exclude=exclude)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Forget what an earlier ``validate(ckpt_path=...)`` loaded: only this fit's checkpoint counts."""
        if stage == "fit":
            self._restored = None

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Take the reference, or go on from the checkpoint's or from the last fit."""
        lazy = any(map(is_lazy, pl_module.parameters()))
        self._training = False
        try:
            layers = select_layers(pl_module, self.include, self.exclude)
        except UnreadableLayersError as error:
            self._attempt.warn(f"layers cannot be measured, and training goes on without: {str(error).rstrip('.')}")
            self._start_anew(RotationHistory([]), RunningSums(), {})
            return
        except MisconfigurationException:
            if not lazy:
                raise
            layers = {}  # a pattern may mean a layer that is yet to be initialized
        same = self._module is not None and self._module() is pl_module
        goes_on = same and self._measuring.references.pieces and trainer.global_step == self._global_step > 0
        self._module, self._broken, self._step = weakref.ref(pl_module), False, stepped_batches(trainer)
        if self._restored is not None:
            self._resume(trainer, self._restored, layers)
        elif not goes_on:
            if trainer.global_step > 0:
                self._attempt.warn("the checkpoint holds no layer rotation: curves start where training resumes")
            self._start_anew(RotationHistory([]), RunningSums(self._step), layers)
            if self.reference != "init":
                self._refer(layers)
        self._restored = None
        expected = bool(layers) or lazy
        if not expected:
            self._attempt.warn(
                f"{type(pl_module).__name__} has no layers to measure (no parameter of two or more dimensions)"
            )
        self._adopt(layers, first=True)
        if self._measuring.references.sidecar is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._attempt("writing the weights to measure from", self._write_sidecar, trainer, layers)
        # A barebones trainer logs never: nothing is read either.
        self._cadence = Cadence(int(self.every_n_steps or trainer.log_every_n_steps))  # type: ignore[attr-defined]
        self._training = expected and self._cadence.every > 0
        self._global_step = trainer.global_step
        self._attempt("noting the facts", self._note_facts, trainer, pl_module, layers)
        self._attempt("planning the readings", self._plan_angles, trainer, layers)
        self._output.prepare(trainer, self.history)

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Copy the weights before a step whose angle will be read."""
        if not self._reads(trainer):
            return
        step = stepped_batches(trainer) + 1
        due = self._cadence.reads(step, self._step) or self._cadence.reads_angles(step, self._step)
        # The first of several optimizers that step in this batch.
        due = due and not self._layers
        if due or self._step == 0:
            self._measure(self._prepare, trainer, pl_module, due)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read and record on the cadence, after batches that stepped."""
        # global_step grows by the number of optimizers, and not at all while gradients accumulate.
        if not self._training or trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        step = stepped_batches(trainer) + 1
        due, self._step = self._cadence.reads(step, self._step), step
        if self._reads(trainer) and self._measure(self._take_turned, trainer):
            if due and self._measure(self._read, pl_module):
                self._record(trainer)
            elif self._measuring.waits:
                self._measure(self._measuring.read_angles, self._layers, step)
            if step >= self._cadence.dense_until:
                self._measuring.free()
        self._layers = {}

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Bring the aggregates up to date for callbacks that look at them after validation."""
        # Before averaging callbacks put their weights in, which they do at the start of the validation epoch.
        self._bring_up_to_date(trainer, pl_module)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Bring the aggregates up to date; the reading is recorded if training ends here."""
        self._bring_up_to_date(trainer, pl_module)
        if self._training:
            self._output.refresh(trainer, self.history)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Record the final reading and report."""
        # Averaging callbacks may have replaced the weights by now: the reading was taken at the end of the epoch.
        if self._training and self._latest is not None and self._latest[0] not in (0, *self.history.steps[-1:]):
            self._record(trainer)
            self._ends_with_extra_row = True
        self._finish(trainer)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Report what was recorded until then. No collective: this process may be alone."""
        self._finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The curves and, unless ``save_reference=False``, the weights to measure from, by layer name."""
        references = self._measuring.references
        if not references.pieces:
            return {}
        history = self.history
        if self._ends_with_extra_row:
            # It is there because that fit ended; a resumed one has its rows on the cadence.
            history = copy.deepcopy(history)
            history.drop_from(history.steps[-1])
        # Lightning stores what the first process returns, and gives it to all: never a piece of a layer.
        return {
            "history": history.state_dict(),
            "sums": self._measuring.sums.state_dict(),
            **references.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: only then is it known where the layers live."""
        self._restored = state_dict or None

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the module's methods on callbacks while it trains; with them a copy would hold the module.
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")} | {
            **{"_module": None, "_layers": {}, "_known": KnownAngles()}
        }

    def _start_anew(self, history: RotationHistory, sums: RunningSums, layers: Mapping[str, Tensor]) -> None:
        self.history = history
        self._measuring = Measuring(References(self.reference_device, self.reference_dtype, self.save_reference))
        self._measuring.sums = sums
        self._measuring.references.plan(layers)
        self._rates, self._latest, self._ends_with_extra_row = (), None, False

    def _resume(self, trainer: "pl.Trainer", state: Mapping[str, Any], layers: Mapping[str, Tensor]) -> None:
        history, sums = RotationHistory.from_state_dict(state["history"]), RunningSums.from_state_dict(state["sums"])
        self._start_anew(history, sums, {})
        references = self._measuring.references
        references.load_state_dict(state, layers)
        if "sidecar" in state:
            self._attempt("reading the weights to measure from", self._read_sidecar, trainer, state["sidecar"], layers)
        lost = [name for name in layers if name not in references.pieces]
        if lost:
            references.plan({name: layers[name] for name in lost})
            self._attempt.warn(
                f"the checkpoint holds no weights to measure {some_of(lost)} from: they are measured from now on"
            )

    def _write_sidecar(self, trainer: "pl.Trainer", layers: Mapping[str, Tensor]) -> None:
        # Loggers of other processes may number the run otherwise.
        folder = Path(trainer.strategy.broadcast(os.path.abspath(log_folder(trainer) / SIDECAR)))
        self._measuring.references.write_sidecar(folder, layers, trainer.is_global_zero)

    def _read_sidecar(self, trainer: "pl.Trainer", sidecar: Mapping[str, str], layers: Mapping[str, Tensor]) -> None:
        places = [folder / SIDECAR for folder in nearby(trainer.ckpt_path)]
        agree = trainer.strategy.reduce_boolean_decision
        if not self._measuring.references.read_sidecar(sidecar, places, layers, agree):
            self._attempt.warn(
                f"the weights to measure from are not in {sidecar['folder']}, or are those of another training. "
                "Put that folder back, or beside the checkpoint's"
            )

    def _refer(self, layers: Mapping[str, Tensor]) -> None:
        """Measure from the weights that were given."""
        given = reference_weights(self.reference, layers)
        for name, whole in given.items():
            self._measuring.references.give(name, whole, layers[name])
        lacking = [name for name in layers if name not in given]
        if lacking:
            self._attempt.warn(
                f"`reference` has no weights for {some_of(lacking)}: measured from the start of training"
            )

    def _adopt(self, layers: Mapping[str, Tensor], first: bool = False) -> None:
        """Give layers that are new, or have another shape than before, the weights of now to measure from."""
        pieces = self._measuring.references.pieces
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
        if new and self._step:
            self.history.facts.setdefault("reference_steps", {}).update(dict.fromkeys(new, self._step))
        whole = [name for name in new if shard_count(layers[name]) == 1]
        zeros = [name for name in whole if not torch.any(pieces[name]).item()]
        if zeros:
            self._attempt.warn(
                f"{some_of(zeros)} start at zero and have no direction: measured from the first non-zero weights"
            )

    def _take_reference(self, name: str, layer: Tensor, first: bool = False) -> None:
        self._measuring.sums.forget(name)
        self._measuring.references.take(name, layer, first)

    def _note_facts(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", layers: Mapping[str, Tensor]) -> None:
        quantized = quantized_layers(pl_module)
        if quantized:
            self._attempt.warn(f"{some_of(quantized)} hold quantized weights, which have no direction: not measured")
        self.history.facts.update(run_facts(trainer, pl_module))
        self.history.facts["reference"] = described(self.reference)
        rounding = resolution(self._measuring.references.pieces, layers)
        if rounding:
            self.history.facts["reference_resolution"] = rounding

    def _plan_angles(self, trainer: "pl.Trainer", layers: Mapping[str, Tensor]) -> None:
        """Decide which steps' angles are read besides those on the cadence."""
        steps = expected_steps(trainer)
        self.history.facts["total_steps"] = steps
        self._known.look(trainer, layers)
        size = sum(local_tensor(layer).nbytes for layer in self._known.unknown(layers).values())
        small = trainer.strategy.reduce_boolean_decision(size <= _MOST_COPIED)
        if self.angular_update == "auto" and not small:
            self._attempt.warn(
                "a copy of the layers takes over 1 GB: angles are read only of layers that Layca turns. "
                "Pass `angular_update=True` to take that copy"
            )
        self._copies = small if self.angular_update == "auto" else bool(self.angular_update)
        self._cadence = planned(self._cadence.every, steps, self._copies)

    def _watch_rates(self, trainer: "pl.Trainer") -> None:
        rates = current_rates(trainer)
        if self._rates and rates != self._rates:
            self.history.facts["constant_learning_rate"] = False
        else:
            self.history.facts.setdefault("constant_learning_rate", True)
        self._rates = rates

    def _reads(self, trainer: "pl.Trainer") -> bool:
        return self._training and not self._broken and not averages_are_in(trainer)

    def _measure(self, action: Callable[..., None], *args: Any) -> bool:
        """Do it; where it fails, warn and read no more, rather than end the training."""
        try:
            action(*args)
        except Exception as error:
            self._broken, self._layers, self._latest = True, {}, None
            self._measuring.free()
            self._attempt.warn(f"measuring failed and stops here: {type(error).__name__}: {error}")
        return not self._broken

    def _bring_up_to_date(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._reads(trainer) and not trainer.sanity_checking:
            current = self._latest is not None and self._latest[0] == self._step
            if current or self._measure(self._read, pl_module):
                assert self._latest is not None
                self._output.publish(trainer, self._latest[1], self._diverged)

    def _prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", due: bool) -> None:
        """Before a step: lazy layers have had their first batch by now; a step whose angle is read needs a copy."""
        layers = select_layers(pl_module, self.include, self.exclude)
        self._adopt(layers)
        if due:
            self._layers = layers
            self._requested = self._known.look(trainer, layers)
            if self._copies:
                self._measuring.copy(self._known.unknown(layers))

    def _take_turned(self, trainer: "pl.Trainer") -> None:
        """Take the angles that optimizers know."""
        known = self._known.take(trainer)
        if known is not None:
            self._measuring.take_turned(*known, self._step)

    def _read(self, pl_module: "pl.LightningModule") -> None:
        """Measure every layer as it is now."""
        layers = self._layers or select_layers(pl_module, self.include, self.exclude)
        self._adopt(layers)
        measured = self._measuring.read(layers, self._step)
        for name in measured.started:
            self._take_reference(name, layers[name])
            self.history.facts.setdefault("reference_steps", {})[name] = self._step
        self._diverged = bool(measured.not_finite)
        if measured.not_finite or "not_finite" in self.history.facts:
            self.history.facts["not_finite"] = measured.not_finite
        reading = {quantity: self._filled(layers, values) for quantity, values in measured.values.items()}
        if self._requested:
            reading["requested_angle"] = [self._requested.get(name, math.nan) for name in self.history.layer_names]
        momentum = self.history.facts.get("momentum")
        if momentum is not None and "path_square" in reading:
            reading["straightness"] = straightness(reading["rotation"], reading["path_square"], momentum)
        if measured.dense is not None:
            self.history.facts.update(angle_readings=self._measuring.sums.readings, dense_steps=measured.dense)
        self._latest = (self._step, reading)

    def _filled(self, names: Collection[str], values: Tensor) -> list[float]:
        """Values in the order of the history's layers; NaN for layers that are gone and where undefined."""
        measured = dict(zip(names, values.tolist(), strict=True))
        return [
            value if math.isfinite(value := measured.get(n, math.nan)) else math.nan for n in self.history.layer_names
        ]

    def _record(self, trainer: "pl.Trainer") -> None:
        """Put the last reading into the history and send it to the loggers."""
        assert self._latest is not None
        step, reading = self._latest
        # After an interrupt, or a resume with another accumulation, Lightning may number a step twice.
        self.history.drop_from(step)
        self.history.append(step, **reading)
        self._attempt("noting the learning rate", self._watch_rates, trainer)
        self._ends_with_extra_row = False
        self._output.log(trainer, self.history, step, reading, self._diverged)

    def _finish(self, trainer: "pl.Trainer") -> None:
        training, self._training = self._training, False
        self._layers = {}
        self._measuring.free()
        if training:
            self._output.finish(trainer, self.history)
