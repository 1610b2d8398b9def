"""A history's file: what is saved comes back, damaged files are refused, and a failed save leaves the old one."""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import HOSTILE_NAMES, INF, NAN, assert_values, recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_layer_rotation import RotationHistory

quick = settings(deadline=None, max_examples=50, derandomize=True)


def reloaded(history: RotationHistory, folder: Path) -> RotationHistory:
    history.save(folder / "run.jsonl")
    return RotationHistory.load(folder / "run.jsonl")


@pytest.mark.parametrize("convert", [str, Path], ids=["str", "Path"])
def test_a_file_holds_the_whole_history(convert: Callable[[Path], str | Path], tmp_path: Path) -> None:
    file = convert(tmp_path / "run.jsonl")
    recorded().save(file)
    history = RotationHistory.load(file)
    assert history == recorded()
    assert (history.layer_shapes, history.facts) == (recorded().layer_shapes, recorded().facts)
    assert_values(history, "rotation", [[0.0, 1e-12], [0.25, NAN], [2.0, NAN]])
    assert_values(history, "norm_ratio", [[1.0, INF], [NAN, NAN], [NAN, NAN]])
    assert_values(history, "angular_update", [[NAN, NAN], [0.1, -INF], [NAN, NAN]])


@quick
@given(st.lists(st.lists(st.floats(), min_size=3, max_size=3), max_size=5))
def test_every_float_survives_a_file_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]]
) -> None:
    history = RotationHistory(["a", "b", "c"])
    for step, row in enumerate(rows):
        history.append(step, rotation=row)
    found = reloaded(history, tmp_path_factory.mktemp("run"))
    assert [list(map(repr, row)) for row in found.values("rotation").tolist()] == [list(map(repr, row)) for row in rows]


def test_each_line_is_strict_json_that_other_tools_read(tmp_path: Path) -> None:
    recorded().save(tmp_path / "run.jsonl")
    content = (tmp_path / "run.jsonl").read_bytes()
    header, *rows = [json.loads(line, parse_constant=pytest.fail) for line in content.splitlines()]
    assert (header["format"], header["version"]) == ("pl-layer-rotation history", 1)
    assert header["layers"] == [{"name": "stem", "shape": [8, 1, 3, 3]}, {"name": "head", "shape": [10, 8]}]
    assert rows[1] == {"step": 5, "rotation": [0.25, None], "angular_update": [0.1, "-inf"]}
    assert content.endswith(b"\n")
    assert b"\r" not in content


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:20])
def test_hostile_names_survive_a_file(name: str, tmp_path: Path) -> None:
    history = RotationHistory([name, "other"], facts={"module": name, name: "value"})
    history.append(1, rotation=[0.5, 0.25])
    found = reloaded(history, tmp_path)
    assert (found.layer_names, found.facts) == ([name, "other"], {"module": name, name: "value"})
    assert found.final() == {name: 0.5, "other": 0.25}


@pytest.mark.parametrize("name", ["a\u2028b", "a\u2029b", "a\x85b", "nan"], ids=ascii)
def test_names_with_unicode_line_ends_survive_a_file(name: str, tmp_path: Path) -> None:
    history = RotationHistory([name])
    history.append(1, rotation=[0.5])
    assert reloaded(history, tmp_path).final() == {name: 0.5}


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
def test_facts_that_are_not_finite_survive_a_file(value: float, tmp_path: Path) -> None:
    history = RotationHistory(["head"], facts={"metrics": {"val_loss": value}})
    assert repr(reloaded(history, tmp_path).facts) == repr(history.facts)


def test_scalars_and_paths_among_the_facts_are_saved_as_numbers_and_text(tmp_path: Path) -> None:
    history = RotationHistory(["head"], facts={"lr": np.float32(0.5)})
    history.facts |= {"seed": torch.tensor(7), "data": Path("sets")}
    found = reloaded(history, tmp_path)
    assert repr(found.facts) == "{'lr': 0.5, 'seed': 7, 'data': 'sets'}"
    assert found == history


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"tags": {"a"}}, "set in 'tags'"),
        ({"net": {"sizes": [1, np.arange(2)]}}, "ndarray in 'net.sizes'"),
        ({"w": torch.ones(2)}, "Tensor in 'w'"),
        ({"z": np.complex64(1)}, "complex in 'z'"),
        ({"net": {("a", "b"): 1}}, "a key of type tuple in 'net'"),
        ({"model": RotationHistory([])}, "RotationHistory in 'model'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fact_that_no_file_can_hold_is_named_and_the_old_file_stays(
    facts: dict[str, Any], what: str, tmp_path: Path
) -> None:
    history = RotationHistory(["head"])
    history.save(tmp_path / "run.jsonl")
    history.facts |= facts
    text = f"`facts` must hold numbers, text, None, lists and mappings, got {what}. Convert it, or leave it out."
    for use in (lambda: history.save(tmp_path / "run.jsonl"), lambda: history == RotationHistory(["head"])):
        with pytest.raises(ValueError, match=re.escape(text)):
            use()
    assert RotationHistory.load(tmp_path / "run.jsonl").facts == {}
    assert list(history.state_dict()["facts"]) == list(facts)  # a checkpoint is still written


def test_a_history_without_layers_or_readings_survives_a_file(tmp_path: Path) -> None:
    found = reloaded(RotationHistory([]), tmp_path)
    assert (found.layer_names, found.steps, found.values("rotation").shape) == ([], [], (0, 0))


