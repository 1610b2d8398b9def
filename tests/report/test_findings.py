"""What findings say of healthy and of empty runs, in which order they come, and how they name layers."""

import pytest
from histories import NAN
from report.walks import codes, only, steady, stopping, walk

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.findings import NOTHING, finding_lines, findings

EVIL = "</b>\x1b[31m\nlayer" + "x" * 200


def test_a_healthy_run_has_no_finding_and_is_not_called_well_tuned() -> None:
    history = walk(steady(0.01, 0.02, 0.015))
    assert findings(history) == history.findings() == []
    assert finding_lines(history) == [NOTHING]
    assert NOTHING == "No finding. This does not mean that the run is well tuned."


@pytest.mark.parametrize("history", [RotationHistory([]), RotationHistory(["fc"])], ids=["no layers", "no readings"])
def test_nothing_is_said_of_nothing(history: RotationHistory) -> None:
    assert findings(history) == []
    assert finding_lines(history) == []


def test_a_history_without_rotation_says_nothing() -> None:
    history = RotationHistory(["a"])
    history.append(1, norm_ratio=[1.0])
    assert findings(history) == []


def test_order_is_by_urgency() -> None:
    early = stopping(0.3, 0.3, 0.1, 0.3, 0.3, 0.0)
    rows = [[theta * scale for theta, scale in zip(row, (0.02, 1, 1, 1, 9, 0), strict=True)] for row in early]
    rows[0] = [0.02, 0.6, 0.2, 0.2, 0.9, 0.0]
    history = walk(rows, [0.01, 0.02, 0.05, 0.1, 0.3, 0.0], [6.0] * 6)
    assert codes(history) == ["A", "H", "G", "C", "B", "I", "E", "F", "J"]


def test_angles_stand_for_the_steps_since_the_one_before() -> None:
    found = only(walk([[0.05, 0.1, NAN], [0.05, NAN, NAN], [0.05, 0.001, 0.005]], every=10))
    assert found.layers == ("fc3",)
    assert found.values == pytest.approx({"path": 0.15, "typical_path": (1.5 + 1.02) / 2, "ratio": 0.15 / 1.26})


@pytest.mark.parametrize("rotation", [[NAN, 0.1, 0.1], [0.0, 0.1, 0.1]])
def test_names_stay_on_one_line_and_short(rotation: list[float]) -> None:
    sentence = only(walk(steady(0.0, 0.01, 0.01), rotation, names=[EVIL, "b", "c"])).sentence
    assert sentence.isprintable()
    assert len(sentence) < 200
    assert sentence.startswith("`</b> [31m layer")


def test_many_layers_are_counted_not_listed() -> None:
    assert only(walk(steady(*[0.0] * 50), [0.0] * 50)).sentence.startswith("`fc1`, `fc2`, `fc3` and 47 more did not")


def test_one_reading_of_one_layer_is_enough_to_ask() -> None:
    assert findings(walk([[0.1]])) == []
    assert findings(walk([[NAN]])) == []


def test_a_finding_reads_as_its_sentence_and_goes_into_a_set() -> None:
    found = only(walk(steady(0.0), [0.0]))
    assert str(found) == found.sentence
    assert found in {found}
