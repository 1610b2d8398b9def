"""How long a shortened training is, and the rate of each of its steps."""

import dataclasses

import pytest
from errors import InputError
from plans import make_plan, rate_factor
from studies import STUDIES, Setting, settings_of
from tasks import PAPER_TASKS, TASKS, Schedule

CIFAR = 50_000, 10_000


def first_setting(study: str, task: str) -> Setting:
    return settings_of(study, task)[0]


def test_the_paper_s_length_holds_out_a_tenth() -> None:
    plan = make_plan(TASKS["C10-CNN1"], first_setting("layca-rates", "C10-CNN1"), *CIFAR, scale=1.0)
    assert (plan.epochs, plan.train_images, plan.validation_images, plan.test_images) == (100, 45_000, 5_000, 10_000)
    assert (plan.batch_size, plan.steps_per_epoch, plan.steps) == (128, 352, 35_200)
    assert plan.norm_momentum == 0.01


def test_a_fiftieth_of_the_work_is_a_seventh_of_epochs_and_of_images() -> None:
    plan = make_plan(TASKS["C10-CNN1"], first_setting("layca-rates", "C10-CNN1"), *CIFAR, scale=0.02)
    # 45,000·√0.02 = 6,364, of which 49 whole batches are left
    assert (plan.epochs, plan.train_images, plan.validation_images, plan.test_images) == (14, 6_272, 707, 1_414)
    assert (plan.batch_size, plan.steps_per_epoch) == (128, 49)


def test_the_batch_shrinks_where_an_epoch_would_have_fewer_than_20_steps() -> None:
    plan = make_plan(TASKS["C10-CNN1"], first_setting("layca-rates", "C10-CNN1"), *CIFAR, scale=1e-4)
    # 450 images
    assert (plan.epochs, plan.train_images, plan.batch_size, plan.steps_per_epoch) == (1, 440, 22, 20)
    assert plan.norm_momentum == 0.1


def test_mnist_learns_1000_images_of_each_digit_and_holds_none_out() -> None:
    plan = make_plan(TASKS["MNIST"], first_setting("mnist", "MNIST"), 60_000, 10_000, scale=1.0)
    assert (plan.train_images, plan.validation_images, plan.steps_per_epoch, plan.norm_momentum) == (10_000, 0, 5, 0.01)


@pytest.mark.parametrize("scale", [0.0, 1.5, float("nan")])
def test_a_scale_is_a_share(scale: float) -> None:
    with pytest.raises(InputError, match=r"`--scale` must be above 0 and at most 1, got .* 1 is the paper's length"):
        make_plan(TASKS["MNIST"], first_setting("mnist", "MNIST"), 60_000, 10_000, scale)


def test_the_rate_falls_when_the_paper_s_does() -> None:
    setting = first_setting("layca-rates", "C10-CNN1")
    by_epoch = [rate_factor(setting, 352 * epoch, 35_200) for epoch in (0, 79, 80, 89, 90, 96, 97, 99)]
    assert by_epoch == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008])
    assert rate_factor(setting, 352 * 80 - 1, 35_200) == 1.0
    # A training of 14 epochs of 49 steps falls after 80 % of its steps, within an epoch.
    assert [rate_factor(setting, step, 686) for step in (548, 549)] == pytest.approx([1, 0.2])


def test_warmup_rises_from_a_tenth_over_its_epochs() -> None:
    settings = {setting.name: setting for setting in settings_of("warmup", "C10-resnet110")}
    factors = [rate_factor(settings["SGD+L2_warmup_10"], step, 2000) for step in (0, 50, 100, 599, 600)]
    assert factors == pytest.approx([0.1, 0.55, 1.0, 1.0, 0.2])
    assert rate_factor(settings["SGD+L2_warmup_0"], 0, 2000) == 1.0


@pytest.mark.parametrize("study", STUDIES)
def test_no_two_settings_of_a_study_share_a_name(study: str) -> None:
    for task in STUDIES[study].tasks:
        names = [setting.name for setting in settings_of(study, task)]
        assert len(set(names)) == len(names) > 0


# Epochs, drops, factor; rate and L2 of SGD + L2; base, rate and L2 of the adaptive method, as the paper's table has it.
RIVALS = {
    "C10-CNN1": ((100, (80, 90, 97), 0.2), (3**-1, 1e-3), ("RMSprop", 3**-6, 0)),
    "C100-resnet": ((100, (70, 90, 97), 0.1), (3**-1, 1e-3), ("Adam", 3**-5, 0)),
    "tiny-CNN": ((80, (70,), 0.2), (3**-1, 1e-3), ("Adagrad", 3**-4, 0)),
    "C10-CNN2": ((250, (100, 170, 220), 0.2), (0.5, 5e-4), ("RMSprop", 3e-4, 5e-4)),
    "C100-WRN": ((250, (100, 170, 220), 0.2), (0.1, 5e-4), ("Adam", 3e-4, 5e-4)),
}


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_rates_and_schedules_are_the_paper_s(name: str) -> None:
    task, (schedule, sgd_l2, adaptive) = TASKS[name], RIVALS[name]
    assert task.sgd_l2 is not None
    assert task.adaptive is not None
    assert dataclasses.astuple(task.schedule) == schedule
    assert (task.sgd_l2.lr, task.sgd_l2.l2) == sgd_l2
    assert (task.adaptive.base, task.adaptive.lr, task.adaptive.l2) == adaptive


def test_schedules_that_differ_from_their_task_s() -> None:
    assert TASKS["tiny-CNN"].sgd_l2.schedule.epochs == 100  # type: ignore[union-attr]
    assert TASKS["C10-CNN2"].sgd_l2.schedule == Schedule(250, (25, 50, 75, 100, 125, 150, 175, 200, 225), 0.5)  # type: ignore[union-attr]
    assert TASKS["C100-WRN"].sgd_l2.schedule == Schedule(200, (60, 120, 160), 0.2)  # type: ignore[union-attr]
