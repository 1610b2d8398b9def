"""Every study on every task: one tiny step does what the optimizer promises, and a scaled run leaves its results.

The table of both: ``pytest tests/paper/test_studies.py -k table``.
"""

import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import pytest
import run
import torch
from paper.small_images import random_images
from plans import make_plan
from results import StudyFolder
from studies import STUDIES, Setting, settings_of
from tasks import TASKS
from torch import Tensor
from training import Classifier, recorded_rates, train

from pl_layer_rotation import Layca, RotationHistory, layer_rotation, select_layers

PAIRS = [(study, task) for study in STUDIES for task in STUDIES[study].tasks]
SMALL = ("--scale", "1e-6", "--accelerator", "cpu")


def shown(study: str, task: str) -> Setting:
    """The last setting of a study; of a replay the one that repeats."""
    return settings_of(study, task)[1 if study == "replay" else -1]


def step_once(task: str, setting: Setting) -> tuple[Classifier, torch.optim.Optimizer, dict[str, Tensor]]:
    """A network after one step on four images, its optimizer, and the weights before."""
    images = random_images(task, train=40)
    plan = make_plan(TASKS[task], setting, 40, 8, scale=1.0)
    rates = {name: torch.tensor([rate]) for name, rate in recorded(task).items()} if setting.replays else None
    model = Classifier(TASKS[task], setting, plan, seed=0, rates=rates)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # no trainer here
    config = model.configure_optimizers()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.training_step((images.train[:4].float() / 255, images.train_labels[:4])).backward()
    config["optimizer"].step()
    return model, config["optimizer"], before


def recorded(task: str) -> dict[str, float]:
    """A rate of its own for each layer."""
    with torch.device("meta"):
        return {f"net.{n}": 0.01 + 0.001 * depth for depth, n in enumerate(select_layers(TASKS[task].network()))}


def turned(model: Classifier, before: dict[str, Tensor]) -> dict[str, float]:
    """Tangent of the angle by which the step turned each layer."""
    distances = {n: layer_rotation(w, before[f"{n}.weight"]).item() for n, w in select_layers(model).items()}
    return {name: math.tan(math.acos(1 - distance)) for name, distance in distances.items()}


@functools.cache
def tiny_step(study: str, task: str) -> str:
    """What the step of a setting of the study did."""
    setting = shown(study, task)
    model, optimizer, before = step_once(task, setting)
    if not setting.layca:
        expected = plain_step(model, setting, before)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-4, atol=1e-6)
        return f"{type(optimizer).__name__} as by hand"
    assert isinstance(optimizer, Layca)
    tangents = turned(model, before)
    assert len(tangents) == len(before)
    assert list(tangents.values()) == pytest.approx(layca_rates(task, setting), rel=5e-3)
    return f"turns by {min(tangents.values()):.2g} to {max(tangents.values()):.2g}"


def layca_rates(task: str, setting: Setting) -> list[float]:
    """From the first layer to the last, by the paper's formula for alpha."""
    if setting.replays:
        return list(recorded(task).values())
    layers = layers_of(task)
    late = [(1 - setting.alpha) ** (5 * (layers - 1 - depth) / (layers - 1)) for depth in range(layers)]
    early = [(1 + setting.alpha) ** (5 * depth / (layers - 1)) for depth in range(layers)]
    return [setting.lr * factor for factor in (late if setting.alpha > 0 else early)]


