"""The command: what it refuses, what it skips, and that a stopped study goes on where it stopped."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run
import torch
from paper.small_images import random_images, write_mnist
from studies import STUDIES
from tasks import TASKS
from training import Classifier

SCRIPT = Path(run.__file__)
QUICK = ("--accelerator", "cpu", "--data-dir", ".")


@pytest.fixture(autouse=True)
def noise_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    name_of = {task.dataset: name for name, task in reversed(TASKS.items())}
    monkeypatch.setattr(run, "load_images", lambda dataset, *args: random_images(name_of[dataset]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def results(folder: Path) -> dict[str, dict[str, Any]]:
    files = [file for file in folder.rglob("*_seed*.json") if "features" not in file.name]
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def assert_same_files(one: Path, other: Path, pattern: str) -> None:
    for file in one.rglob(pattern):
        assert (other / file.relative_to(one)).read_bytes() == file.read_bytes()


@pytest.mark.timeout(300)  # imports alone take a minute on a busy machine
def test_the_list_names_every_study_and_task() -> None:
    output = subprocess.run(
        [sys.executable, str(SCRIPT), "--list"], capture_output=True, text=True, timeout=280, check=True
    ).stdout
    assert all(f"\n  {name} " in output for name in (*STUDIES, *TASKS))
    assert re.search(r"MNIST +622,496 parameters in +2 layers, batch 2048\n", output)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layca-rate"], r"`STUDY` must be one of layca-rates, .*, got 'layca-rate'\. Did you mean layca-rates"),
        ([], r"`STUDY` must be 1 of layca-rates, .*, got \[\]\. See --list\."),
        (["table", "mnsit"], r"`STUDY` must be one of .*, got 'mnsit'\. Did you mean mnist"),
        (["mnist", "--task", "C10"], r"`--task` must be one of C10-CNN1, .*, got 'C10'\. Did you mean C10"),
        (["warmup", "--task", "C10-CNN1"], r"`--task` must be one of C10-resnet110, got 'C10-CNN1'"),
        (["mnist", "--settings", "3^-9"], r"`--settings` must be one of 3\^-2, 3\^-2\.5, .*, got '3\^-9'\. Did you"),
        (["mnist", "--scale", "2"], r"`--scale` must be above 0 and at most 1, got 2\. 1 is the paper's length\."),
        (["table", "mnist"], r"`--output` must hold results of mnist, got .*\. Run the study first\."),
    ],
)
def test_what_cannot_be_run_says_what_can(words: list[str], message: str, tmp_path: Path) -> None:
    answer = run.main([*words, "--output", str(tmp_path), *QUICK])
    assert isinstance(answer, str)
    assert re.match(message, answer), answer
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_folder_says_so_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    answer = run.main(["mnist", "--data-dir", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert answer == (
        f"`--data-dir` must be a folder that holds MNIST, got {tmp_path / 'none'}, which does not exist. "
        "Name the right folder, or add --download."
    )
    assert not (tmp_path / "out").exists()


def test_a_study_from_files_is_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    write_mnist(tmp_path)
    words = ["mnist", "--scale", "1e-6", "--settings", "3^-2", "--seeds", "3", "--output", str(tmp_path / "out")]
    words += ["--data-dir", str(tmp_path), "--accelerator", "cpu"]
    assert run.main(words) == 0
    first = contents(tmp_path / "out")
    assert sorted(first) == [
        f"mnist/MNIST/{name}" for name in ("3^-2_seed3.features.json", "3^-2_seed3.json", "plan.json")
    ]
    assert run.main(words) == 0
    assert "3^-2, seed 3: already finished" in capsys.readouterr().out
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize(
    ("study", "task", "setting", "hook"),
    [
        ("sgd-l2", "C100-resnet", "SGD+L2", "on_train_epoch_start"),  # tests its best epoch
        ("warmup", "C10-resnet110", "SGD+L2_warmup_5", "on_train_epoch_start"),  # augments
        ("replay", "C10-CNN1", "RMSprop", "on_train_epoch_start"),  # records every step
        ("mnist", "MNIST", "3^-2", "on_train_epoch_start"),
        ("mnist", "MNIST", "3^-2", "on_test_start"),  # after its last epoch
    ],
)
def test_a_stopped_setting_ends_as_one_that_was_not_stopped(
    study: str, task: str, setting: str, hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [study, "--task", task, "--settings", setting, "--scale", "1e-3", *QUICK, "--output"]
    assert run.main([*words, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, hook, lambda self: self.current_epoch < 2 or 1 / 0)
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            run.main([*words, str(tmp_path / "stopped")])
    assert results(tmp_path / "stopped") == {}
    assert run.main([*words, str(tmp_path / "stopped")]) == 0
    ((name, stopped),) = results(tmp_path / "stopped").items()
    whole = results(tmp_path / "whole")[name]
    assert (stopped.pop("resumed_after_epoch"), whole.pop("resumed_after_epoch")) == (2, None)
    assert stopped | {"seconds": 0} == whole | {"seconds": 0}
    assert_same_files(tmp_path / "whole", tmp_path / "stopped", "*.features.json")
    for file in (tmp_path / "whole").rglob("*.rates.pt"):
        rates = torch.load(file, weights_only=True)
        again = torch.load(tmp_path / "stopped" / file.relative_to(tmp_path / "whole"), weights_only=True)
        assert all(torch.equal(rates[layer], again[layer]) for layer in rates)


def test_a_folder_of_another_scale_is_left_alone(tmp_path: Path) -> None:
    words = ["mnist", "--settings", "3^-2", *QUICK, "--output", str(tmp_path)]
    assert run.main([*words, "--scale", "1e-6"]) == 0
    before = contents(tmp_path)
    answer = run.main([*words, "--scale", "1e-3"])
    assert str(answer).startswith("`--output` must name a new folder or one of the same settings, got ")
    assert "where `settings 3^-2 plan scale` is 1e-06, not 0.001. Name another folder, or repeat the" in str(answer)
    assert contents(tmp_path) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "mnist" / "MNIST"
    place.mkdir(parents=True)
    (place / "thesis.tex").write_text("years of work", encoding="utf-8")
    answer = run.main(["mnist", "--scale", "1e-6", *QUICK, "--output", str(tmp_path)])
    assert "must name a new folder or one of this study" in str(answer)
    assert contents(tmp_path) == {"mnist/MNIST/thesis.tex": b"years of work"}


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    words = ["mnist", "--scale", "1e-6", *QUICK, "--output", str(tmp_path)]
    assert run.main([*words, "--settings", "3^-2"]) == 0
    checkpoint = tmp_path / "mnist" / "MNIST" / "unfinished" / "3^-3_seed0" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"half")
    answer = run.main([*words, "--settings", "3^-3"])
    assert str(answer) == (
        f"{checkpoint} must be the checkpoint of a stopped training, got an unreadable file. Delete it and the "
        "training starts anew."
    )


def test_a_replay_needs_its_recording(tmp_path: Path) -> None:
    words = ["replay", "--task", "C10-CNN1", "--scale", "1e-6", *QUICK, "--output", str(tmp_path)]
    answer = run.main([*words, "--settings", "Layca_replay"])
    assert "got Layca_replay, which repeats its rotations. Run RMSprop first." in str(answer)
