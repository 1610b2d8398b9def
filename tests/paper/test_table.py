"""The table beside the paper's numbers, and the pictures, from results with known values."""

import importlib
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pictures
import pytest
import run
from plans import make_plan
from published import published
from results import StudyFolder, write_json
from studies import settings_of
from table import distances, table_row
from tasks import TASKS

EPOCHS = 10


def result(study: str, task: str, setting: str, seed: int, test: float) -> dict[str, Any]:
    """Two layers that end at 0.3 and 0.9, and a third that is never defined."""
    recipe = {"base": "SGD", "lr": 0.1, "layca": True, "schedule": {"epochs": 100}}
    values = [[0.03 * epoch, 0.09 * epoch, None] for epoch in range(1, EPOCHS + 1)]
    return {
        **{"study": study, "task": task, "setting": setting, "seed": seed, "test_acc": test, "train_acc": 100.0},
        **{"recipe": recipe, "scale": 0.01, "data": "noise", "machine": "paper"},
        "plan": {"epochs": EPOCHS, "steps_per_epoch": 5, "scale": 0.01, "train_images": 50, "batch_size": 10}
        | {"test_images": 20},
        "rotation": {"layers": ["a", "b", "c"], "epochs": list(range(1, EPOCHS + 1)), "values": values},
    }


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Two of MNIST's rates, the first with two seeds."""
    place = tmp_path / "mnist" / "MNIST"
    write_json(place / "plan.json", {"settings": {s.name: {} for s in settings_of("mnist", "MNIST")}})
    for setting, seed, test in [("3^-2", 0, 96.0), ("3^-2", 1, 97.0), ("3^-4", 0, 95.0)]:
        write_json(place / f"{setting}_seed{seed}.json", result("mnist", "MNIST", setting, seed, test))
        images = {"initial": [[n + 784 * i for n in range(784)] for i in range(5)], "final": [[seed] * 784] * 5}
        write_json(place / f"{setting}_seed{seed}.features.json", images)
    return tmp_path


def test_a_row_has_mean_and_deviation_beside_the_paper_s_numbers() -> None:
    runs = [result("mnist", "MNIST", "3^-2", seed, test) for seed, test in enumerate((96.0, 97.0))]
    assert table_row("mnist", "MNIST", "3^-2", runs) == (
        *("MNIST", "3^-2", "2", "96.50 ± 0.71", "96.75", "0.300 ± 0.000 first layer", "0.90 first layer"),
        "section 6, features",
    )


def test_least_and_largest_distance_are_read_after_the_same_share_of_the_training() -> None:
    row = table_row("layca-rates", "C10-CNN1", "3^-4", [result("layca-rates", "C10-CNN1", "3^-4", 0, 50.0)])
    assert row[3:7] == ("50.00", "86.04", "0.24 to 0.72 over layers", "0.19 to 0.82 over layers")
    assert distances(result("", "", "", 0, 0.0), "all") == pytest.approx([0.3, 0.9])


def test_what_was_not_run_or_not_published_is_a_dash() -> None:
    assert table_row("alphas", "C10-CNN1", "alpha_+0.1", []) == ("C10-CNN1", "alpha_+0.1", "0", *["-"] * 5)


@pytest.mark.parametrize(
    ("key", "test"),
    [
        (("layca-rates", "C100-resnet", "3^-5"), 35.39),  # 59.81 - 24.42
        (("alphas", "C100-WRN", "alpha_+0.6"), 73.10),  # 80.69 - 7.59
        (("sgd-rates", "C100-WRN", "3^-2"), 76.74),  # 80.69 - 3.95
        (("sgd-l2", "tiny-CNN", "SGD+L2"), 50.04),  # 50.89 - 0.85
        (("adaptive", "C10-CNN2", "RMSprop+L2"), 91.85),  # 93.40 - 1.55
        (("adaptive", "C10-CNN2", "RMSprop+Layca"), 93.47),
        (("replay", "C100-WRN", "SGD+L2"), 80.45),
        (("warmup", "C10-resnet110", "SGD+L2_warmup_5"), 92.43),
    ],
)
def test_published_numbers_are_the_differences_from_layca_s_best(key: tuple[str, str, str], test: float) -> None:
    paper = published(*key)
    assert paper is not None
    assert paper.test == pytest.approx(test)
    assert key[2] in [setting.name for setting in settings_of(*key[:2])]


