import json
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning_utilities.core.rank_zero import rank_zero_only
from offline_runs import OfflineRun, read_offline_run
from wandb.cli.cli import cli
from wandb.sdk.wandb_run import Run

from pl_layer_rotation._log_keys import log_keys
from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.figures import figures
from pl_layer_rotation.report.wandb_sink import (
    chart_keys,
    charts_due,
    log_charts,
    log_page,
    log_results,
    prepare_run,
    run_config,
    viewing_hint,
)

STEP = "trainer/global_step"
STATS = "layer_rotation_stats/mean"
CHARTS = [f"layer_rotation_charts/{name}" for name in ("final_rotation", "heatmap", "rotation")]
HOSTILE = ["stem.conv/1", 'a"b\\</script>\n', "тест.weight*", "x" * 300]
KEYS = [*log_keys(HOSTILE), *log_keys(HOSTILE, "norm_ratio"), STATS]


def make_history(layer_names: list[str]) -> RotationHistory:
    history = RotationHistory(layer_names, [(depth + 1, 2) for depth in range(len(layer_names))])
    history.append(10, rotation=[0.01 * depth for depth in range(len(layer_names))])
    history.append(20, rotation=[0.02 * depth for depth in range(len(layer_names) - 1)] + [float("nan")])
    return history


def start_run(folder: Path) -> Run:
    return wandb.init(mode="offline", dir=str(folder), settings=wandb.Settings(silent=True, x_disable_stats=True))


def keys_of(row: dict[str, Any]) -> list[str]:
    return sorted(key for key in row if not key.startswith("_") and key != STEP)