def plain_step(model: Classifier, setting: Setting, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """SGD's first step: down the gradient of loss + l2·Σw², all layers or all but the output; Nesterov adds 0.9 of it."""
    assert setting.base == "SGD"
    task, stretch = model.task, 1.9 if model.task.nesterov else 1.0
    decays = {name: 0.0 if "output" in name and not task.decays_output else 2 * setting.l2 for name in before}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {n: w - setting.lr * stretch * (gradients[n] + decays[n] * w) for n, w in before.items()}


@functools.cache
def scaled_run(study: str, task: str) -> str:
    """The shortest run of a setting of the study, and of the one that it repeats."""
    setting = shown(study, task)
    names = [setting.replays, setting.name] if setting.replays else [setting.name]
    with tempfile.TemporaryDirectory() as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_images", lambda *args: random_images(task))
        words = [study, "--task", task, "--settings", *names, "--output", output, "--data-dir", output, *SMALL]
        assert run.main(words) == 0
        results = list(StudyFolder(Path(output, study, task), study, task).read())
        left = list(Path(output, study, task).glob("unfinished/*"))
    assert [result["setting"] for result in results] == names
    assert left == []
    (rotation,) = results[-1]["rotation"]["values"]
    assert len(rotation) == layers_of(task)
    assert all(0 <= distance < 1 for distance in rotation)
    assert max(rotation) > 1e-9
    plan = results[-1]["plan"]
    return f"{plan['epochs'] * plan['steps_per_epoch']} steps, farthest layer {max(rotation):.2g}"


@functools.cache
def layers_of(task: str) -> int:
    with torch.device("meta"):
        return len(select_layers(TASKS[task].network()))


@pytest.mark.parametrize(("study", "task"), PAIRS)
def test_one_tiny_step(study: str, task: str) -> None:
    assert tiny_step(study, task)


@pytest.mark.parametrize(("study", "task"), PAIRS)
def test_a_scaled_run_leaves_its_result(study: str, task: str) -> None:
    assert scaled_run(study, task)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{'study':12} {'task':13} {'parameters':>11} {'layers':>6}  {'one tiny step':26} scaled run"]
    for study, task in PAIRS:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in TASKS[task].network().parameters())
        counts = f"{study:12} {task:13} {size:>11,} {layers_of(task):>6}"
        lines.append(f"{counts}  {tiny_step(study, task):26} {scaled_run(study, task)}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))


@pytest.mark.parametrize(("base", "tangent"), [("RMSprop", 0.1**-0.5), ("Adam", 1.0), ("Adagrad", 1.0)])
def test_adaptive_methods_first_step_is_lr_for_each_weight(base: str, tangent: float) -> None:
    task = {"RMSprop": "C10-CNN1", "Adam": "C100-resnet", "Adagrad": "tiny-CNN"}[base]
    setting = settings_of("adaptive", task)[0]
    model, optimizer, before = step_once(task, setting)
    weight = model.net.output.weight
    assert type(optimizer).__name__ == base
    felt = weight.grad.abs() > 1e-3  # far above eps
    moved = (weight.detach() - before["net.output.weight"]).abs()[felt]
    torch.testing.assert_close(moved, torch.full_like(moved, setting.lr * tangent), rtol=2e-3, atol=0.0)


def test_a_replay_makes_the_rotations_of_each_step_again(tmp_path: Path) -> None:
    task, (recording, repeating, _) = TASKS["C10-CNN1"], settings_of("replay", "C10-CNN1")
    images = random_images("C10-CNN1", train=200)
    plan = make_plan(task, recording, 200, 8, scale=1e-6)
    assert plan.steps == 2
    recorded = train(task, recording, plan, images, 0, tmp_path / "a" / "last.ckpt", accelerator="cpu")
    rates = recorded_rates(recorded.history, plan.steps)
    repeating = dataclasses.replace(repeating, records=True)
    repeated = train(task, repeating, plan, images, 0, tmp_path / "b" / "last.ckpt", rates, "cpu")
    angles = [finished.history.values("angular_update") for finished in (repeated, recorded)]
    torch.testing.assert_close(*angles, rtol=1e-4, atol=0.0)
    assert 1e-3 < angles[0].min() < 0.5 * angles[0].max()


def test_rates_of_a_recording_with_a_gap_are_refused() -> None:
    history = RotationHistory(["fc"])
    history.append(1, angular_update=[0.1])
    history.append(2, angular_update=[math.nan])
    with pytest.raises(
        ValueError, match="an angle of every layer in each of 2 steps, got 2 readings, 1 of their angles"
    ):
        recorded_rates(history, 2)
