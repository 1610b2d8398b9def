"""The tuning study: its bare loop reads what the monitor reads, and its methods do what they are described to do."""

import importlib
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pl_layer_rotation import LayerRotationMonitor
from pl_layer_rotation.report import suggestion

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("tuning_tasks", "tuning_rules", "tuning_runs", "tuning_trials", "tuning_report")
KINDS = {"one whole run": "whole", "one run at 20 %": "probe", "valley of probes": "valley"}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the study, gone again after the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    loaded = SimpleNamespace(**{name.removeprefix("tuning_"): importlib.import_module(name) for name in MODULES})
    yield loaded
    for name in MODULES:
        del sys.modules[name]


def bowl(study: Any, bottom: int, scores: dict[int, float] | None = None) -> Any:
    """A show whose straightness is lowest at a place and 1 far above it; it counts what was asked."""
    asked: list[tuple[int, float]] = []

    def show(place: int, share: float) -> Any:
        asked.append((place, share))
        kappa = 0.8 + 0.1 * abs(place - bottom) if place < bottom else min(1.0, 0.8 + 0.07 * (place - bottom))
        return study.rules.Shown(kappa, place > bottom + 8, (scores or {}).get(place, 0.0))

    show.asked = asked
    return show


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Layca(SGD)", "Layca(AdamW)"])
def test_the_bare_loop_reads_what_the_monitor_reads(study: Any, optimizer: str, tmp_path: Path) -> None:
    task, seed = study.tasks.TASKS["digits"]._replace(steps=130), 3
    data = task.data(None, seed)
    record = study.runs.train(task, data, optimizer, 0.01, 0.01, seed)
    torch.manual_seed(seed)
    module, monitor = study.runs.Module(task, optimizer, 0.01), LayerRotationMonitor(report=False)
    module.lr = 0.01
    loader = torch.utils.data.DataLoader(study.runs.Batches(task, data.train, seed), batch_size=None)
    study.runs.quiet_trainer(task.steps, tmp_path, callbacks=[monitor]).fit(module, loader)
    # Of Layca the monitor takes the angle of every step, the loop that of some.
    tolerance = 1e-2 if optimizer.startswith("Layca") else 1e-3
    for name, quantity in (("kappa", "straightness"), ("rotation", "rotation")):
        expected = list(monitor.history.final(quantity).values())
        assert record["layers"][name] == pytest.approx(expected, rel=tolerance if name == "kappa" else 1e-3)
    assert record["at_100"]["kappa"] == pytest.approx(
        sorted(monitor.history.final("straightness").values())[1], rel=tolerance
    )


def test_a_probe_is_the_beginning_of_the_whole_run(study: Any) -> None:
    task = study.tasks.TASKS["digits"]._replace(steps=100)
    data = task.data(None, 0)
    whole = study.runs.train(task, data, "AdamW", 0.003, 0.01, 0)
    probe = study.runs.train(task, data, "AdamW", 0.003, 0.01, 0, share=0.1)
    assert (probe["steps"], probe["at_10"]) == (10, whole["at_10"])
    assert "test_loss" not in probe
    assert whole["test_loss"] > 0


def test_a_run_that_diverges_scores_as_the_untrained_network(study: Any) -> None:
    task = study.tasks.TASKS["Friedman regression"]._replace(steps=50)
    data = task.data(None, 0)
    record = study.runs.train(task, data, "SGD", 1e3, 0.0, 0)
    torch.manual_seed(0)
    untrained = study.runs.judge(task, task.network(), data)
    assert record["diverged"]
    assert record["test_loss"] == pytest.approx(untrained["test_loss"], rel=1e-3)


