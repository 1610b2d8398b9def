"""RotationHistory: what goes in comes out, in memory, in a checkpoint and in a file."""

import copy
import io
import json
import math
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_layer_rotation import RotationHistory
from pl_layer_rotation._log_keys import log_keys
from pl_layer_rotation._text_file import write_text

NAN, INF = math.nan, math.inf
HOSTILE = [
    *("a/b", "a b", "a[0]", "x:y", '"quoted"', "<b>", "</script>", "é", "层", "__proto__", "n" * 300, "{{x}}"),
    *("back\\slash", "new\nline", "tab\t", "zero\x00", "\x1c", "", "step"),
]
quick = settings(deadline=None, max_examples=50, derandomize=True)


def recorded() -> RotationHistory:
    history = RotationHistory(["stem", "head"], [(8, 1, 3, 3), (10, 8)], {"lr": 0.1, "optimizer": "Layca(SGD)"})
    history.append(1, rotation=[0.0, 1e-12], norm_ratio=[1.0, INF])
    history.append(5, rotation=[0.25, NAN], angular_update=[0.1, -INF])
    history.append(70, rotation=[2.0, NAN])
    return history


def reloaded(history: RotationHistory, folder: Path) -> RotationHistory:
    history.save(folder / "run.jsonl")
    return RotationHistory.load(folder / "run.jsonl")


