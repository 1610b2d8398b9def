"""What a notebook shows of a history."""

import math

import pytest
from histories import HOSTILE, PageReader, history_of

from pl_layer_rotation import RotationHistory


def curves_of(history: RotationHistory) -> list[str | None]:
    return [a["points"] for tag, a in PageReader(history._repr_html_()).tags if tag == "polyline"]


def test_layers_have_shape_rotation_and_a_curve() -> None:
    history = history_of([0.2, 0.0], [0.25, 0.5], names=["conv", "fc"])
    page = PageReader(history._repr_html_())
    assert page.rows[1:] == [["0", "conv", "8 \u00d7 3", "0.250", ""], ["1", "fc", "8 \u00d7 3", "0.500", ""]]
    assert "Layer rotation of 2 layers after 20 steps; all curves go from 0 to 0.500." in page.text
    assert "No finding. This does not mean that the run is well tuned." in page.text
    assert curves_of(history) == ["60.0,10.6 120.0,9.0", "60.0,17.0 120.0,1.0"]


def test_undefined_values_part_a_curve() -> None:
    assert curves_of(history_of([1.0], [math.nan], [0.5], [math.inf])) == ["30.0,1.0", "90.0,9.0"]


def test_of_many_layers_the_first_and_last_are_shown_and_it_stays_small() -> None:
    names = [f"transformer.encoder.blocks.{i:04}.attn.proj" for i in range(1000)]
    history = history_of(*([i / 500 + layer / 1e4 for layer in range(1000)] for i in range(500)), names=names)
    page = history._repr_html_()
    shown = [row[0] for row in PageReader(page).rows[1:]]
    assert shown == [*map(str, range(20)), "\u2026 960 more layers", *map(str, range(980, 1000))]
    assert {curve.count(",") for curve in curves_of(history)} == {60}
    assert len(page.encode()) < 60_000


@pytest.mark.parametrize("history", [RotationHistory([]), RotationHistory(["fc"])], ids=["no layers", "no readings"])
def test_nothing_recorded_is_said(history: RotationHistory) -> None:
    assert "no reading yet" in history._repr_html_()


def test_names_do_nothing() -> None:
    page = PageReader(history_of([0.5], names=[HOSTILE])._repr_html_())
    assert not {"img", "script"} & {tag for tag, _ in page.tags}
    assert page.rows[1][1] == HOSTILE