def test_runs_in_the_file_are_not_trained_again(study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(study.tasks.TASKS, "digits", study.tasks.TASKS["digits"]._replace(steps=20))
    first = study.runs.Runs(tmp_path / "runs.jsonl", None).train("digits", "SGD", 0.1, None, 0)
    monkeypatch.setattr(study.runs, "train", None)
    again = study.runs.Runs(tmp_path / "runs.jsonl", None)
    assert again.train("digits", "SGD", 0.1, None, 0) == first
    assert again.train("digits", "SGD", 0.1, None, 0, share=0.1) == first, "a whole run answers for its beginning"


@pytest.mark.parametrize("name", ["MNIST", "CIFAR conv", "GPT, Shakespeare, long"])
def test_a_task_without_data_says_what_is_missing(study: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no (MNIST|cifar-10-batches-py|tinyshakespeare\.txt) in --data-dir"):
        study.tasks.TASKS[name].data(tmp_path, 0)


@pytest.mark.parametrize("distance", range(-6, 7))
def test_the_valley_is_found_from_any_start_within_two_decades(study: Any, distance: int) -> None:
    show = bowl(study, bottom=-4)
    outcome = study.rules.valley(-4 + distance, show)
    assert outcome.place == -4
    assert {share for _, share in show.asked} == {0.1}
    assert outcome.cost == pytest.approx(1 + 0.1 * len(set(show.asked)))
    assert outcome.cost <= 2.1


@pytest.mark.parametrize(("scores", "chosen"), [({-4: 90.0, -7: 80.0}, -4), ({-4: 80.0, -7: 90.0}, -7)])
def test_valley_and_below_keeps_what_validates_better(study: Any, scores: dict[int, float], chosen: int) -> None:
    show = bowl(study, -4, scores)
    outcome = study.rules.valley_and_below(-3, show)
    assert outcome.place == chosen
    assert [asked for asked in show.asked if asked[1] == 1.0] == [(-4, 1.0), (-7, 1.0)]


@pytest.mark.parametrize("distance", range(-6, 7))
def test_the_repair_finds_the_first_valley_and_goes_downhill(study: Any, distance: int) -> None:
    show = bowl(study, -4, {-4: 70.0, -6: 80.0, -8: 75.0})
    assert study.rules.first_valley_downhill(-4 + distance, show).place == -6
    assert [place for place, share in show.asked if share == 1.0] == [-4, -6, -8]


def test_the_repair_is_not_led_astray_by_a_low_value_far_above(study: Any) -> None:
    plain = bowl(study, -4)

    def show(place: int, share: float) -> Any:
        shown = plain(place, share)
        return shown._replace(kappa=0.79) if place == 2 else shown

    assert study.rules.valley(-2, show).place == 2
    assert study.rules.first_valley_downhill(-2, show).place == -4


def three_runs(study: Any, start: int, kappas: dict[int, float], scores: dict[int, float]) -> Any:
    def show(place: int, share: float) -> Any:
        return study.rules.Shown(kappas.get(place), place not in kappas, scores.get(place, math.nan))

    return study.rules.three_runs(start, show, study.rules.Rule(10.0, 1.0, 1.1, 3))


def test_three_runs_jump_by_the_rule_and_keep_the_best(study: Any) -> None:
    # κ = 10 is two decades below, κ = 2.2 nearly one and a half.
    outcome = three_runs(study, -9, {-9: 10.0, -3: 2.2, 1: 0.9}, {-9: 10.0, -3: 70.0, 1: 60.0})
    assert (outcome.place, outcome.cost, outcome.probed) == (-3, 3, (-9, -3, 1))


def test_three_runs_go_down_first_from_a_run_that_diverged(study: Any) -> None:
    outcome = three_runs(study, 3, {0: 1.0, -3: 1.3}, {0: 50.0, -3: 60.0})
    assert (outcome.place, outcome.cost, outcome.probed) == (-3, 3, (3, 0, -3))


def test_fit_recovers_a_rule(study: Any) -> None:
    points = [(kappa, 3.5 * kappa**1.8) for kappa in (1.2, 1.7, 2.5, 4.0)]
    assert study.rules.fit(points) == pytest.approx((3.5, 1.8))


def test_a_score_is_points_of_accuracy_or_of_loss(study: Any) -> None:
    better, worse = ({"test_loss": loss} for loss in (1.0, 1.05))
    assert study.rules.score(better, "test") - study.rules.score(worse, "test") == pytest.approx(1.0)
    assert study.rules.score({"test_loss": 2.0, "test_accuracy": 0.9}, "test") == pytest.approx(90.0, abs=0.01)


@pytest.mark.filterwarnings("ignore")
def test_the_finder_is_lightnings(study: Any) -> None:
    task = study.tasks.TASKS["digits"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = study.runs.find(task, task.data(None, 0), "AdamW", 0.01, 0)
    assert found["steps"] <= 100
    assert 1e-8 < found["suggestion"] < 1


def test_packed_records_come_back(study: Any) -> None:
    task = study.tasks.TASKS["digits"]._replace(steps=40)
    data = task.data(None, 0)
    record = study.runs.train(task, data, "SGD", 0.1, 5e-4, 0)
    finder = {
        "key": "f",
        "task": "digits",
        "optimizer": "SGD",
        "seed": 0,
        "finder": True,
        "suggestion": 0.1,
        "steps": 9,
    }
    back_finder, back = study.trials.unpack(study.trials.pack([record, finder]))
    assert back_finder == {name: value for name, value in finder.items() if name != "key"}
    assert {name: back[name] for name in ("rate", "decay", "seed", "diverged", "test_accuracy", "val_loss")} == {
        name: record[name] for name in ("rate", "decay", "seed", "diverged", "test_accuracy", "val_loss")
    }
    assert back["at_100"] == record["at_100"]
    assert back["at_10"] == {"kappa": record["at_10"]["kappa"]}


@pytest.fixture
def judged(study: Any) -> Any:
    return study.trials.load(BENCHMARKS / "results" / "tuning.json")


def test_the_tables_of_the_page_are_what_the_results_say(study: Any, judged: Any) -> None:
    page = (BENCHMARKS.parent / "docs" / "tuning.md").read_text(encoding="utf-8")
    repaired = study.trials.load(BENCHMARKS / "results" / "tuning_repair.json")
    assert study.report.with_tables(page, study.report.tables(judged, repaired)) == page


def test_the_package_has_the_studys_constants_and_their_measured_spread(study: Any, judged: Any) -> None:
    assert study.rules.WHOLE_RUN[:3] == (*suggestion._WHOLE, suggestion._WHOLE_ABOVE)
    assert study.rules.SHORT_RUN[:3] == (*suggestion._PROBE, suggestion._PROBE_ABOVE)
    for name, ratios in study.trials.spreads(judged).items():
        low, high = np.quantile(np.log10(ratios), (0.1, 0.9))
        assert suggestion._SPREAD[KINDS[name]] == pytest.approx((10**low, 10**high), rel=0.03), name


def test_spearman_and_regret_are_those_of_the_recorded_runs(judged: Any) -> None:
    ladder = next(one for one in judged if (one.task, one.optimizer, one.seed) == ("MNIST", "AdamW", 10))
    scores = {record["rate"]: 100 * record["test_accuracy"] for record in ladder.grid if record["decay"] == 0.01}
    chosen = max(ladder.grid, key=lambda record: record["val_accuracy"])
    assert ladder.regret(ladder.run(0.01)) == pytest.approx(100 * chosen["test_accuracy"] - scores[0.01], abs=0.02)
    assert len(ladder.grid) == 12
