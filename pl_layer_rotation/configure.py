"""What a LightningModule returns from ``configure_optimizers`` to control layer rotation."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pl_layer_rotation._base_optimizer import BaseOptimizer, UnknownOptionError
from pl_layer_rotation._numbers import is_count
from pl_layer_rotation._options import check_rate
from pl_layer_rotation._schedules import SCHEDULES, make_schedule, training_steps
from pl_layer_rotation.layca import Layca
from pl_layer_rotation.layer_selection import select_layers
from pl_layer_rotation.learning_rate import rotation_lr
from pl_layer_rotation.param_groups import layca_param_groups

# What did best for biases, normalizations and embeddings on clean tasks: Adam 0.01 against 0.003, SGD with momentum 0.1
# against 0.03.
_PLAIN_LR_SGD = 0.1
_PLAIN_LR_ADAPTIVE = 0.01
# What a transformer has, or another network with a table of tokens.
_TRANSFORMER_PARTS = (nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)

# Options of Layca that would pass for some of the base, and what to do instead.
_NOT_OF_A_BASE = {
    "params": "The parameters are those of `module`.",
    "rotate": "What takes plain steps is named by `exclude`; a module without Layca needs a torch optimizer.",
}


def layca_optimizers(
    module: nn.Module,
    lr: float | Literal["auto"] = 3**-3,
    base: BaseOptimizer = torch.optim.SGD,
    *,
    plain_base: BaseOptimizer | None = None,
    plain_lr: float | None = None,
    schedule: Literal["constant", "cosine", "steps"] | Callable[[Optimizer], LRScheduler] | None = None,
    layer_multipliers: float | Mapping[str, float] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    warmup_steps: int = 0,
    leading_dims: int | Mapping[str, int] = 0,
    tangential: bool = True,
    **base_options: Any,
) -> dict[str, Any]:
    """Layca over the layers of a module and plain steps for all the rest, in the form that Lightning takes.

    Return it from ``configure_optimizers``. The optimizer has two named groups, ``rotating`` and ``plain`` (see
    :func:`~pl_layer_rotation.layca_param_groups`), so that ``LearningRateMonitor`` logs ``lr-Layca/rotating`` and
    ``lr-Layca/plain``. Every parameter that is trainable now is in one of them, also what ``include`` does not match:
    for several optimizers (a GAN) pass their submodules, ``[layca_optimizers(self.generator), …]``.

    For LightningCLI make its arguments hyperparameters of the module: ``base: OptimizerCallable`` (with ``init_args``
    of its own in the YAML), the others as plain numbers, strings and mappings.

    **What rotates** was measured on four small tasks, mostly with one seed. Embeddings are plain: rotating them cost a
    character GPT 0.13 nats. Output layers rotate, which caps the logits; ``exclude`` lets them grow. On clean data that
    was better (MNIST 97.0 against 96.0 %, CIFAR-10 59.7 against 58.7 %), with a fifth of the labels wrong it was worse
    (digits 93.5 against 96.1 %), on the GPT it made no difference. Weight decay has no place in rotating groups, their
    norms are fixed: asking for it is an error, a base's default is dropped; ``plain_base`` keeps its own.

    **Callbacks that know one rate** set it in both groups, which this recipe does not mean. ``Tuner.lr_find`` does so
    while it searches, so that its suggestion holds for a plain rate that equals it, and afterwards sets ``self.lr``
    alone; ``LearningRateFinder`` leaves its suggestion in both groups. ``StochasticWeightAveraging(swa_lrs=x)`` sets
    both for good: give it a rate by group, ``swa_lrs=[x, y]``. So does ``OneCycleLR``: ``max_lr=[x, y]``.

    Args:
        module: the LightningModule (or any module, where nothing needs to ask the trainer).
        lr: rotation rate: each layer turns by ``atan(lr)`` in a step. The default, 3⁻³ or 2.12°, was better over SGD
            than 3⁻⁴ and 3⁻⁵ in all five tasks of arXiv 1806.01603, which took 3⁻⁵ over Adam. ``"auto"`` is
            :func:`~pl_layer_rotation.rotation_lr` of the trainer's optimizer steps and the base's momentum (or first
            beta), with that function's limits: it was tuned on small MLPs and convolutional networks, and is several
            times too high for transformers. A resumed training keeps the rate of its checkpoint, ``fast_dev_run`` takes
            3⁻³, and a training whose length the trainer does not know is an error.
        base: optimizer that gives the direction, see :class:`~pl_layer_rotation.Layca`.
        plain_base: optimizer of everything that does not rotate, as a class, a name, or a function from parameters to
            an optimizer where it has options; None is the base. ``base="Muon", plain_base="AdamW", tangential=False``
            is MuonH.
        plain_lr: learning rate of everything that does not rotate. None is 0.1 where SGD steps it and 0.01 elsewhere,
            which did better than 0.03 and 0.003 on clean data by 0.2 to 0.8 points. A rate within ``base`` or
            ``plain_base`` has no effect.
        schedule: ``"constant"`` or None; ``"cosine"``, which falls to 0 over the trainer's steps (the numbers here were
            measured with it); ``"steps"``, the schedule of the paper's first task: times 0.2 after 80, 90 and 97 % of
            the steps (its other tasks drop once or three times, first after 40 to 88 %); or a function that makes any
            scheduler of torch from the optimizer. All step with the optimizer and act on all groups; for
            ``ReduceLROnPlateau`` update the result's ``"lr_scheduler"`` with a ``"monitor"`` and
            ``"interval": "epoch"``. With ``GradientAccumulationScheduler`` the trainer counts every batch as a step, so
            that a training ends before its schedule: pass a function then.
        layer_multipliers: the paper's alpha, or a factor by layer.
        include: patterns of layers that rotate.
        exclude: patterns of layers that take plain steps.
        warmup_steps: rise linearly over this many optimizer steps, from 1/(n+1) of the rates. The cosine falls over the
            steps that remain. A function builds it into its own schedule.
        leading_dims: leading dimensions that count separate layers (experts, fused projections), one number or numbers
            by pattern, see :func:`~pl_layer_rotation.layca_param_groups`.
        tangential: False leaves out the projection (the Hyperball update). No difference could be detected: 60.1
            against 59.7 % on CIFAR-10, 95.95 against 96.01 % on MNIST, 2.200 nats each on the GPT.
        **base_options: options of the base, such as ``momentum=0.9``.

    Returns:
        ``{"optimizer": …}``, with ``"lr_scheduler"`` where there is a schedule or a warm-up.

    Raises:
        MisconfigurationException: If no layer is left to rotate, a pattern matches nothing, a base refuses the shape of
            a tensor, or a rate or schedule is unknown, or needs a length of the training that is not known.
        ValueError: If a rate is negative or not finite, or weight decay is asked for.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = layca_optimizers(net, lr=0.02, base="AdamW")["optimizer"]
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('rotating', 0.02), ('plain', 0.01)]

    """
    _check(lr, plain_lr, schedule, warmup_steps)
    for option in base_options.keys() & _NOT_OF_A_BASE.keys():
        raise TypeError(f"`{option}` must be left out, got {base_options[option]!r}. {_NOT_OF_A_BASE[option]}")
    # The rate of "auto" is known only once the base has said its momentum.
    given = 1.0 if isinstance(lr, str) else lr
    groups = layca_param_groups(
        module,
        given,
        plain_lr=plain_lr,
        layer_multipliers=layer_multipliers,
        include=include,
        exclude=exclude,
        leading_dims=leading_dims,
    )

    def make(params: Any) -> Layca:
        return Layca(params, given, base, plain_base=plain_base, tangential=tangential, **base_options)

    try:
        optimizer = make(groups)
    except UnknownOptionError as error:
        own = inspect.signature(layca_optimizers).parameters
        near = difflib.get_close_matches(error.option, own, n=1)
        raise TypeError(f"{error} Did you mean {near[0]!r}?") if near else error from None
    except ValueError:
        named = {**dict(module.named_parameters()), **select_layers(module, include, exclude)}
        _raise_if_shapes_are_refused(make, groups, {id(tensor): name for name, tensor in named.items()})
        raise
    if isinstance(lr, str):
        rate = _auto_lr(module, optimizer.param_groups[0])
        optimizer.defaults["lr"] = rate
        for group in optimizer.param_groups:
            if group["rotate"]:
                group["lr"] *= rate
    if plain_lr is None and not optimizer.param_groups[-1]["rotate"]:
        is_sgd = issubclass(optimizer.plain_base_class, torch.optim.SGD)
        optimizer.param_groups[-1]["lr"] = _PLAIN_LR_SGD if is_sgd else _PLAIN_LR_ADAPTIVE
    if callable(schedule):
        scheduler = schedule(optimizer)
        if not callable(getattr(scheduler, "step", None)):
            raise MisconfigurationException(
                f"`schedule` must make a scheduler from the optimizer, got {scheduler!r} from {schedule!r}. Return it."
            )
    elif schedule in (None, "constant") and not warmup_steps:
        return {"optimizer": optimizer}
    else:
        scheduler = make_schedule(optimizer, module, schedule or "constant", warmup_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _check(lr: Any, plain_lr: Any, schedule: Any, warmup_steps: Any) -> None:
    if isinstance(lr, str) and lr != "auto":
        raise MisconfigurationException(f"`lr` must be a number or 'auto', got {lr!r}. Pass for instance `3**-3`.")
    if plain_lr is not None:
        check_rate("plain_lr", plain_lr)
    if schedule is not None and schedule not in SCHEDULES and not callable(schedule):
        raise MisconfigurationException(
            f"`schedule` must be {', '.join(map(repr, SCHEDULES))} or a function from an optimizer to a scheduler, got "
            f"{schedule!r}. Pass for instance `lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, ...)`."
        )
    if not is_count(warmup_steps):
        raise MisconfigurationException(
            f"`warmup_steps` must be a whole number of at least 0, got {warmup_steps!r}. It counts optimizer steps."
        )
    if warmup_steps and callable(schedule):
        raise MisconfigurationException(
            f"`warmup_steps` must be 0 where `schedule` is a function, got {warmup_steps}. "
            "Build the warm-up into that scheduler, for instance with `SequentialLR`."
        )


def _auto_lr(module: nn.Module, group: Mapping[str, Any]) -> float:
    """The rate for the trainer's steps and the momentum that the base has in a group."""
    if any(isinstance(part, _TRANSFORMER_PARTS) for part in module.modules()):
        rank_zero_warn(
            "`lr='auto'` does not hold for transformers: on a small one the best rate was six times lower. Try "
            "`lr=3**-5` with an Adam base.",
            category=UserWarning,
        )
    trainer = getattr(module, "_trainer", None)
    if trainer is not None and trainer.fast_dev_run:
        return 3**-3
    steps = training_steps(module, "`lr='auto'`", "Or pass a number, such as `lr=rotation_lr(steps)`.")
    momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
    return rotation_lr(max(1, steps), float(momentum))


def _raise_if_shapes_are_refused(
    make: Callable[[Any], Layca], groups: list[dict[str, Any]], names: Mapping[int, str]
) -> None:
    """Say which tensors a base refuses though it takes a matrix, and what to do: Muon takes nothing else."""

    def is_refused(tensor: Tensor, rotate: bool) -> bool:
        try:
            make([{"params": [tensor], "rotate": rotate}])
        except ValueError:
            return True
        return False

    bases = make([nn.Parameter(torch.ones(2, 2))])  # raises once more where shapes are not the reason
    for rotate in (True, False):
        tensors = [tensor for group in groups if group["rotate"] is rotate for tensor in group["params"]]
        refused = [names[id(tensor)] for tensor in tensors if is_refused(tensor, rotate)]
        if refused and rotate:
            raise MisconfigurationException(
                f"`base` must take the shape of every rotating layer, got {bases.base_class.__name__}, which refuses "
                f"{', '.join(refused)}. Let these take the steps of a `plain_base` with `exclude={refused}`."
            )
        if refused:
            raise MisconfigurationException(
                f"`plain_base` must take every shape, got {bases.plain_base_class.__name__}, which refuses "
                f"{', '.join(refused)}. Pass for instance `plain_base='AdamW'`."
            )
