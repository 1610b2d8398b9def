"""The callback that measures, records, logs and reports layer rotation while Lightning trains."""

import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._lightning import (
    CallbackBase,
    averages_are_in,
    current_rates,
    expected_steps,
    run_facts,
    stepped_batches,
)
from pl_layer_rotation._output import Attempts, Output, Reading
from pl_layer_rotation._reference import check_reference, reference_weights, some_of
from pl_layer_rotation._running_sums import RunningSums, straightness
from pl_layer_rotation._sharding import (
    local_piece,
    local_tensor,
    original_shape,
    shard_count,
    sum_over_processes,
    whole_tensor,
)
from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.layer_selection import select_layers

QUANTITIES = ("rotation", "angular_update", "norm_ratio", "straightness")
# Angles are read in every step of the first tenth of a training, where shocks happen, up to so many steps; afterwards
# so often at least: findings from fewer readings than that were wrong.
_DENSE_SHARE, _MOST_DENSE, _FEWEST_READINGS = 0.1, 1000, 60
# Where a copy of the layers takes more bytes than this, angles are read together with the rest only.
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

    Angles are read in every step of the first tenth of a training (at most 1000), then on the cadence and at least 60
    times in all; each reading takes a second copy of the weights for the length of a step. Where that copy is larger
    than 1 GB, only steps on the cadence are read.

    With more than 1000 layers loggers get the aggregates only. A layer that starts at zero has no direction: it is
    measured from its first non-zero weights, and a warning says so once. Layers that appear during training join with
    the weights at their first reading. Should a measurement fail, a warning says why and reading stops.

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
        reference: what to measure from: ``"init"``, the weights when training starts; or a state dict, or the path of
            one or of a Lightning checkpoint, for instance pretrained weights that are fine-tuned. Its keys are those of
            the module's own state dict; layers that it lacks are measured from the start of training, and a warning
            names them. A resumed training goes on with the reference of its checkpoint.
        save_reference: whether checkpoints carry the weights to measure from (one model's weights in each, which every
            process keeps in host memory where layers are sharded). Without them a resumed run measures from where it
            resumes, and says so.
        report: whether to print the table and write ``layer_rotation.html`` and ``layer_rotation.jsonl`` next to the
            logs when training ends, also by an exception.

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
        every_n_steps: int | None = None,
        log_quantities: list[str] | tuple[str, ...] = ("rotation",),
        save_reference: bool = True,
        report: bool = True,
        reference: str | os.PathLike[str] | Mapping[str, Any] = "init",
    ) -> None:
        super().__init__()
        check_reference(reference)
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise MisconfigurationException(
                f"`every_n_steps` must be an integer of at least 1 or None, got {every_n_steps!r}. "
                "None follows the trainer's `log_every_n_steps`."
            )
        unknown = [quantity for quantity in log_quantities if quantity not in QUANTITIES]
        if unknown or isinstance(log_quantities, str):
            raise MisconfigurationException(
                f"`log_quantities` must be a list out of {', '.join(QUANTITIES)}, got {log_quantities!r}. "
                "Pass for instance `log_quantities=['rotation', 'norm_ratio']`."
            )
        self.include, self.exclude = include, exclude
        self.every_n_steps = every_n_steps
        self.log_quantities = tuple(log_quantities)
        self.reference = reference
        self.save_reference = save_reference
        self.report = report
        self.history = RotationHistory([])
        self._references: dict[str, Tensor] = {}
        self._restored: Mapping[str, Any] | None = None
        self._before: dict[str, Tensor] = {}
        self._sums = RunningSums()
        self._dense_until, self._angle_every = 0, 1
        self._rates: tuple[float, ...] = ()
        self._whole: dict[str, Tensor] = {}  # references of cut layers as checkpoints carry them
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
        try:
            layers = select_layers(pl_module, self.include, self.exclude)
        except MisconfigurationException:
            if not lazy:
                raise
            layers = {}  # a pattern may mean a layer that is yet to be initialized
        same = self._module is not None and self._module() is pl_module
        goes_on = same and self._references and trainer.global_step == self._global_step > 0
        self._module, self._broken, self._step = weakref.ref(pl_module), False, stepped_batches(trainer)
        if self._restored is not None:
            self._resume(self._restored, layers)
        elif not goes_on:
            if trainer.global_step > 0:
                self._attempt.warn("the checkpoint holds no layer rotation: curves start where training resumes")
            self._references, self._whole, self.history = {}, {}, RotationHistory([])
            self._sums, self._rates = RunningSums(self._step), ()
            self._latest, self._ends_with_extra_row = None, False
            if self.reference != "init":
                self._refer(layers)
        self._restored = None
        expected = bool(layers) or lazy
        if not expected:
            self._attempt.warn(
                f"{type(pl_module).__name__} has no layers to measure (no parameter of two or more dimensions)"
            )
        self._adopt(layers)
        # A barebones trainer logs never: nothing is read either.
        self._training = expected and self._cadence(trainer) > 0
        self._global_step = trainer.global_step
        self._attempt("noting the facts", lambda: self.history.facts.update(run_facts(trainer, pl_module)))
        self._attempt("planning the readings", self._plan_angles, trainer, layers)
        self._output.prepare(trainer, self.history)

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Copy the weights before a step whose angle will be read."""
        if not self._reads(trainer):
            return
        step = stepped_batches(trainer) + 1
        due = (self._is_due(trainer, step) or self._angle_is_due(step)) and not self._before
        if due or self._step == 0:
            self._measure(self._prepare, pl_module, due)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read and record on the cadence, after batches that stepped."""
        # global_step grows by the number of optimizers, and not at all while gradients accumulate.
        if not self._training or trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        step = stepped_batches(trainer) + 1
        due, self._step = self._is_due(trainer, step), step
        if due and self._reads(trainer) and self._measure(self._read, pl_module):
            self._record(trainer)
        elif self._before and self._reads(trainer):
            self._measure(self._read_angles, pl_module)

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Bring the aggregates up to date for callbacks that look at them after validation."""
        # Before averaging callbacks put their weights in, which they do at the start of the validation epoch.
        self._bring_up_to_date(trainer, pl_module)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Bring the aggregates up to date; the reading is recorded if training ends here."""
        self._bring_up_to_date(trainer, pl_module)

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
        if not self._references:
            return {}
        history = self.history.state_dict()
        if self._ends_with_extra_row:
            # It is there because that fit ended; a resumed one has its rows on the cadence.
            history["rows"] = history["rows"][:-1]
        # Lightning stores what the first process returns, and gives it to all: never a piece of a layer.
        whole = {name: self._whole.get(name, weight).cpu() for name, weight in self._references.items()}
        return {
            "history": history,
            "reference": whole if self.save_reference else {},
            "sums": self._sums.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: only then is it known where the layers live."""
        self._restored = state_dict or None

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the module's methods on callbacks while it trains; with them a copy would hold the module.
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")} | {
            "_module": None
        }

    def _resume(self, state: Mapping[str, Any], layers: Mapping[str, Tensor]) -> None:
        reference: Mapping[str, Tensor] = state["reference"]
        self.history = RotationHistory.from_state_dict(state["history"])
        self._sums, self._rates = RunningSums.from_state_dict(state["sums"]), ()
        self._latest, self._ends_with_extra_row = None, False
        held = {n: w for n, w in layers.items() if n in reference and reference[n].shape == original_shape(w)}
        self._references = {name: local_piece(reference[name], weight) for name, weight in held.items()}
        self._whole = {name: reference[name] for name, weight in held.items() if shard_count(weight) > 1}
        lost = [name for name in layers if name not in self._references]
        if lost:
            self._attempt.warn(
                f"the checkpoint holds no weights to measure {some_of(lost)} from: they are measured from now on"
            )

    def _refer(self, layers: Mapping[str, Tensor]) -> None:
        """Measure from the weights that were given."""
        given = reference_weights(self.reference, layers)
        self._references = {name: local_piece(whole, layers[name]) for name, whole in given.items()}
        self._whole = {name: whole.cpu() for name, whole in given.items() if shard_count(layers[name]) > 1}
        lacking = [name for name in layers if name not in given]
        if lacking:
            self._attempt.warn(
                f"`reference` has no weights for {some_of(lacking)}: measured from the start of training"
            )

    def _adopt(self, layers: Mapping[str, Tensor]) -> None:
        """Give layers that are new, or have another shape than before, the weights of now to measure from."""
        local = {name: local_tensor(weight) for name, weight in layers.items()}
        new = [n for n, w in local.items() if n not in self._references or self._references[n].shape != w.shape]
        for name in new:
            self._take_reference(name, layers[name])
        shapes = {name: tuple(original_shape(weight)) for name, weight in layers.items()}
        known = dict(zip(self.history.layer_names, self.history.layer_shapes, strict=True))
        gone = {name: shape for name, shape in known.items() if name not in shapes}
        everything = {**shapes, **gone}
        if list(everything.items()) != list(known.items()):
            self.history = self.history.reindex(list(everything), list(everything.values()))
        if new and self._step:
            self.history.facts.setdefault("reference_steps", {}).update(dict.fromkeys(new, self._step))
        whole = [name for name in new if shard_count(layers[name]) == 1]
        zeros = [name for name in whole if not torch.any(self._references[name]).item()]
        if zeros:
            self._attempt.warn(
                f"{some_of(zeros)} start at zero and have no direction: measured from the first non-zero weights"
            )

    def _take_reference(self, name: str, weight: Tensor) -> None:
        # Outside of inference mode also during validation: the copy must live in later steps.
        self._sums.forget(name)
        with torch.inference_mode(False), torch.no_grad():
            self._references[name] = local_tensor(weight).clone()
            if self.save_reference and shard_count(weight) > 1:
                # Here, where all processes are: a checkpoint may be written by one that failed alone.
                self._whole[name] = whole_tensor(self._references[name], weight)

    def _cadence(self, trainer: "pl.Trainer") -> int:
        return int(self.every_n_steps or trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def _is_due(self, trainer: "pl.Trainer", step: int) -> bool:
        return self._passes(step, self._cadence(trainer))

    def _passes(self, step: int, every: int) -> bool:
        # Not "is a multiple": by hand, gradients may accumulate so that no step ever is one.
        return step // every > self._step // every

    def _plan_angles(self, trainer: "pl.Trainer", layers: Mapping[str, Tensor]) -> None:
        """Decide which steps' angles are read besides those on the cadence."""
        self._dense_until, self._angle_every = 0, self._cadence(trainer)
        size = sum(local_tensor(weight).nbytes for weight in layers.values())
        steps = expected_steps(trainer)
        self.history.facts["total_steps"] = steps
        if size > _MOST_COPIED:
            self._attempt.warn("a copy of the layers takes over 1 GB: angles are read on the cadence only")
        elif steps is not None and self._angle_every:
            self._dense_until = min(_MOST_DENSE, int(_DENSE_SHARE * steps))
            self._angle_every = max(1, min(self._angle_every, steps // _FEWEST_READINGS))

    def _angle_is_due(self, step: int) -> bool:
        return step <= self._dense_until or self._passes(step, self._angle_every)

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
            if self._whole:
                raise  # layers are cut: the other processes wait for this one's sums
            self._broken, self._before, self._latest = True, {}, None
            self._attempt.warn(f"measuring failed and stops here: {type(error).__name__}: {error}")
        return not self._broken

    def _bring_up_to_date(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._reads(trainer) and not trainer.sanity_checking:
            current = self._latest is not None and self._latest[0] == self._step
            if current or self._measure(self._read, pl_module):
                assert self._latest is not None
                self._output.publish(trainer, self._latest[1], self._diverged)

    def _prepare(self, pl_module: "pl.LightningModule", copy: bool) -> None:
        """Before a step: lazy layers have had their first batch by now; a step whose angle is read needs a copy."""
        layers = select_layers(pl_module, self.include, self.exclude)
        self._adopt(layers)
        if copy:
            self._before = {name: local_tensor(weight).clone() for name, weight in layers.items()}

    @torch.no_grad()
    def _read(self, pl_module: "pl.LightningModule") -> None:
        """Measure every layer as it is now."""
        layers = select_layers(pl_module, self.include, self.exclude)
        self._adopt(layers)
        names = list(layers)
        weights = [local_tensor(weight) for weight in layers.values()]
        counts = [shard_count(weight) for weight in layers.values()]
        whole = [count == 1 for count in counts]
        sums, scales = geometry.rotation_sums(weights, [self._references[name] for name in names], whole)
        blocks = [sums]
        stepped = [i for i, name in enumerate(names) if name in self._before]
        if stepped:
            # Layers without a copy (they appeared with this step) compare with themselves, and are left out below.
            before = [self._before.get(name, weight) for name, weight in zip(names, weights, strict=True)]
            blocks.append(geometry.rotation_sums(weights, before, whole)[0])
        self._before = {}
        packed = sum_over_processes(torch.cat(blocks, 1), counts, weights[0].device if weights else torch.device("cpu"))
        reading = {
            "rotation": self._filled(names, geometry.cosine_distance(packed[:, :4])),
            "norm_ratio": self._filled(names, geometry.norm_ratio(packed[:, :4], scales)),
        }
        if stepped:
            turned = geometry.angle(geometry.cosine_distance(packed[:, 4:]))
            known = torch.zeros(len(names), dtype=torch.bool)
            known[stepped] = True
            reading["angular_update"] = self._filled(names, turned.where(known, torch.nan))
            self._sums.add([names[i] for i in stepped], turned[stepped], self._step)
        self._diverged = not packed[:, 2].isfinite().all()
        self._start_zero_layers(layers, packed, reading)
        if self._sums.readings:
            reading.update(self._sums.values(self.history.layer_names))
            momentum = self.history.facts.get("momentum")
            if momentum is not None:
                reading["straightness"] = straightness(reading["rotation"], reading["path_square"], momentum)
            self.history.facts.update(angle_readings=self._sums.readings, dense_steps=self._sums.dense)
        self._latest = (self._step, reading)

    @torch.no_grad()
    def _read_angles(self, pl_module: "pl.LightningModule") -> None:
        """Measure only how far the last step turned each layer."""
        layers = {n: w for n, w in select_layers(pl_module, self.include, self.exclude).items() if n in self._before}
        weights = [local_tensor(weight) for weight in layers.values()]
        counts = [shard_count(weight) for weight in layers.values()]
        before, self._before = [self._before[name] for name in layers], {}
        if weights:
            sums, _ = geometry.rotation_sums(weights, before, [count == 1 for count in counts])
            turned = geometry.angle(geometry.cosine_distance(sum_over_processes(sums, counts, weights[0].device)))
            self._sums.add(list(layers), turned, self._step)

    def _filled(self, names: Sequence[str], values: Tensor) -> list[float]:
        """Values in the order of the history's layers; NaN for layers that are gone and where undefined."""
        measured = dict(zip(names, values.tolist(), strict=True))
        return [
            value if math.isfinite(value := measured.get(n, math.nan)) else math.nan for n in self.history.layer_names
        ]

    def _start_zero_layers(self, layers: Mapping[str, Tensor], sums: Tensor, reading: Reading) -> None:
        """A layer that started at zero and moved takes its first non-zero weights for its reference."""
        names = list(layers)
        for i in ((sums[:, 3] == 0) & (sums[:, 2] > 0)).nonzero().flatten().tolist():
            self._take_reference(names[i], layers[names[i]])
            column = self.history.layer_names.index(names[i])
            reading["rotation"][column], reading["norm_ratio"][column] = 0.0, 1.0
            if "angular_update" in reading:
                reading["angular_update"][column] = math.nan
            self.history.facts.setdefault("reference_steps", {})[names[i]] = self._step

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
        self._before = {}
        if training:
            self._output.finish(trainer, self.history)
