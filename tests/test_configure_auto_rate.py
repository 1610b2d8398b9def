"""lr="auto": the rate that layca_optimizers takes from the length of the training and the momentum of the base."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, batches, trainer
from noted_rates import At, rates, rates_of_steps

from pl_layer_rotation import Layca, layca_optimizers


def auto(**options: Any) -> Any:
    return lambda module: layca_optimizers(module, lr="auto", **options)


def rule(steps: int, momentum: float = 0.0) -> float:
    """The rule of the experiments, written out."""
    return (1 / 9) * min(1, (1000 / steps) ** (1 / 3)) / ((1 + momentum) / (1 - momentum)) ** 0.5


@pytest.mark.contract("H6")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 1}, 8),
        ({"max_epochs": 500}, 4000),
        ({"max_epochs": 500, "max_steps": 2000}, 2000),
        ({"max_epochs": -1, "max_steps": 5000}, 5000),
        ({"max_epochs": 1000, "accumulate_grad_batches": 3}, 3000),
        ({"max_epochs": 1000, "limit_train_batches": 2}, 2000),
    ],
    ids=str,
)
def test_the_automatic_rate_counts_the_optimizer_steps_of_the_training(options: Any, steps: int) -> None:
    stop = At(1, lambda run, _: setattr(run, "should_stop", True))
    (first, plain), *_ = rates_of_steps(auto(), stop, **options)
    assert first == pytest.approx(rule(steps), rel=1e-12, abs=0)
    assert plain == 0.1


@pytest.mark.contract("H6")
@pytest.mark.parametrize(
    ("base", "options", "momentum"),
    [
        ("SGD", {}, 0.0),
        ("SGD", {"momentum": 0.8}, 0.8),
        (functools.partial(torch.optim.SGD, momentum=0.9), {}, 0.9),
        ("AdamW", {}, 0.9),
        ("Adam", {"betas": (0.5, 0.9)}, 0.5),
        ("RMSprop", {}, 0.0),
        ("RMSprop", {"momentum": 0.9}, 0.9),
        ("Adagrad", {}, 0.0),
    ],
    ids=lambda value: str(value).partition("(")[0],
)
def test_the_automatic_rate_takes_the_momentum_of_the_base(base: Any, options: Any, momentum: float) -> None:
    ((first, _),) = rates_of_steps(auto(base=base, plain_base="AdamW", **options), max_steps=1)
    assert first == pytest.approx(rule(1, momentum), rel=1e-12, abs=0)


def test_the_automatic_rate_is_what_groups_of_later_get_and_multipliers_multiply() -> None:
    made: list[Layca] = []
    keep = At(1, lambda run, _: made.append(run.optimizers[0]))
    rates_of_steps(auto(layer_multipliers={"head": 0.25}), keep, max_steps=1)
    assert rates(made[0]) == pytest.approx({"rotating/body.0": 1 / 9, "rotating/head": 1 / 36, "plain": 0.1})
    assert made[0].defaults["lr"] == pytest.approx(1 / 9)


@pytest.mark.contract("H6")
def test_a_trial_takes_the_papers_rate() -> None:
    assert rates_of_steps(auto(base="AdamW"), fast_dev_run=True) == [(3**-3, 0.01)]


@pytest.mark.contract("H6")
@pytest.mark.parametrize("schedule", [None, "constant", "cosine"])
def test_a_resumed_training_keeps_the_automatic_rate_of_its_checkpoint(tmp_path: Path, schedule: Any) -> None:
    make, checkpoint = auto(schedule=schedule, plain_lr=0.2), tmp_path / "half.ckpt"
    first = (
        At(4, lambda run, _: run.save_checkpoint(checkpoint)),
        At(5, lambda run, _: setattr(run, "should_stop", True)),
    )
    rates_of_steps(make, *first, max_epochs=200)
    found = rates_of_steps(make, ckpt_path=checkpoint, max_epochs=1000, max_steps=6)
    share = 0.5 * (1 + math.cos(math.pi * 5 / 6)) if schedule == "cosine" else 1.0
    assert found[-1] == pytest.approx((rule(1600) * share, 0.2 * share), rel=1e-6, abs=0)


@pytest.mark.parametrize("part", [torch.nn.Embedding(5, 3), torch.nn.MultiheadAttention(4, 2)], ids=["table", "heads"])
def test_the_automatic_rate_warns_of_transformers(part: torch.nn.Module) -> None:
    def make(module: Net) -> Any:
        module.part = part.requires_grad_(False)
        return layca_optimizers(module, lr="auto")

    with pytest.warns(UserWarning, match="does not hold for transformers: on a small one the best rate was six times"):
        trainer(max_steps=1).fit(Net(make), batches())
