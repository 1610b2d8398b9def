"""Schedules and warm-up of layca_optimizers: the rate of every step, also across a resume."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer
from noted_rates import At, rates, rates_of_steps, recipe
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger

from pl_layer_rotation import layca_optimizers


def rates_by_torch(schedule: Any, steps: int) -> list[float]:
    """The rates of a scheduler of torch over SGD at 0.02."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.02)
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def assert_both_follow(found: list[tuple[float, ...]], expected: list[float]) -> None:
    assert [rate for rate, _ in found] == pytest.approx(expected, rel=1e-6, abs=0)
    assert [plain for _, plain in found] == pytest.approx([10 * rate for rate in expected], rel=1e-6, abs=0)


def test_the_cosine_schedule_falls_to_zero_over_the_trainers_steps() -> None:
    expected = [0.02 * 0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert_both_follow(rates_of_steps(recipe(schedule="cosine"), max_epochs=2), expected)


def test_the_schedule_in_steps_is_the_papers() -> None:
    expected = [0.02] * 80 + [0.02 * 0.2] * 10 + [0.02 * 0.2**2] * 7 + [0.02 * 0.2**3] * 3
    assert_both_follow(rates_of_steps(recipe(schedule="steps"), max_epochs=-1, max_steps=100), expected)


def test_warm_up_rises_as_torchs_and_hands_over_to_the_schedule() -> None:
    def by_hand(optimizer: torch.optim.Optimizer) -> Any:
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 6, total_iters=5)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 11)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [5])

    found = rates_of_steps(recipe(schedule="cosine", warmup_steps=5), max_epochs=2)
    assert_both_follow(found, rates_by_torch(by_hand, 16))


@pytest.mark.parametrize("schedule", [None, "constant", "steps"])
def test_warm_up_starts_above_zero_and_reaches_the_rate(schedule: Any) -> None:
    found = rates_of_steps(recipe(schedule=schedule, warmup_steps=3))
    late = [1.0] * 4 if schedule != "steps" else [1.0, 1.0, 1.0, 0.2]
    assert_both_follow(found, [0.02 * share for share in (1 / 4, 2 / 4, 3 / 4, 1.0, *late)])


def test_warm_up_without_a_schedule_needs_no_trainer_and_no_end() -> None:
    found = layca_optimizers(Net(), lr=0.02, warmup_steps=3)
    assert rates(found["optimizer"]) == pytest.approx({"rotating": 0.005, "plain": 0.025})
    found = rates_of_steps(
        recipe(warmup_steps=7), At(9, lambda run, _: setattr(run, "should_stop", True)), max_epochs=-1
    )
    assert_both_follow(found, [*(0.02 * step / 8 for step in range(1, 9)), 0.02])


def test_schedules_step_once_an_optimizer_step_under_accumulation() -> None:
    found = rates_of_steps(recipe(schedule="cosine", warmup_steps=1), accumulate_grad_batches=3)
    assert_both_follow(found, [0.01, 0.02, 0.01])


def test_a_short_trial_does_not_mind_a_long_warm_up() -> None:
    found = rates_of_steps(recipe(schedule="cosine", warmup_steps=9), fast_dev_run=2)
    assert_both_follow(found, [0.002, 0.004])


@pytest.mark.parametrize("schedule", [None, "cosine", "steps"])
@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_steps": 0}], ids=str)
def test_a_training_of_no_steps_is_no_error(options: Any, schedule: Any) -> None:
    run = trainer(**options)
    run.fit(Net(lambda m: layca_optimizers(m, lr="auto", schedule=schedule, warmup_steps=9)), batches())
    assert run.global_step == 0


@pytest.mark.parametrize("schedule", [None, "cosine", "steps"])
def test_a_warm_up_that_outlasts_the_training_is_an_error(schedule: Any) -> None:
    with pytest.raises(
        MisconfigurationException,
        match="`warmup_steps` must be below the 8 optimizer steps of the training, got 8",
    ):
        rates_of_steps(recipe(schedule=schedule, warmup_steps=8))