def assert_values(history: RotationHistory, quantity: str, expected: list[list[float]]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(history.values(quantity), wanted, rtol=0, atol=0, equal_nan=True)


# --- recording ---


def test_values_are_steps_by_layers_with_nan_where_nothing_was_measured() -> None:
    history = recorded()
    assert (history.steps, len(history)) == ([1, 5, 70], 3)
    assert history.quantities == ["rotation", "norm_ratio", "angular_update"]
    assert_values(history, "rotation", [[0.0, 1e-12], [0.25, NAN], [2.0, NAN]])
    assert_values(history, "norm_ratio", [[1.0, INF], [NAN, NAN], [NAN, NAN]])
    assert_values(history, "angular_update", [[NAN, NAN], [0.1, -INF], [NAN, NAN]])


def test_a_new_history_has_layers_and_no_readings() -> None:
    history = RotationHistory(["stem", "head"])
    assert (len(history), history.steps, history.quantities, history.facts) == (0, [], [], {})
    assert history.layer_shapes == [(), ()]
    assert history.values("rotation").shape == (0, 2)
    assert all(math.isnan(value) for value in history.final().values())


def test_final_is_each_layers_last_defined_value() -> None:
    assert recorded().final() == {"stem": 2.0, "head": 1e-12}
    assert recorded().final("angular_update") == {"stem": 0.1, "head": -INF}
    assert math.isnan(recorded().final("speed")["head"])


def test_repr_says_how_much_there_is() -> None:
    assert repr(recorded()) == "RotationHistory(2 layers, 3 readings)"


def test_tensors_and_numbers_of_other_types_become_floats() -> None:
    history = RotationHistory(["stem", "head"], [torch.Size([2, 3]), (4,)])
    history.append(torch.tensor(3), rotation=torch.tensor([0.5, 1], dtype=torch.float32), norm_ratio=(1, True))
    assert history.state_dict()["rows"] == [{"step": 3, "rotation": [0.5, 1.0], "norm_ratio": [1.0, 1.0]}]
    assert history.layer_shapes == [(2, 3), (4,)]


def test_arguments_are_copied() -> None:
    names, shapes, facts, values = ["stem"], [[2, 3]], {"lr": 0.1}, [0.5]
    history = RotationHistory(names, shapes, facts)
    history.append(1, rotation=values)
    for argument in (names, shapes, facts, values):
        argument.clear()
    assert (history.layer_names, history.layer_shapes, history.facts) == (["stem"], [(2, 3)], {"lr": 0.1})
    assert_values(history, "rotation", [[0.5]])


@pytest.mark.parametrize("step", [70, 69, 0, -1])
def test_steps_must_grow(step: int) -> None:
    text = f"`step` must be larger than that of the last reading (70), got {step}."
    with pytest.raises(ValueError, match=re.escape(text)):
        recorded().append(step, rotation=[0.0, 0.0])


@pytest.mark.parametrize("values", [[], [0.1], [0.1, 0.2, 0.3]], ids=["none", "too few", "too many"])
def test_a_reading_needs_one_value_for_each_layer_and_is_added_whole_or_not_at_all(values: list[float]) -> None:
    history = recorded()
    text = f"`norm_ratio` must have one value for each of the 2 layers, got {len(values)}."
    with pytest.raises(ValueError, match=re.escape(text)):
        history.append(71, rotation=[0.0, 0.0], norm_ratio=values)
    assert history == recorded()


def test_layer_names_must_be_unique() -> None:
    text = "`layer_names` must be unique, got ['a', 'c'] more than once. Rename these layers."
    with pytest.raises(ValueError, match=re.escape(text)):
        RotationHistory(["a", "b", "a", "c", "c", "c"])


@pytest.mark.parametrize("shapes", [[], [(2, 2)] * 3], ids=["none", "too many"])
def test_each_layer_needs_a_shape(shapes: list[tuple[int, int]]) -> None:
    text = (
        f"`layer_shapes` must have one shape for each of the 2 layers, got {len(shapes)}. "
        "Pass `()` where a shape is unknown."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        RotationHistory(["a", "b"], shapes)


def test_an_unknown_quantity_is_an_error_that_lists_the_known_ones() -> None:
    text = "`quantity` must be one of ['rotation', 'norm_ratio', 'angular_update'], got 'rotations'."
    with pytest.raises(ValueError, match=re.escape(text)):
        recorded().values("rotations")


def test_figure_shows_one_curve_for_each_layer() -> None:
    figure = recorded().figure("rotation")
    curves = [trace for trace in figure.data if trace.x is not None and len(trace.x) == 3]
    assert [trace.y[0] for trace in curves] == [0.0, 1e-12]
    assert all(list(trace.x) == [1, 5, 70] for trace in curves)


# --- another list of layers ---


def test_reindex_moves_columns_and_fills_new_layers_with_nan() -> None:
    new = recorded().reindex(["new", "head", "stem"], [(1, 1), (10, 8), (8, 1, 3, 3)])
    assert (new.layer_names, new.layer_shapes[0], new.steps) == (["new", "head", "stem"], (1, 1), [1, 5, 70])
    assert_values(new, "rotation", [[NAN, 1e-12, 0.0], [NAN, NAN, 0.25], [NAN, NAN, 2.0]])
    assert_values(new, "norm_ratio", [[NAN, INF, 1.0], [NAN] * 3, [NAN] * 3])
    assert new.facts == recorded().facts


def test_reindex_leaves_vanished_layers_out_and_the_original_alone() -> None:
    history = recorded()
    assert_values(history.reindex(["head"], [(10, 8)]), "rotation", [[1e-12], [NAN], [NAN]])
    assert len(history.reindex([], [])) == 3
    assert history == recorded()


def test_reindex_to_the_same_layers_changes_nothing() -> None:
    history = recorded()
    assert history.reindex(history.layer_names, history.layer_shapes) == history


# --- equality and copies ---


CHANGES: dict[str, Callable[[RotationHistory], object]] = {
    "a value": lambda history: history._rows[0]["rotation"].__setitem__(0, 0.5),
    "another step": lambda history: history.append(71, rotation=[0.0, 0.0]),
    "a fact": lambda history: history.facts.update(lr=0.2),
    "a name": lambda history: history.layer_names.__setitem__(0, "other"),
    "a shape": lambda history: history.layer_shapes.__setitem__(0, ()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_histories_that_differ_are_unequal(change: Callable[[RotationHistory], object]) -> None:
    history = recorded()
    assert history == recorded()
    change(history)
    assert history != recorded()


def test_a_history_equals_nothing_else_and_has_no_hash() -> None:
    assert recorded() != recorded().state_dict()
    with pytest.raises(TypeError, match="unhashable type: 'RotationHistory'"):
        hash(recorded())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda history: pickle.loads(pickle.dumps(history)),
        lambda history: RotationHistory.from_state_dict(history.state_dict()),
    ],
    ids=["deepcopy", "pickle", "state dict"],
)
def test_copies_are_equal_and_independent(copied: Callable[[RotationHistory], RotationHistory]) -> None:
    history = recorded()
    other = copied(history)
    assert other == history
    other.append(71, rotation=[0.0, 0.0])
    other.facts["lr"] = 0.2
    assert history == recorded()


def test_the_state_dict_travels_in_a_checkpoint_that_loads_weights_only() -> None:
    file = io.BytesIO()
    torch.save({"callbacks": recorded().state_dict()}, file)
    file.seek(0)
    history = RotationHistory.from_state_dict(torch.load(file, weights_only=True)["callbacks"])
    assert history == recorded()
    assert_values(history, "norm_ratio", [[1.0, INF], [NAN, NAN], [NAN, NAN]])


def test_a_state_dict_does_not_change_when_the_run_goes_on() -> None:
    history = recorded()
    state = history.state_dict()
    before = repr(state)
    history.append(71, rotation=[0.0, 0.0])
    history.facts["lr"] = 0.2
    assert repr(state) == before


# --- files ---


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


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
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
    with pytest.raises(ValueError, match=re.escape(text) + r".*\. Pass another file\.$"):
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


def test_the_table_for_pandas_is_tidy() -> None:
    history = RotationHistory(["a", "b"])
    history.append(1, rotation=[0.1, math.nan])
    history.append(2, rotation=[0.2, 0.3], norm_ratio=[1.0, 1.1])
    frame = history.to_pandas()
    assert list(frame.columns) == ["step", "layer", "depth", "quantity", "value"]
    assert frame.to_numpy().tolist() == [
        [1, "a", 0, "rotation", 0.1],
        [2, "a", 0, "rotation", 0.2],
        [2, "b", 1, "rotation", 0.3],
        [2, "a", 0, "norm_ratio", 1.0],
        [2, "b", 1, "norm_ratio", 1.1],
    ]
    assert RotationHistory(["a"]).to_pandas().empty


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


def test_text_that_cannot_be_encoded_leaves_the_old_file_whole_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "old")
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        write_text(tmp_path / "page.html", "new \ud800")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "old"


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


def test_text_is_written_as_utf8_with_unix_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "é\n层\n")
    assert (tmp_path / "page.html").read_bytes() == "é\n层\n".encode()


