"""Which readings of a long history are kept."""

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pl_layer_rotation import RotationHistory


def history(readings: int, most: int) -> RotationHistory:
    made = RotationHistory(["fc"])
    made.keep_at_most(most)
    for step in range(1, readings + 1):
        made.append(step, rotation=[step / 1000])
    return made


@given(st.integers(1, 400), st.integers(2, 40))
def test_kept_readings_are_evenly_spaced_from_the_first_and_end_with_the_last(readings: int, most: int) -> None:
    kept = history(readings, most)
    every = kept.thinned_to
    evenly = list(range(1, readings + 1, every))
    assert kept.steps == (evenly if evenly[-1] == readings else [*evenly, readings])
    assert len(kept) <= most or most == 2
    assert kept.values("rotation")[:, 0].tolist() == [step / 1000 for step in kept.steps]
    # No coarser than it must be.
    assert every == 1 or len(range(1, readings + 1, every // 2)) > most - 1


@given(st.integers(1, 120), st.integers(0, 120), st.integers(2, 20))
def test_a_history_goes_on_from_its_state_as_if_nothing_had_happened(before: int, after: int, most: int) -> None:
    resumed = RotationHistory.from_state_dict(copy.deepcopy(history(before, most).state_dict()))
    for step in range(before + 1, before + after + 1):
        resumed.append(step, rotation=[step / 1000])
    assert resumed.state_dict() == history(before + after, most).state_dict()


@given(st.integers(2, 100), st.integers(2, 20), st.data())
def test_what_training_goes_back_behind_is_counted_again(readings: int, most: int, data: st.DataObject) -> None:
    gone = data.draw(st.integers(1, readings))
    again = history(readings, most)
    again.drop_from(gone)
    for step in range(gone, readings + 1):
        again.append(step, rotation=[step / 1000])
    assert again.steps[-1] == readings
    assert all(a < b for a, b in zip(again.steps, again.steps[1:], strict=False))
    assert len(again) <= max(most, 3)


def test_other_layers_are_thinned_on() -> None:
    first = history(20, 8)
    more = first.reindex(["fc", "new"], [(), ()])
    for kept in (first, more):
        columns = len(kept.layer_names)
        for step in range(21, 60):
            kept.append(step, rotation=[0.0] * columns)
    assert more.steps == first.steps


def test_a_bound_without_room_for_first_and_last_is_refused() -> None:
    with pytest.raises(ValueError, match="`readings` must be at least 2, for the first and the last, got 1"):
        RotationHistory(["fc"]).keep_at_most(1)


@pytest.mark.parametrize("bound", [2.5, float("nan"), 4.0, True, "4", None], ids=repr)
def test_the_bound_must_be_an_integer_and_a_wrong_one_changes_nothing(bound: Any) -> None:
    made = history(5, 10)
    with pytest.raises(TypeError, match=rf"^`readings` must be an integer of at least 2, got {bound!r}\. Round it\.$"):
        made.keep_at_most(bound)
    assert made.steps == history(5, 10).steps
    made.keep_at_most(np.int64(2))
    assert (made.steps, made.state_dict()["thinning"]["most"]) == ([1, 5], 2)
