"""The callback that measures, records, logs and reports layer rotation while Lightning trains."""

import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from pl_layer_rotation._arguments import check_choices, check_every_n_steps, checked_log_quantities
from pl_layer_rotation._cadence import Cadence, planned
from pl_layer_rotation._lightning import CallbackBase, averages_are_in, expected_steps, stepped_batches
from pl_layer_rotation._output import Attempts, Output
from pl_layer_rotation._recording import Recording
from pl_layer_rotation._reference import References, check_dtype, check_reference
from pl_layer_rotation._running_sums import RunningSums
from pl_layer_rotation._sharding import local_tensor
from pl_layer_rotation._start_of_training import note_facts, refer, resumed, write_sidecar
from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.layer_selection import UnreadableLayersError, as_patterns, select_layers

# Bytes of a second copy of the layers that `angular_update="auto"` takes.
_MOST_COPIED = 1 << 30


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
    ``lightning.pytorch`` wants that package imported before this class. Aggregates of the angular update exist from the
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
        check_choices(
            reference_device=reference_device,
            save_reference=save_reference,
            report=report,
            angular_update=angular_update,
        )
        check_every_n_steps(every_n_steps)
        self.include, self.exclude = as_patterns("include", include), as_patterns("exclude", exclude)
        self.every_n_steps = every_n_steps
        self.log_quantities = checked_log_quantities(log_quantities)
        self.reference = reference
        self.reference_device, self.reference_dtype = reference_device, check_dtype(reference_dtype)
        self.save_reference = save_reference
        self.angular_update = angular_update
        self.report = report
        self._restored: Mapping[str, Any] | None = None
        self._layers: dict[str, Tensor] = {}  # during a step that is read, as they were found before it
        self._cadence, self._copies = Cadence(0), True
        self._training = False
        self._broken = False  # a measurement failed: nothing is read any more in this fit
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._global_step = 0
        self._step = 0
        self._attempt = Attempts()
        self._recording = Recording(References(), self._attempt)
        self._output = Output(self.log_quantities, report, self._attempt)

    @property
    def history(self) -> RotationHistory:
        """The curves until now; with them come figures, findings and files."""
        return self._recording.history

    @property
    def state_key(self) -> str:
        """Tells monitors of other layers apart in a checkpoint; a resumed run may read or log otherwise."""
        return self._generate_state_key(include=self.include, exclude=self.exclude)

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
            self._recording = Recording(self._references(), self._attempt)
            return
        except MisconfigurationException:
            if not lazy:
                raise
            layers = {}  # a pattern may mean a layer that is yet to be initialized
        same = self._module is not None and self._module() is pl_module
        goes_on = same and self._recording.references.pieces and trainer.global_step == self._global_step > 0
        self._module, self._broken, self._step = weakref.ref(pl_module), False, stepped_batches(trainer)
        if self._restored is not None:
            # The weights of an earlier fit are let go before those of the checkpoint are made.
            self._recording = Recording(self._references(), self._attempt)
            self._recording = resumed(trainer, self._restored, self._references(), layers, self._attempt)
        elif not goes_on:
            if trainer.global_step > 0:
                self._attempt.warn("the checkpoint holds no layer rotation: curves start where training resumes")
            self._recording = Recording(self._references(), self._attempt, sums=RunningSums(self._step))
            self._recording.references.plan(layers)
            if self.reference != "init":
                refer(self._recording, self.reference, layers)
        self._restored = None
        expected = bool(layers) or lazy
        if not expected:
            self._attempt.warn(
                f"{type(pl_module).__name__} has no layers to measure: none of its parameters is selected (two or more "
                "dimensions, no normalization, no embedding)"
            )
        self._recording.adopt(layers, self._step, first=True)
        references = self._recording.references
        if references.sidecar is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._attempt("writing the weights to measure from", write_sidecar, trainer, references, layers)
        # A barebones trainer logs never: nothing is read either.
        self._cadence = Cadence(int(self.every_n_steps or trainer.log_every_n_steps))  # type: ignore[attr-defined]
        self._training = expected and self._cadence.every > 0
        self._global_step = trainer.global_step
        self._attempt("noting the facts", note_facts, trainer, pl_module, self._recording, self.reference, layers)
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
        measuring = self._recording.measuring
        if self._reads(trainer) and self._measure(self._recording.take_turned, trainer, step):
            if due and self._measure(self._read, pl_module):
                self._record(trainer)
            elif measuring.waits:
                self._measure(measuring.read_angles, self._layers, step)
            if step >= self._cadence.dense_until:
                measuring.free()
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
        latest = self._recording.latest
        if self._training and latest is not None and latest[0] not in (0, *self.history.steps[-1:]):
            self._record(trainer, extra=True)
        self._finish(trainer)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Report what was recorded until then. No collective: this process may be alone."""
        self._finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The curves and, unless ``save_reference=False``, the weights to measure from, by layer name."""
        return self._recording.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: only then is it known where the layers live."""
        self._restored = state_dict or None

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the module's methods on callbacks while it trains; with them a copy would hold the module.
        kept = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        return kept | {"_module": None, "_layers": {}}

    def _references(self) -> References:
        return References(self.reference_device, self.reference_dtype, self.save_reference)

    def _plan_angles(self, trainer: "pl.Trainer", layers: Mapping[str, Tensor]) -> None:
        """Decide which steps' angles are read besides those on the cadence."""
        steps = expected_steps(trainer)
        self.history.facts["total_steps"] = steps
        size = sum(local_tensor(layer).nbytes for layer in self._recording.unknown(trainer, layers).values())
        small = trainer.strategy.reduce_boolean_decision(size <= _MOST_COPIED)
        if self.angular_update == "auto" and not small:
            self._attempt.warn(
                "a copy of the layers takes over 1 GB: angles are read only of layers that Layca turns. "
                "Pass `angular_update=True` to take that copy"
            )
        self._copies = small if self.angular_update == "auto" else bool(self.angular_update)
        self._cadence = planned(self._cadence.every, steps, self._copies)

    def _reads(self, trainer: "pl.Trainer") -> bool:
        return self._training and not self._broken and not averages_are_in(trainer)

    def _measure(self, action: Callable[..., None], *args: Any) -> bool:
        """Do it; where it fails, warn and read no more, rather than end the training."""
        try:
            action(*args)
        except Exception as error:
            self._broken, self._layers, self._recording.latest = True, {}, None
            self._recording.measuring.free()
            self._attempt.warn(f"measuring failed and stops here: {type(error).__name__}: {error}")
        return not self._broken

    def _bring_up_to_date(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._reads(trainer) and not trainer.sanity_checking:
            latest = self._recording.latest
            if (latest is not None and latest[0] == self._step) or self._measure(self._read, pl_module):
                assert self._recording.latest is not None
                self._output.publish(trainer, self._recording.latest[1], self._recording.diverged)

    def _prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", due: bool) -> None:
        """Before a step: lazy layers have had their first batch by now; a step whose angle is read needs a copy."""
        layers = select_layers(pl_module, self.include, self.exclude)
        self._recording.adopt(layers, self._step)
        if due:
            self._layers = layers
            self._recording.before_step(trainer, layers, self._copies)

    def _read(self, pl_module: "pl.LightningModule") -> None:
        layers = self._layers or select_layers(pl_module, self.include, self.exclude)
        self._recording.read(layers, self._step)

    def _record(self, trainer: "pl.Trainer", *, extra: bool = False) -> None:
        """Put the last reading into the history and send it to the loggers."""
        step, reading = self._recording.record(trainer, extra=extra)
        self._output.log(trainer, self.history, step, reading, self._recording.diverged)

    def _finish(self, trainer: "pl.Trainer") -> None:
        training, self._training = self._training, False
        self._layers = {}
        self._recording.measuring.free()
        if training:
            self._output.finish(trainer, self.history)