def test_missing_folders_are_made(tmp_path: Path) -> None:
    recorded().save(tmp_path / "new" / "folder" / "run.jsonl")
    assert RotationHistory.load(tmp_path / "new" / "folder" / "run.jsonl") == recorded()


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    RotationHistory(["other"]).save(tmp_path / "run.jsonl")
    assert reloaded(recorded(), tmp_path) == recorded()
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_missing_file_is_the_usual_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("No such file or directory")):
        RotationHistory.load(tmp_path / "none.jsonl")


def edited(old: str, new: str) -> Callable[[str], bytes]:
    def edit(text: str) -> bytes:
        assert old in text
        return text.replace(old, new).encode()

    return edit


BROKEN: dict[str, tuple[Callable[[str], bytes], str]] = {
    "empty": (lambda text: b"", "it has no header of ours"),
    "binary": (lambda text: b"\x80\x04\x95\xff", "it has no header of ours"),
    "text": (lambda text: b"step,rotation\n1,0.5\n", "it has no header of ours"),
    "other json lines": (lambda text: b'{"step": 1, "loss": 0.5}\n', "it has no header of ours"),
    "a json list": (lambda text: b"[1, 2]\n", "it has no header of ours"),
    "header cut": (lambda text: text[:60].encode(), "it has no header of ours"),
    "header lost": (lambda text: text.split("\n", 1)[1].encode(), "it has no header of ours"),
    "no version": (edited('"version":1,', ""), "it has no header of ours"),
    "another format": (edited("pl-layer-rotation history", "trace"), "its format is 'trace'"),
    "no layers": (edited('"layers"', '"units"'), "it is damaged: 'layers'"),
    "too many values": (
        edited("[0.25,null]", "[0.25,null,1]"),
        "it is damaged: `rotation` must have one value for each of the 2 layers, got 3.",
    ),
    "steps out of order": (
        edited('"step":70', '"step":2'),
        "it is damaged: `step` must be larger than that of the last reading (5), got 2.",
    ),
    "a name twice": (edited('"stem"', '"head"'), "it is damaged: `layer_names` must be unique, got ['head']"),
    "no step": (edited('"step":70', '"time":70'), "it is damaged: "),
    "a reading that is no list": (edited("[2.0,null]", "null"), "it is damaged: "),
}


@pytest.mark.parametrize(("breakage", "why"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_not_ours_or_damaged_is_an_error(
    breakage: Callable[[str], bytes], why: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.jsonl"
    recorded().save(file)
    file.write_bytes(breakage(file.read_text(encoding="utf-8")))
    text = f"`path` must be a file written by `RotationHistory.save`, got {file}, but {why}"
    with pytest.raises(
        ValueError, match=re.escape(text) + r".*\. Pass the `layer_rotation\.jsonl` in the folder of the logs\.$"
    ):
        RotationHistory.load(file)


@pytest.mark.parametrize("missing", [1, 5, 12])
def test_a_reading_that_was_cut_while_it_was_written_is_left_out(missing: int, tmp_path: Path) -> None:
    history, file = recorded(), tmp_path / "run.jsonl"
    history.save(file)
    file.write_bytes(file.read_bytes()[:-missing])
    with pytest.warns(UserWarning, match=re.escape(f"The last reading in {file} was cut")):
        loaded = RotationHistory.load(file)
    history.drop_from(history.steps[-1])
    assert loaded == history


def test_a_file_cut_within_its_header_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    recorded().save(file)
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"must be a file written by `RotationHistory\.save`"):
        RotationHistory.load(file)


def test_readings_added_one_by_one_make_the_same_file(tmp_path: Path) -> None:
    history = RotationHistory(["a", "é\u2028b"])
    history.append(1, rotation=[0.1, math.nan])
    history.save(tmp_path / "grown.jsonl")
    for step in range(2, 5):
        history.append(step, rotation=[0.1 * step, math.inf])
        history.save_last_row(tmp_path / "grown.jsonl")
    history.save(tmp_path / "whole.jsonl")
    assert (tmp_path / "grown.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_reading_cannot_be_added_to_a_file_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    text = f"`path` must be a file that `save` wrote, got {file}, which does not exist. Call `save` first."
    with pytest.raises(FileNotFoundError, match=re.escape(text)):
        recorded().save_last_row(file)
    assert not file.exists()


def test_a_file_holds_the_kept_readings_and_no_bound(tmp_path: Path) -> None:
    history = RotationHistory(["fc"])
    history.keep_at_most(4)
    for step in range(10, 100, 10):
        history.append(step, rotation=[step / 1000])
    found = reloaded(history, tmp_path)
    assert (history.readings, history.thinned_to) == (9, 4)
    assert (found.steps, found.readings, found.thinned_to) == ([10, 50, 90], 3, 1)


def test_a_file_of_a_newer_version_asks_for_an_upgrade(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    recorded().save(file)
    file.write_bytes(edited('"version":1', '"version":2')(file.read_text(encoding="utf-8")))
    text = f"`path` must be a history of format version 1 or older, got version 2 in {file}. Upgrade pl-layer-rotation."
    with pytest.raises(ValueError, match=re.escape(text)):
        RotationHistory.load(file)


@pytest.mark.parametrize("name", ["replace", "chmod"])
def test_a_failure_while_saving_leaves_the_old_file_whole_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    recorded().save(tmp_path / "run.jsonl")
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="No space left on device"):
        RotationHistory(["other"]).save(tmp_path / "run.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]
    assert RotationHistory.load(tmp_path / "run.jsonl") == recorded()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask for files")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_a_saved_file_has_the_permissions_of_any_other_new_file(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        recorded().save(tmp_path / "run.jsonl")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "run.jsonl").stat().st_mode & 0o777 == mode
