"""What a LightningModule returns from ``configure_optimizers`` to control layer rotation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from pl_layer_rotation._base_optimizer import BaseOptimizer
from pl_layer_rotation.layca import Layca
from pl_layer_rotation.param_groups import layca_param_groups

# What did best for biases, normalizations and embeddings on clean tasks: Adam 0.01 against 0.003, SGD with momentum 0.1
# against 0.03.
_PLAIN_LR_SGD = 0.1
_PLAIN_LR_ADAPTIVE = 0.01


def layca_optimizers(
    module: nn.Module,
    lr: float = 3**-3,
    base: BaseOptimizer = torch.optim.SGD,
    plain_lr: float | None = None,
    schedule: Literal["constant", "cosine"] | Callable[[Optimizer], LRScheduler] | None = None,
    layer_multipliers: float | Mapping[str, float] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    **base_options: Any,
) -> dict[str, Any]:
    """Layca over the layers of a module and the base's plain steps for all the rest, as Lightning takes it.

    Return it from ``configure_optimizers``. The optimizer has two named groups, ``rotating`` and ``plain`` (see
    :func:`~pl_layer_rotation.layca_param_groups`), so that ``LearningRateMonitor`` logs ``lr-Layca/rotating`` and
    ``lr-Layca/plain``. Every trainable parameter is in one of them, also what ``include`` does not match: for several
    optimizers (a GAN) pass their submodules, ``layca_optimizers(self.generator)``.

    Args:
        module: the LightningModule (or any module, without a schedule that needs the trainer).
        lr: rotation rate: each layer turns by ``atan(lr)`` in a step.
        base: optimizer that gives the direction, see :class:`~pl_layer_rotation.Layca`.
        plain_lr: learning rate of everything that does not rotate; None is 0.1 over SGD and 0.01 over all other bases,
            the values that did best on the tasks that they were tried on.
        schedule: ``"cosine"`` falls to 0 over the trainer's steps, a function makes any scheduler of torch from the
            optimizer (for ``ReduceLROnPlateau`` add a ``"monitor"`` to the result); both step once an optimizer step
            and act on both groups. ``"constant"`` or None: no scheduler.
        layer_multipliers: the paper's alpha, or a factor by layer.
        include: patterns of layers that rotate.
        exclude: patterns of layers that take plain steps. Leaving the output layer out lets the logits grow: better by
            up to a point on clean data, worse by up to four points with a fifth of the labels wrong.
        **base_options: options of the base, such as ``momentum=0.9``.

    Returns:
        ``{"optimizer": …}``, with ``"lr_scheduler"`` where there is a schedule.

    Raises:
        MisconfigurationException: If no layer is left to rotate, a pattern matches nothing, or the schedule is unknown
            or does not know its length.
        ValueError: If a rate is negative or not finite, or weight decay is asked for.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = layca_optimizers(net, lr=0.02, base=torch.optim.AdamW)["optimizer"]
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('rotating', 0.02), ('plain', 0.01)]

    """
    if schedule not in (None, "constant", "cosine") and not callable(schedule):
        raise MisconfigurationException(
            f"`schedule` must be 'constant', 'cosine' or a function from an optimizer to a scheduler, got {schedule!r}."
            " Pass for instance `lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, ...)`."
        )
    if plain_lr is not None and not 0 <= plain_lr < math.inf:
        raise ValueError(
            f"`plain_lr` must be a finite number of at least 0, got {plain_lr!r}. Leave it out for a default."
        )
    groups = layca_param_groups(module, lr, plain_lr, layer_multipliers, include, exclude)
    optimizer = Layca(groups, lr=lr, base=base, **base_options)
    if plain_lr is None and not optimizer.param_groups[-1]["rotate"]:
        # Known only now: the base may be a function, as LightningCLI passes it.
        is_sgd = issubclass(optimizer.base_class, torch.optim.SGD)
        optimizer.param_groups[-1]["lr"] = _PLAIN_LR_SGD if is_sgd else _PLAIN_LR_ADAPTIVE
    if schedule in (None, "constant"):
        return {"optimizer": optimizer}
    scheduler = schedule(optimizer) if callable(schedule) else CosineAnnealingLR(optimizer, _trainer_steps(module))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _trainer_steps(module: nn.Module) -> int:
    """Optimizer steps of the whole training, from the trainer that runs the module."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        raise MisconfigurationException(
            "`schedule='cosine'` must know how long the training is, got a module without a trainer. "
            "Pass a function that makes the scheduler: `lambda optimizer: CosineAnnealingLR(optimizer, steps)`."
        )
    steps = float(trainer.estimated_stepping_batches)
    if not 1 <= steps < math.inf:
        raise MisconfigurationException(
            f"`schedule='cosine'` must know how long the training is, got {steps} steps from the trainer. "
            "Set `Trainer(max_steps=...)`, or `max_epochs` with data that has a length."
        )
    return int(steps)