# --- logged keys ---


def test_keys_hold_depth_and_a_plain_form_of_the_name() -> None:
    assert log_keys(["stem.conv", "a/b [0]", "é", ""], "norm_ratio") == [
        "layer_norm_ratio/000_stem_conv",
        "layer_norm_ratio/001_a_b_0_",
        "layer_norm_ratio/002__",
        "layer_norm_ratio/003_",
    ]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_keys_of_hostile_names_are_short_plain_and_unique(name: str) -> None:
    keys = log_keys([name, f"{name}!", f"{name}?", f"?{name}"])
    assert len(set(keys)) == 4
    assert all(re.fullmatch(r"layer_rotation/\d{3}_[0-9A-Za-z_]{0,100}", key) for key in keys)


@pytest.mark.parametrize(
    ("count", "last"),
    [(1, "000"), (1000, "999"), (1001, "1000"), (12_345, "12344")],
    ids="{} layers".format,
)
def test_alphabetical_order_of_keys_is_depth_order(count: int, last: str) -> None:
    keys = log_keys(["same"] * count)
    assert keys == sorted(keys)
    assert keys[-1] == f"layer_rotation/{last}_same"
    assert len(set(keys)) == count


def test_no_layers_have_no_keys() -> None:
    assert log_keys([]) == []
