"""The sentences of a page, on histories whose numbers are known."""

import math
from typing import Any

import pytest

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.sentences import captions, headline, notes


def walked(straightness: float, readings: int = 40, rotations: list[float] | None = None) -> RotationHistory:
    """Layers whose recorded straightness is this at each reading; momentum 0."""
    last = rotations or [0.1, 0.2, 0.3]
    layers = len(last)
    history = RotationHistory(
        [f"layer{i}" for i in range(layers)], facts={"momentum": 0.0, "total_steps": 10 * readings}
    )
    for i in range(1, readings + 1):
        history.append(
            10 * i,
            rotation=[value * i / readings for value in last],
            angular_update=[0.01] * layers,
            straightness=[straightness] * layers,
            path_square=[0.02 * i] * layers,
        )
    return history


@pytest.mark.parametrize(
    ("history", "said"),
    [
        (walked(1.0), "Straightness 1.00, where 1 is a random walk: no sign that the learning rate is too low."),
        (walked(1.7), "Straightness 1.70, where 1 is a random walk: no sign that the learning rate is too low."),
        (walked(1.8), "Straightness 1.80, where 1 is a random walk: the learning rate is probably too low."),
        (walked(1.8, rotations=[0.1, 0.2, 0.0]), "Straightness 1.80, where 1 is a random walk."),
    ],
    ids=["tuned", "at the threshold", "straight", "straight, and a layer is still"],
)
def test_straightness_is_read_as_the_findings_read_it(history: RotationHistory, said: str) -> None:
    assert headline(history).endswith(said)


def test_straightness_of_too_few_readings_is_not_read() -> None:
    assert "Straightness" not in headline(walked(2.0, readings=29))
    assert "Straightness" in headline(walked(2.0, readings=30))


def test_undefined_layers_are_counted() -> None:
    history = RotationHistory(["a", "b", "c"])
    history.append(10, rotation=[0.1, 0.3, math.nan])
    assert "mean rotation 0.200 over 2 of 3 layers; `a` turned least (0.100), `b` most (0.300)." in headline(history)


def history_of(*rows: list[float], **facts: Any) -> RotationHistory:
    history = RotationHistory([f"layer{i}" for i in range(len(rows[0]))], facts=facts)
    for i, row in enumerate(rows):
        history.append(10 * (i + 1), rotation=row)
    return history


def test_layers_that_went_undefined_are_named_with_the_step() -> None:
    history = history_of([0.1, 0.2, math.nan], [0.3, math.nan, math.nan], [0.4, math.nan, math.nan])
    assert notes(history) == [
        "`layer1` has no defined rotation since step 20; shown is the last defined value, if any.",
        "`layer2` has no defined rotation at any reading; shown is the last defined value, if any.",
    ]
    assert notes(history_of([0.1, math.nan], [0.3, 0.4])) == []


def test_many_undefined_layers_are_counted() -> None:
    history = history_of([0.1] * 7, [0.2, *[math.nan] * 6])
    assert len(notes(history)) == 3
    assert notes(history)[2] == "4 more layers have no defined rotation at the end."


def test_a_reference_from_a_later_step_is_said() -> None:
    starts = {"layer0": 0, "layer1": 10, "layer2": 20, "layer3": 20}
    history = history_of([0.1] * 4, [0.2] * 4, [0.3] * 4, reference_steps=starts)
    assert notes(history) == ["`layer2` and `layer3`: measured from the weights at step 20, not initialization."]


def test_the_caption_of_the_rotation_has_its_walk_and_its_half_time() -> None:
    # 1 - exp(-0.8 / 2) for the sum of squares 0.02 · 40.
    assert captions(walked(1.0))["rotation"] == (
        "Cosine distance from initialization. At the end: `layer0` least (0.100), `layer2` most (0.300), median 0.200. "
        "Half of the mean was reached by step 200. Dotted: a random walk with the same steps, 0.330 at its end."
    )


def test_the_caption_of_the_angles_has_the_largest_and_what_was_asked_for() -> None:
    history = RotationHistory(["a", "b"])
    history.append(10, rotation=[0.1, 0.2], angular_update=[0.01, 0.02], peak=[0.5, 0.03], peak_step=[3, 9])
    told = captions(history)["angular_update"]
    assert told.endswith("median 0.0150. Largest: 0.500 by `a` at step 3.")
    history.append(20, rotation=[0.1, 0.2], requested_angle=[0.01, 0.01])
    assert captions(history)["angular_update"].endswith("Dotted: the angle that the learning rate asks for.")


def test_bars_and_cells_are_described() -> None:
    told = captions(history_of([0.9] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert told["final_rotation"].endswith(
        "Mean of the first third of the layers 0.150, of the second 0.350, of the last 0.550."
    )
    assert told["heatmap"] == "One row a layer, the first on top; brighter is further, up to 0.900."


def test_only_charts_with_values_have_a_caption() -> None:
    assert list(captions(history_of([math.nan]))) == []
    assert list(captions(history_of([0.1]))) == ["rotation", "final_rotation", "heatmap"]