@pytest.mark.contract("H17")
@pytest.mark.parametrize("schedule", ["constant", "cosine", "steps"])
@pytest.mark.parametrize("step", [5, 8], ids=["in an epoch", "between epochs"])
def test_a_resumed_schedule_goes_on_with_exactly_the_same_rates(tmp_path: Path, schedule: Any, step: int) -> None:
    make, checkpoint = recipe(schedule=schedule, warmup_steps=11), tmp_path / "half.ckpt"
    save = At(step, lambda run, _: run.save_checkpoint(checkpoint))
    whole = rates_of_steps(make, save, max_epochs=2)
    assert rates_of_steps(make, max_epochs=2, ckpt_path=checkpoint) == whole[step:]


def test_a_training_that_was_made_longer_ends_where_its_schedule_does(tmp_path: Path) -> None:
    run = trainer()
    run.fit(Net(recipe(schedule="cosine")), batches())
    run.save_checkpoint(tmp_path / "done.ckpt")
    found = rates_of_steps(recipe(schedule="cosine"), max_epochs=3, ckpt_path=tmp_path / "done.ckpt")
    # The first rate is the 0 that the checkpoint holds.
    assert found[0] == (0, 0)
    assert_both_follow(found[1:], [0.02 * 0.5 * (1 + math.cos(math.pi * step / 24)) for step in range(9, 24)])


def test_a_schedule_of_ones_own_steps_with_the_optimizer() -> None:
    make = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)  # noqa: E731
    assert_both_follow(rates_of_steps(recipe(schedule=make)), [0.02] * 4 + [0.002] * 4)


@pytest.mark.parametrize("schedule", [None, "cosine", "steps"])
def test_groups_that_are_added_later_follow_the_schedule(schedule: Any) -> None:
    more = {"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 0.5}
    found = rates_of_steps(
        recipe(schedule=schedule, warmup_steps=2),
        At(4, lambda run, _: run.optimizers[0].add_param_group(more)),
        max_epochs=2,
    )
    rotating = [rate for rate, *_ in found]
    added = [added for _, _, added in found[4:]]
    assert added == pytest.approx([0.5 * rate / rotating[4] for rate in rotating[4:]], rel=1e-6, abs=0)


@pytest.mark.contract("H2", "H4")
@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_learning_rate_monitor_logs_both_groups(tmp_path: Path, schedule: Any) -> None:
    run = trainer(LearningRateMonitor(log_momentum=True, log_weight_decay=True), logger=CSVLogger(tmp_path))
    run.fit(Net(recipe(base="AdamW", betas=(0.8, 0.9), schedule=schedule)), batches())
    share = 0.5 * (1 + math.cos(math.pi * 7 / 8)) if schedule else 1.0
    assert {key: value.item() for key, value in run.callback_metrics.items()} == pytest.approx(
        {
            "lr-Layca/rotating": 0.02 * share,
            "lr-Layca/rotating-momentum": 0.8,
            "lr-Layca/rotating-weight_decay": 0.0,
            "lr-Layca/plain": 0.2 * share,
            "lr-Layca/plain-momentum": 0.8,
            "lr-Layca/plain-weight_decay": 0.01,
        }
    )


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.ones(7), torch.ones(3)


@pytest.mark.contract("H6")
@pytest.mark.parametrize("options", [{"lr": "auto"}, {"schedule": "cosine"}, {"schedule": "steps"}], ids=str)
@pytest.mark.parametrize(
    ("run", "data", "steps"),
    [
        ({"max_epochs": -1}, batches(), "inf"),
        ({"max_epochs": 3}, torch.utils.data.DataLoader(Endless(), batch_size=4), "-1"),
    ],
    ids=["without end", "data without length"],
)
def test_a_training_of_unknown_length_is_an_error(options: Any, run: Any, data: Any, steps: str) -> None:
    name, value = next(iter(options.items()))
    text = (
        f"`{name}={value!r}` must know how long the training is, got {steps} steps from the trainer. "
        "Set `Trainer(max_steps=...)`, or `max_epochs` with data that has a length. "
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        trainer(**run).fit(Net(lambda m: layca_optimizers(m, **options)), data)
