"""Contract O33 and O34: every scheduler of torch acts on Layca as on SGD, also after a load or a copy."""

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.cases import angle, layers, take_steps
from torch.optim import lr_scheduler, swa_utils

from pl_layer_rotation import Layca

Optimizer = torch.optim.Optimizer

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.3, 0.1], total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=[0.02, 0.01], anneal_epochs=4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 3, 0.5)], o
    ),
}
BASES: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "AdamW": {"betas": (0.9, 0.99)}}


@pytest.mark.contract("O33")
def test_no_scheduler_of_torch_is_forgotten() -> None:
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} == set(SCHEDULERS)


def groups() -> list[dict[str, Any]]:
    first, second, bias = layers(shapes=[(5, 4), (6, 3), (3,)])
    return [{"params": [first], "lr": 0.1}, {"params": [second, bias], "lr": 0.2, "weight_decay": 0}]


def advance(scheduler: Any) -> None:
    scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


@pytest.mark.contract("O33")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_gives_the_rates_that_it_gives_the_base_alone(name: str, base: str) -> None:
    # Warnings are errors here, so one about the order of steps would show.
    ours = Layca(groups(), base=base, **BASES[base])
    theirs = getattr(torch.optim, base)(groups(), **BASES[base])
    optimizers = (ours, theirs)
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    weight = ours.param_groups[0]["params"][0]
    rates = []
    for step in range(7):
        before = weight.detach().clone()
        rates.append(float(ours.param_groups[0]["lr"]))
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            take_steps(optimizer, step, step + 1)
            advance(scheduler)
        assert angle(before, weight) == pytest.approx(math.atan(rates[-1]), rel=1e-5)
        for key in ("lr", *BASES[base]):
            assert [g[key] for g in ours.param_groups] == [g[key] for g in theirs.param_groups]
    assert len(set(rates)) > 1


class Remembers(torch.optim.SGD):
    """Notes with which options it was asked to step."""

    seen: list[tuple[float, float]] = []  # noqa: RUF012  # of the class, so that no copy takes it along

    def step(self, closure: Any = None) -> None:
        Remembers.seen.extend((group["lr"], group["momentum"]) for group in self.param_groups)
        super().step()


@pytest.mark.contract("O33")
def test_the_momentum_of_one_cycle_reaches_the_base_and_its_rate_does_not() -> None:
    optimizer = Layca(layers(shapes=[(5, 4)]), base=Remembers, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=8)
    Remembers.seen.clear()
    expected = []
    for step in range(6):
        expected.append((1.0, optimizer.param_groups[0]["momentum"]))
        take_steps(optimizer, step, step + 1)
        scheduler.step()
    assert Remembers.seen == expected
    assert len(set(expected)) > 4


@pytest.mark.contract("O34")
@pytest.mark.parametrize("way", ["load", "load with a scheduler there", "deepcopy", "pickle"])
def test_after_a_load_or_a_copy_a_scheduler_still_acts(way: str) -> None:
    optimizer = Layca(layers(shapes=[(5, 4)]), lr=0.1, base="Adam")
    take_steps(optimizer, 0, 2)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    if way.startswith("load"):
        saved = optimizer.state_dict()
        optimizer = Layca(layers(shapes=[(5, 4)]), lr=0.7, base="Adam")
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
        optimizer.load_state_dict(saved)
        if way == "load":
            scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    else:
        optimizer = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    weight = optimizer.param_groups[0]["params"][0]
    for step in range(3):
        before = weight.detach().clone()
        take_steps(optimizer, step, step + 1)
        assert angle(before, weight) == pytest.approx(math.atan(0.1 * 0.5**step), rel=1e-5)
        scheduler.step()
