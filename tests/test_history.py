"""RotationHistory in memory and in a checkpoint: readings, another list of layers, copies, the table for pandas."""

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import INF, NAN, assert_values, recorded

from pl_layer_rotation import RotationHistory

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


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("fc", "`layer_names` must be a list of names, got 'fc'. Pass [name, …]."),
        (2, "`layer_names` must be a list of names, got 2. Pass [name, …]."),
        (None, "`layer_names` must be a list of names, got None. Pass [name, …]."),
        (["a", 1], "`layer_names` must be text, got 1. Pass str(name) for each."),
        (b"fc", "`layer_names` must be text, got 102. Pass str(name) for each."),
    ],
    ids=repr,
)
def test_layer_names_must_be_several_texts(names: Any, text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        RotationHistory(names)
    assert RotationHistory(dict.fromkeys(["a", "b"]).keys()).layer_names == ["a", "b"]


def test_scalars_of_other_libraries_become_numbers_and_paths_text() -> None:
    facts = {
        "lr": np.float32(0.5),
        "betas": (torch.tensor(0.5), np.float64(0.25)),
        "net": {"depth": np.int64(3), "wide": np.bool_(True), "gain": torch.ones(1, 1, dtype=torch.bfloat16)},
        "data": [Path("a") / "b", np.array([7])],
    }
    plain = {
        "lr": 0.5,
        "betas": (0.5, 0.25),
        "net": {"depth": 3, "wide": True, "gain": 1.0},
        "data": [str(Path("a") / "b"), 7],
    }
    added_later = RotationHistory(["fc"])
    added_later.facts.update(facts)
    for history in (RotationHistory(["fc"], facts=facts), added_later):
        assert repr(history.state_dict()["facts"]) == repr(plain)
        assert history == RotationHistory(["fc"], facts=plain)
        with io.BytesIO() as file:
            torch.save(history.state_dict(), file)
            file.seek(0)
            assert torch.load(file, weights_only=True)["facts"] == plain


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


# --- as a table ---


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