def strict_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda it: pytest.fail(f"browsers refuse {it}"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> OfflineRun:
    """A run of layers with difficult names that was sent everything."""
    history = make_history(HOSTILE)
    with start_run(tmp_path_factory.mktemp("hostile")) as run:
        prepare_run(run, history, KEYS)
        log_charts(run, history, step=20)
    return read_offline_run(run.dir)


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def loggers(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield import_module(f"{request.param}.loggers")
    wandb.finish()


def test_config_lists_the_layers_in_depth_order(stored: OfflineRun) -> None:
    layers = stored.config["layer_rotation"]["layers"]
    assert [layer["name"] for layer in layers] == HOSTILE
    assert [layer["shape"] for layer in layers] == [[1, 2], [2, 2], [3, 2], [4, 2]]
    assert [layer["key"] for layer in layers] == log_keys(HOSTILE)


@pytest.mark.parametrize("layers", [0, 1000, 1001, 10_000])
def test_config_of_a_very_deep_model_is_small_and_keeps_both_ends(layers: int) -> None:
    names = [f"blocks.{i}.mixer.attention.out_proj" for i in range(layers)]
    config = run_config(RotationHistory(names))["layer_rotation"]
    assert [layer["name"] for layer in config["layers"]] == (names if layers <= 1000 else names[:500] + names[-500:])
    assert config["n_layers"] == layers
    assert len(json.dumps(config)) < 200_000


def test_config_holds_the_facts_that_runs_differ_in_and_no_list_of_layers_more() -> None:
    facts = {"optimizer": "SGD", "learning_rate": 0.1, "total_steps": None, "followed_by_norm": ["fc"], "devices": 2}
    config = run_config(RotationHistory(["fc"], facts=facts))["layer_rotation"]
    assert {key: value for key, value in config.items() if key != "layers"} == {
        **{"n_layers": 1, "optimizer": "SGD", "learning_rate": 0.1, "devices": 2}
    }


def test_layer_list_of_a_continued_run_is_replaced(tmp_path: Path) -> None:
    with start_run(tmp_path) as run:
        prepare_run(run, RotationHistory(["old", "fc"]), [])
        prepare_run(run, RotationHistory(["new"]), [])
    assert [layer["name"] for layer in read_offline_run(run.dir).config["layer_rotation"]["layers"]] == ["new"]


def test_metrics_are_defined_by_exact_name_over_the_global_step(stored: OfflineRun) -> None:
    assert list(stored.metrics) == [STEP, *KEYS]
    assert {stored.metrics[key].step_metric for key in KEYS} == {STEP}
    assert not any(metric.glob_name or metric.options.hidden for metric in stored.metrics.values())
    assert not any(metric.summary.ListFields() for metric in stored.metrics.values())


@pytest.mark.parametrize(("layers", "hidden"), [(32, False), (33, True)])
def test_layers_are_hidden_above_32_and_aggregates_never(tmp_path: Path, layers: int, hidden: bool) -> None:
    names = [f"fc{i}" for i in range(layers)]
    keys = [*log_keys(names), *log_keys(names, "angular_update"), STATS]
    with start_run(tmp_path) as run:
        prepare_run(run, RotationHistory(names), keys)
    metrics = read_offline_run(run.dir).metrics
    assert [metrics[key].options.hidden for key in keys] == [hidden] * 2 * layers + [False]


def test_row_without_a_step_takes_that_of_the_row_before(tmp_path: Path) -> None:
    (key,) = log_keys(["fc"])
    with start_run(tmp_path) as run:
        prepare_run(run, RotationHistory(["fc"]), [key])
        run.log({STEP: 7})
        run.log({key: 0.5})
    assert read_offline_run(run.dir).series(key) == [(7, 0.5)]


def test_charts_are_one_row_at_the_global_step(stored: OfflineRun) -> None:
    (row,) = stored.rows
    assert (keys_of(row), row[STEP]) == (CHARTS, 20)
    assert {row[chart]["_type"] for chart in CHARTS} == {"plotly-file"}


def test_charts_hold_every_layer(stored: OfflineRun) -> None:
    bars, cells, curves = (strict_json(*stored.media(chart))["data"] for chart in CHARTS)
    values = [[0, 0], [0.01, 0.02], [0.02, 0.04], [0.03, None]]
    assert [(trace["x"], trace["y"]) for trace in curves] == [([10, 20], row) for row in values]
    assert cells[0]["z"] == values
    assert bars[0]["x"] == [0, 0.02, 0.04, 0.03]


@pytest.mark.parametrize(
    ("total", "every", "sent_after"),
    [
        (1000, 10, [100, 250, 500, 750]),
        (1000, 1, [100, 250, 500, 750]),
        (1000, 300, [300, 600, 900]),
        (100, 100, []),
        (None, 5, [50, 500, 5000]),
    ],
)
def test_charts_are_due_four_times_in_a_run_at_most(total: int | None, every: int, sent_after: list[int]) -> None:
    history, sent = RotationHistory(["fc"], facts={"total_steps": total}), []
    for step in range(every, (total or 5000) + 1, every):
        history.append(step, rotation=[0.5])
        if charts_due(history, history.steps[-2] if len(history) > 1 else 0):
            sent.append(step)
    assert sent == sent_after


def test_the_charts_are_those_that_the_page_shows() -> None:
    assert [key.partition("/")[2] for key in chart_keys("p")] == list(figures(RotationHistory(["fc"])))


def test_results_are_in_the_summary(tmp_path: Path) -> None:
    history = RotationHistory(HOSTILE)
    history.append(10, rotation=[0.1, 0.0, 0.4, float("nan")], norm_ratio=[1.0] * 4, straightness=[2.0, 1.0, 1.5, 3.0])
    with start_run(tmp_path) as run:
        log_results(run, history, prefix="p")
    summary = read_offline_run(run.dir).summary
    assert summary["p-layer_rotation_findings"].splitlines() == [str(finding) for finding in history.findings()]
    assert summary["p-layer_rotation_finding_codes"] == "A"
    statistics = [summary[f"p-layer_rotation_stats/{name}"] for name in ("mean", "min", "max")]
    assert statistics == pytest.approx([0.5 / 3, 0.0, 0.4], rel=1e-12)
    assert summary["p-layer_straightness_stats/median"] == 1.5  # the lower of two, as in the curve


def test_results_without_finding_or_straightness(tmp_path: Path) -> None:
    history = RotationHistory(["conv", "fc"])
    history.append(10, rotation=[0.1, 0.2])
    with start_run(tmp_path) as run:
        log_results(run, history)
    summary = read_offline_run(run.dir).summary
    assert summary["layer_rotation_finding_codes"] == "none"
    assert summary["layer_rotation_findings"].startswith("No finding.")
    assert "layer_straightness_stats/median" not in summary


def test_page_arrives_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><html><head></head><body>\u202eÄß</body></html>\n", encoding="utf-8")
    with start_run(tmp_path) as run:
        log_page(run, page, step=7, prefix="p")
    stored = read_offline_run(run.dir)
    ((step, _),) = stored.series("p-layer_rotation_charts/page")
    assert (step, [file.read_bytes() for file in stored.media("p-layer_rotation_charts/page")]) == (
        7,
        [page.read_bytes()],
    )


def test_page_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with start_run(tmp_path) as run, pytest.raises(FileNotFoundError, match=r"missing\.html"):
        log_page(run, tmp_path / "missing.html", step=7)


def test_charts_arrive_when_the_global_step_is_below_the_row_count(tmp_path: Path) -> None:
    with start_run(tmp_path) as run:
        for _ in range(5):
            run.log({"loss": 1.0, STEP: 0})
        for step in (1, 3):
            log_charts(run, make_history(["conv", "fc"]), step)
    assert [step for step, _ in read_offline_run(run.dir).series(CHARTS[0])] == [1, 3]


def test_charts_wait_for_a_reading(tmp_path: Path) -> None:
    with start_run(tmp_path) as run:
        log_charts(run, RotationHistory(["fc"]), step=0)
    assert read_offline_run(run.dir).rows == []


@pytest.mark.parametrize(("prefix", "before"), [("", ""), ("run.a", "run.a-")])
def test_keys_are_those_that_lightning_writes(loggers: Any, tmp_path: Path, prefix: str, before: str) -> None:
    history = make_history(["conv", "fc"])
    keys = log_keys(history.layer_names)
    logger = loggers.WandbLogger(mode="offline", save_dir=tmp_path, prefix=prefix)
    prepare_run(logger.experiment, history, keys, prefix)
    logger.log_metrics(dict.fromkeys(keys, 0.5), step=10)
    log_charts(logger.experiment, history, 20, prefix)
    logger.experiment.finish()
    run = read_offline_run(logger.experiment.dir)
    assert [keys_of(row) for row in run.rows] == [[before + key for key in keys], [before + key for key in CHARTS]]
    assert [layer["key"] for layer in run.config["layer_rotation"]["layers"]] == keys_of(run.rows[0])
    # Older wandb adds what Lightning's own "*" matched.
    assert list(run.metrics)[:4] == [STEP, "*", *keys_of(run.rows[0])]


def test_run_that_was_there_before_the_logger(loggers: Any, tmp_path: Path) -> None:
    run, history = start_run(tmp_path), make_history(["conv", "fc"])
    with pytest.warns(UserWarning, match="There is a wandb run already in progress"):
        experiment = loggers.WandbLogger(save_dir=tmp_path).experiment
    prepare_run(experiment, history, log_keys(history.layer_names))
    log_charts(experiment, history, 20)
    run.finish()
    assert list(read_offline_run(run.dir).metrics) == [STEP, *log_keys(history.layer_names)]
    assert read_offline_run(run.dir).series(CHARTS[0])[0][0] == 20


@pytest.mark.parametrize(("mode", "rank"), [("disabled", 0), ("offline", 1)])
def test_nothing_is_drawn_for_nobody(loggers: Any, monkeypatch: pytest.MonkeyPatch, mode: str, rank: int) -> None:
    monkeypatch.setattr("pl_layer_rotation.report.figures.figures", lambda _: pytest.fail("drew a chart for nobody"))
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    run, history = loggers.WandbLogger(mode=mode).experiment, make_history(["conv", "fc"])
    prepare_run(run, history, log_keys(history.layer_names))
    log_charts(run, history, step=20)
    log_results(run, history)
    log_page(run, "no such page.html", step=20)
    assert viewing_hint(run) is None


@pytest.mark.parametrize("commands", [["sync"], ["sync", "leet"]])
def test_hint_of_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[str]) -> None:
    monkeypatch.setattr("pl_layer_rotation.report.wandb_sink.find_spec", lambda _: "leet" in commands)
    (tmp_path / "a blank").mkdir()
    with start_run(tmp_path / "a blank") as run:
        where, *hints = (viewing_hint(run) or "").splitlines()
    folder = where.partition(": ")[2]
    assert Path(folder, f"run-{run.id}.wandb").is_file()
    assert [shlex.split(hint.partition(": ")[2]) for hint in hints] == [["wandb", it, folder] for it in commands]


def test_hinted_commands_exist() -> None:
    assert "sync" in cli.commands
    assert ("leet" in cli.commands) == bool(find_spec("wandb.cli.leet"))


def test_hint_of_an_online_run_is_its_address() -> None:
    settings = wandb.Settings(mode="online", entity="us", project="p", run_id="7", base_url="http://localhost:1")
    assert viewing_hint(Run(settings)) == "W&B run: http://localhost:1/us/p/runs/7"


def test_hint_of_a_run_in_a_relative_folder_holds_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hint = viewing_hint(Run(wandb.Settings(mode="offline", run_id="7", root_dir=".")))
    assert f": {tmp_path / 'wandb' / 'offline-run-'}" in (hint or "")
