"""References too large for a checkpoint: written once beside the logs, read back cut in any way."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from test_layca_strategies import WORLDS, SaveHalf, train
from test_layca_strategies import pytestmark as STRATEGY_MARKS
from test_monitor_strategies import SAME, OneGroup, by_hand, curves, difference, weights_of_one_process

from pl_layer_rotation import LayerRotationMonitor, _reference

pytestmark = STRATEGY_MARKS

FOLDER = "layer_rotation_reference"
ROUTES = [
    ("one process", "one process"),
    ("DDP", "DDP"),
    ("FSDP1 FULL_SHARD by layer", "FSDP1 FULL_SHARD by layer"),
    ("FSDP1 HYBRID_SHARD", "FSDP1 HYBRID_SHARD"),
    ("FSDP2", "FSDP2"),
    ("FSDP2 × TP", "FSDP2 × TP"),
    ("HSDP", "HSDP"),
    ("one process", "FSDP2"),
    ("DDP", "FSDP1 FULL_SHARD"),
    ("FSDP1 FULL_SHARD", "DDP"),
    ("FSDP1 FULL_SHARD by layer", "FSDP2"),
    ("FSDP2", "one process"),
    ("FSDP2", "FSDP2 × TP"),
]


def fit(rank: int, folder: str, strategy: str, save: bool, dtype: str | None = None) -> tuple[Any, list[str]]:
    """Curves and warnings of a training that saves halfway in this folder, or goes on from there."""
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    _reference._MOST_CARRIED = 0
    monitor = LayerRotationMonitor(every_n_steps=1, report=False, reference_dtype=dtype)
    world, checkpoint = WORLDS.get(strategy, 2), os.path.join(folder, "checkpoints", "half.ckpt")
    with warnings.catch_warnings(record=True) as seen:
        warnings.filterwarnings("always", "LayerRotationMonitor")
        saving = SaveHalf({False: checkpoint} if save else {})
        train(OneGroup(strategy), strategy, world, saving, monitor, resume=None if save else checkpoint)
    state = monitor.state_dict()
    assert state["reference"] == {}
    ours = [str(warning.message) for warning in seen if "LayerRotation" in str(warning.message)]
    return monitor.history.state_dict(), ours


@pytest.fixture(scope="module")
def expected() -> Any:
    (snapshots,) = launch(weights_of_one_process, world=1, timeout=30)
    return by_hand(snapshots)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of trainings by strategy, each done once."""
    folders: dict[str, Path] = {}

    def folder(strategy: str) -> Path:
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp("saved")
            launch(fit, str(folders[strategy]), strategy, True, world=WORLDS.get(strategy, 2))
        return folders[strategy]

    return folder


@pytest.mark.contract("C15")
@pytest.mark.parametrize(("source", "target"), ROUTES, ids=lambda name: name)
def test_curves_go_on_from_the_folder(source: str, target: str, saved: Any, expected: Any) -> None:
    for history, warned in launch(fit, str(saved(source)), target, False, world=WORLDS.get(target, 2)):
        assert difference(curves(history), expected) <= SAME
        assert warned == []


def test_checkpoints_name_the_folder_and_hold_no_weights_of_it(saved: Any) -> None:
    folder = saved("FSDP2")
    callbacks = torch.load(folder / "checkpoints" / "half.ckpt", weights_only=True)["callbacks"]
    (state,) = [state for key, state in callbacks.items() if "LayerRotation" in key]
    assert state["reference"] == {}
    assert state["sidecar"]["folder"] == str(folder / FOLDER)
    assert len(state["sidecar"]["fingerprint"]) == 64


def test_a_moved_run_finds_its_folder_beside_the_checkpoints(saved: Any, expected: Any, tmp_path: Path) -> None:
    shutil.copytree(saved("DDP"), tmp_path / "moved")
    shutil.move(saved("DDP") / FOLDER, tmp_path / "away")
    try:
        (history, warned), _ = launch(fit, str(tmp_path / "moved"), "DDP", False)
    finally:
        shutil.move(tmp_path / "away", saved("DDP") / FOLDER)
    assert difference(curves(history), expected) <= SAME
    assert warned == []


@pytest.mark.parametrize("foreign", [False, True], ids=["missing", "of another training"])
def test_without_its_folder_a_run_is_measured_from_now_and_says_so(
    saved: Any, expected: Any, tmp_path: Path, foreign: bool
) -> None:
    shutil.copytree(saved("FSDP2"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / FOLDER)
    if foreign:
        shutil.copytree(saved("one process") / FOLDER, tmp_path / "run" / FOLDER)
        text = (tmp_path / "run" / FOLDER / "reference.json").read_text(encoding="utf-8")
        (tmp_path / "run" / FOLDER / "reference.json").write_text(text.replace("0", "1"), encoding="utf-8")
    shutil.move(saved("FSDP2") / FOLDER, tmp_path / "away")
    try:
        (history, (missing, lost)), (_, quiet) = launch(fit, str(tmp_path / "run"), "FSDP2", False)
    finally:
        shutil.move(tmp_path / "away", saved("FSDP2") / FOLDER)
    assert f"are not in {saved('FSDP2') / FOLDER}, or are those of another training. Put that folder back" in missing
    assert "holds no weights to measure 'body.0', 'body.2', 'head' from: they are measured from now on" in lost
    assert quiet == []
    found = curves(history)
    assert difference({"rotation": found["rotation"][:3]}, {"rotation": expected["rotation"][:3]}) <= SAME
    assert (found["rotation"][3] < expected["rotation"][3] / 2).all()


def test_a_folder_that_cannot_be_written_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("no folder", encoding="utf-8")
    for history, warned in launch(fit, str(tmp_path), "FSDP2", True):
        assert len(history["rows"]) == 6
        assert all("writing the weights to measure from failed" in message for message in warned)
        assert all("FileExistsError" in message for message in warned)


def test_rounded_references_come_back_as_they_were(tmp_path: Path, expected: Any) -> None:
    (straight, _), _ = launch(fit, str(tmp_path), "FSDP2", True, "bfloat16")
    (resumed, _), _ = launch(fit, str(tmp_path), "FSDP2", False, "bfloat16")
    assert difference(curves(resumed), curves(straight)) == 0
    assert straight["facts"]["reference_resolution"] == 3e-6
    # Rounding is an angle of 1.7e-3, which adds to the true one in square or, at the worst, in line.
    assert difference({"rotation": curves(straight)["rotation"]}, {"rotation": expected["rotation"]}) <= 5e-3
