"""How long one training is: the paper's length, or a share of its work for a computer without a GPU."""

import math
from dataclasses import dataclass

from errors import InputError
from studies import Setting
from tasks import Task

_FEWEST_STEPS = 20  # an epoch of a shortened training
_SMALLEST_BATCH = 8
_FEWEST_TEST_IMAGES = 1000


@dataclass(frozen=True)
class Plan:
    """Epochs, images and batch of one training."""

    scale: float
    epochs: int
    train_images: int
    validation_images: int
    test_images: int
    batch_size: int
    steps_per_epoch: int
    norm_momentum: float

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def make_plan(task: Task, setting: Setting, train_images: int, test_images: int, scale: float) -> Plan:
    """Shorten a training to about ``scale`` times its epochs × images.

    Epochs and images shrink alike, each by the square root. The batch stays as it is while an epoch has 20 steps and
    shrinks below that, down to 8 images, because rotation comes by steps. Schedules and warm-up keep their shares of
    the training. Running statistics of the normalizations follow faster in trainings of fewer than 500 steps.

    Args:
        task: what is learned.
        setting: with which schedule.
        train_images: images of the training set, the validation part included.
        test_images: images of the test set.
        scale: 1 is the paper's length.

    Raises:
        InputError: If ``scale`` is not in (0, 1].

    """
    if not 0 < scale <= 1:
        raise InputError(f"`--scale` must be above 0 and at most 1, got {scale:g}. 1 is the paper's length.")
    share = math.sqrt(scale)
    available = train_images if task.per_class is None else min(train_images, 10 * task.per_class)
    held_out = int(available * task.validation_share)
    images, batch = available - held_out, task.batch_size
    if scale < 1:
        images = max(round(images * share), min(images, 2 * _SMALLEST_BATCH))
        batch = max(min(batch, images // _FEWEST_STEPS), min(_SMALLEST_BATCH, images))
        images -= images % batch
        held_out = max(1, round(held_out * share)) if held_out else 0
        test_images = min(test_images, max(_FEWEST_TEST_IMAGES, round(test_images * share)))
    epochs = max(1, round(setting.schedule.epochs * share))
    steps = math.ceil(images / batch)
    return Plan(
        scale=scale,
        epochs=epochs,
        train_images=images,
        validation_images=held_out,
        test_images=test_images,
        batch_size=batch,
        steps_per_epoch=steps,
        norm_momentum=max(task.norm_momentum, min(0.1, 5 / (epochs * steps))),
    )


def rate_factor(setting: Setting, step: int, steps: int) -> float:
    """Share of the full rate in one step of a training of ``steps``.

    Warm-up rises linearly from a tenth over its share of the training.
    """
    schedule = setting.schedule
    factor = schedule.factor ** sum(step * schedule.epochs >= drop * steps for drop in schedule.drops)
    risen = step * schedule.epochs / (setting.warmup_epochs * steps) if setting.warmup_epochs else 1.0
    return factor * (0.1 + 0.9 * min(1.0, risen))