def test_the_table_command(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["table", "mnist", "--output", str(written)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[:6]] == [
        "setting",
        "-------",
        "3^-2",
        "3^-2.5",
        "3^-3",
        "3^-4",
    ]
    assert lines[-1].startswith("MNIST: shortened to 0.01 of the paper's work, 10 epochs of 50 images in batches of 10")


def test_the_pictures_command_draws_what_the_results_hold(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["pictures", "mnist", "--output", str(written)]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.name for file in files] == [
        f"mnist-{k}" for k in ("rotation.png", "accuracy.png", "rotation.html", "features.png")
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files if file.suffix == ".png")
    assert "MNIST, 3^-4" in files[2].read_text(encoding="utf-8")


def test_curves_and_points_are_the_results(written: Path) -> None:
    found = {"MNIST": list(StudyFolder(written / "mnist" / "MNIST", "mnist", "MNIST").read())}
    panels = pictures.rotation_sheet(found).axes
    assert [panel.get_title() for panel in panels] == ["$3^{-2}$: 96.50 ± 0.71 %", "$3^{-4}$: 95.00 %"]
    first, second, third = (line.get_ydata() for line in panels[0].lines)
    assert (first[0], first[-1], second[-1]) == pytest.approx((0.0, 0.3, 0.9))
    assert all(math.isnan(value) for value in third[1:])
    (axis,) = pictures.accuracy_against_rotation(found).axes
    points = [tuple(point) for group in axis.collections for point in group.get_offsets()]
    assert points == [pytest.approx(point) for point in [(0.3, 96.0), (0.3, 97.0), (0.3, 95.0)]]


def test_features_are_drawn_as_images(written: Path) -> None:
    folder = StudyFolder(written / "mnist" / "MNIST", "mnist", "MNIST")
    axes = pictures.feature_sheet(folder, list(folder.read())).axes
    assert len(axes) == 3 * 5  # start, and two rates
    assert axes[1].images[0].get_array()[1][2] == 784 + 28 + 2
    assert axes[10].get_ylabel() == "lr $3^{-4}$\ndistance 0.30"


def test_without_matplotlib_the_command_says_what_to_install(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pictures")
    answer = run.main(["pictures", "mnist", "--output", str(written)])
    assert answer == "pictures need matplotlib, which is not installed. Run `uv pip install matplotlib`."
    monkeypatch.undo()
    importlib.import_module("pictures")


RESULTS = Path(run.__file__).parents[1] / "results" / "paper"


def test_the_committed_results_are_of_the_settings_that_the_study_has_now(tmp_path: Path) -> None:
    """Claiming a folder of other settings is an error, and that of the same changes nothing."""
    place = shutil.copytree(RESULTS / "mnist" / "MNIST", tmp_path / "MNIST")
    settings = settings_of("mnist", "MNIST")
    plans = [make_plan(TASKS["MNIST"], setting, 60_000, 10_000, 1.0) for setting in settings]
    folder = StudyFolder(place, "mnist", "MNIST")
    folder.claim(settings, plans, "IDX files")
    found = list(folder.read())
    seeds = {setting.name: [r["seed"] for r in found if r["setting"] == setting.name] for setting in settings}
    assert len(set(map(tuple, seeds.values()))) == 1  # every rate with the same ones
    assert all(result["train_acc"] > 99.9 for result in found)
    assert all(result["versions"]["torch"] and result["machine"] and result["command"] for result in found)
