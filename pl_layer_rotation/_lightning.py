"""What the monitor asks of Lightning beyond its documented hooks, in one place."""

import itertools
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from pl_layer_rotation._scratch import rotates
from pl_layer_rotation._turning import is_exact
from pl_layer_rotation.layca import Layca
from pl_layer_rotation.layer_selection import select_layers

if TYPE_CHECKING:
    CallbackBase = pl.Callback
else:
    # `lightning.pytorch` has a Callback class of its own, which its older Trainers and its CLI insist on.
    _other = sys.modules.get("lightning.pytorch")
    CallbackBase = pl.Callback if _other is None else type("CallbackBase", (_other.Callback, pl.Callback), {})


def stepped_batches(trainer: "pl.Trainer") -> int:
    """Batches after which optimizers stepped: the step that Lightning logs at. It has no public name."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def averages_are_in(trainer: "pl.Trainer") -> bool:
    """Whether Lightning's SWA has put averaged weights in, for its last epoch that only updates BatchNorm."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    averaging = [c for c in callbacks if any(k.__name__ == "StochasticWeightAveraging" for k in type(c).__mro__)]
    return any(trainer.current_epoch > callback.swa_end for callback in averaging)


def run_facts(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> dict[str, Any]:
    """What a reader of the curves wants to know of the run."""
    # FSDP2 gives a module a class of its own, in front of the user's.
    kinds = type(pl_module).__bases__ if isinstance(pl_module, FSDPModule) else (type(pl_module),)
    facts: dict[str, Any] = {"module": kinds[-1].__name__}
    # Where a module returns no optimizer, Lightning puts one without groups there.
    if trainer.optimizers and trainer.optimizers[0].param_groups:
        optimizer = _unwrapped(trainer.optimizers[0])
        name = type(optimizer).__name__
        facts["optimizer"] = f"{name}({optimizer.base_class.__name__})" if isinstance(optimizer, Layca) else name
        group = optimizer.param_groups[0]
        # With a warm-up the rate of the first step says little.
        known = [float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group]
        facts.update({"learning_rate": max(known)} if known else {})
        # The base of Layca keeps its options in the same places.
        facts["base"] = optimizer.base_class.__name__ if isinstance(optimizer, Layca) else name
        momentum = group.get("momentum", (group.get("betas") or (None,))[0])
        facts["momentum"] = None if momentum is None else float(momentum)
        facts["weight_decay"] = float(group.get("weight_decay") or 0.0)
        rates = {float(g["lr"]) for g in optimizer.param_groups if g.get("rotate")}
        facts["layer_multipliers"] = len(rates) > 1
    return {
        **facts,
        "followed_by_norm": _followed_by_norm(pl_module),
        "strategy": type(trainer.strategy).__name__,
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
    }


def _followed_by_norm(module: nn.Module) -> list[str]:
    """Layers right before a BatchNorm in the order of registration, which most networks run in."""
    # Not `any`, which asks a compiled module for its length: it has none.
    leaves = [part for part in module.modules() if next(part.children(), None) is None]
    names = {id(weight): name for name, weight in select_layers(module).items()}
    return [
        names[id(weight)]
        for part, after in itertools.pairwise(leaves)
        if isinstance(after, _BatchNorm) and isinstance(weight := getattr(part, "weight", None), Tensor)
        if id(weight) in names
    ]


def final_facts(trainer: "pl.Trainer", ours: list[str]) -> dict[str, Any]:
    """How the training ended, by the metrics that the user logged."""
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key not in ours}
    return {"epochs": trainer.current_epoch, "metrics": metrics}


def expected_steps(trainer: "pl.Trainer") -> int | None:
    """Optimizer steps of the whole training, or None where the trainer does not know."""
    steps = float(trainer.estimated_stepping_batches)
    return int(steps) if 1 <= steps < math.inf else None


def current_rates(trainer: "pl.Trainer") -> tuple[float, ...]:
    """Learning rates of all param groups that have one."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return tuple(float(group["lr"]) for group in groups if "lr" in group)


def layca_optimizers_of(trainer: "pl.Trainer") -> list[Layca]:
    """The trainer's optimizers that know the angles of their steps."""
    optimizers = map(_unwrapped, trainer.optimizers)
    return [optimizer for optimizer in optimizers if isinstance(optimizer, Layca)]


def requested_angles(trainer: "pl.Trainer") -> tuple[dict[int, float], set[int]]:
    """Angles (radians) that Layca's rates ask for, by identity of the tensor, and which it turns by exactly them."""
    angles: dict[int, float] = {}
    exact: set[int] = set()
    for optimizer in layca_optimizers_of(trainer):
        for group in optimizer.param_groups:
            turning = [
                parameter for parameter in group["params"] if not is_lazy(parameter) and rotates(parameter, group)
            ]
            angles.update(dict.fromkeys(map(id, turning), math.atan(group["lr"])))
            exact.update(id(parameter) for parameter in turning if is_exact(parameter, group))
    return angles, exact


def nearby(checkpoint: Any) -> list[Path]:
    """Folders around a checkpoint: where logs are beside it, in the ways that Lightning lays them out."""
    return list(Path(os.path.abspath(checkpoint)).parents[:3]) if checkpoint else []


def _unwrapped(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def log_folder(trainer: "pl.Trainer") -> Path:
    """Where the trainer's first logger writes, by the rule that Lightning's ModelCheckpoint follows."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(os.fspath(logger.save_dir or trainer.default_root_dir), str(logger.name), version)


def wandb_loggers(trainer: "pl.Trainer") -> list[Any]:
    """By class name: importing wandb to ask would cost seconds, and there are two namespaces."""
    if not trainer.is_global_zero:
        return []
    return [log for log in trainer.loggers if any(kind.__name__ == "WandbLogger" for kind in type(log).__mro__)]
