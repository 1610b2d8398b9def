import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb_server import WandbServer, wandb_server

from pl_layer_rotation._log_keys import log_keys
from pl_layer_rotation.report.wandb_sink import chart_keys, logged_key
from pl_layer_rotation.report.workspace import _library, entity_and_project, save_workspace, workspace_json

STATS = [f"layer_rotation_stats/{name}" for name in ("mean", "min", "max")]
STRAIGHTNESS = "layer_straightness_stats/median"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    with wandb_server(monkeypatch, tmp_path) as server:
        yield server


def sections_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    sections: list[dict[str, Any]] = spec["section"]["panelBankConfig"]["sections"]
    return sections


def panels_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    (section,) = sections_of(json.loads(text)["spec"])
    return [(panel["viewType"], panel["config"]) for panel in section["panels"]]


def test_panels_show_layers_aggregates_straightness_charts_and_runs_against_the_metric() -> None:
    kinds, configs = zip(*panels_of(workspace_json("us", "digits", metric="val_acc")), strict=True)
    lines = ("Run History Line Plot",) * 3
    assert kinds == (*lines, "Media Browser", "Scatter Plot", "Scatter Plot", "Run Comparer")
    assert all(config["xAxis"] == "trainer/global_step" for config in configs[:3])
    assert (configs[1]["metrics"], configs[2]["metrics"]) == (STATS, [STRAIGHTNESS])
    assert configs[3]["mediaKeys"] == chart_keys()
    axes = [(config["xAxis"], config["yAxis"]) for config in configs[4:6]]
    assert axes == [(f"summary:{STATS[0]}", "summary:val_acc"), (f"summary:{STRAIGHTNESS}", "summary:val_acc")]


@pytest.mark.parametrize("prefix", ["", "net", "a.b(1)+"])
def test_one_panel_matches_every_layer_and_nothing_else(prefix: str) -> None:
    _, config = panels_of(workspace_json("us", "digits", prefix=prefix))[0]
    layers = log_keys(["conv.1", "blocks.7.attn", "x" * 300])
    others = [*STATS, *chart_keys(), *log_keys(["fc"], "norm_ratio"), STRAIGHTNESS, "val_loss"]
    matched = [key for key in [*layers, *others] if re.search(config["metricRegex"], logged_key(key, prefix))]
    assert config["useMetricRegex"] is True
    assert matched == layers


def test_prefix_stands_before_every_key() -> None:
    text = workspace_json("us", "digits", prefix="net")
    assert set(re.findall(r'"(?:summary:)?([^"]*)layer_', text)) == {"net-", "^net-"}


def test_text_is_the_same_every_time_and_the_library_reads_it_back() -> None:
    text = workspace_json("us", "digits")
    workspaces, _ = _library()
    view = workspaces.internal.View.model_validate_json(text)
    read = workspaces.Workspace._from_model(view)
    assert json.loads(read._to_model().model_dump_json(by_alias=True, exclude_none=True)) == json.loads(text)
    assert workspace_json("us", "digits") == text
    assert (read.entity, read.project, read.name, read.auto_generate_panels) == ("us", "digits", "Layer rotation", True)
    assert [type(panel).__name__ for panel in read.sections[0].panels] == [
        *("LinePlot", "LinePlot", "LinePlot", "MediaBrowser", "ScatterPlot", "ScatterPlot", "RunComparer")
    ]


def test_saved_is_what_was_shown(server: WandbServer) -> None:
    assert save_workspace("us", "digits") == f"{server.url}/us/digits?nw=layerrotation"
    (view,) = server.views.values()
    shown = json.loads(workspace_json("us", "digits"))
    assert json.loads(view["spec"]) == shown["spec"]
    assert (view["name"], view["displayName"]) == (shown["name"], shown["displayName"])


def test_saving_again_makes_no_second_view_and_leaves_what_users_added(server: WandbServer) -> None:
    save_workspace("us", "digits", metric="val_loss")
    (view,) = server.views.values()
    spec = json.loads(view["spec"])
    theirs = {**sections_of(spec)[0], "name": "Theirs", "panels": []}
    sections_of(spec).append(theirs)
    spec["section"]["settings"]["smoothingWeight"] = 5
    view["spec"] = json.dumps(spec)
    address = save_workspace("us", "digits", metric="val_acc")
    (view,) = server.views.values()
    saved = json.loads(view["spec"])
    assert address.endswith("?nw=layerrotation")
    assert [section["name"] for section in sections_of(saved)] == ["Layer rotation", "Theirs"]
    assert saved["section"]["settings"]["smoothingWeight"] == 5
    assert "summary:val_acc" in view["spec"]
    assert "summary:val_loss" not in view["spec"]


def test_project_that_is_not_there_is_named(server: WandbServer) -> None:
    server.projects = {"digits"}
    with pytest.raises(ValueError, match=r"Project `us/digit` not found"):
        save_workspace("us", "digit")
    assert server.views == {}


def test_machine_without_a_key_is_told_what_to_do(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", "/no such file")
    wandb.teardown()
    with pytest.raises(ValueError, match=r"`WANDB_API_KEY` must be set to save a workspace, got none .* `wandb login`"):
        save_workspace("us", "digits")


@pytest.mark.parametrize("text", ["digits", "us/", "/digits", "us/digits/runs", "us/a b", "https://wandb.ai/us/p", ""])
def test_target_that_is_no_entity_and_project(text: str) -> None:
    with pytest.raises(ValueError, match=rf"`ENTITY/PROJECT` must be .*, got {re.escape(repr(text))}\. Take both from"):
        entity_and_project(text)


@pytest.mark.parametrize(("entity", "project"), [("us/them", "digits"), ("us", "digits?x"), ("", "digits")])
@pytest.mark.parametrize("function", [workspace_json, save_workspace])
def test_names_that_wandb_refuses(function: Any, entity: str, project: str) -> None:
    with pytest.raises(ValueError, match="`ENTITY/PROJECT` must be a W&B user or team"):
        function(entity, project)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs wandb-workspaces\. Run `pip install 'pl-layer-rotation\[wo"):
        workspace_json("us", "digits")
