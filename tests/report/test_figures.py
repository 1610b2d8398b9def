"""What the figures draw, read from their traces."""

import json
import math

import pytest

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.figures import curves, depth_colors, figures, final_rotation, heatmap


def history_of(*rows: list[float], names: list[str] | None = None) -> RotationHistory:
    names = names or [f"layer{i}" for i in range(len(rows[0]))]
    history = RotationHistory(names, [(i + 2, 3) for i in range(len(names))])
    for i, row in enumerate(rows):
        history.append(10 * (i + 1), rotation=row)
    return history


def luminance(color: str) -> float:
    channels = [int(c) / 255 for c in color[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_one_line_a_layer_in_depth_order() -> None:
    lines = curves(history_of([0.1, 0.2], [0.3, 0.5])).data
    assert [(line.name, line.x, line.y) for line in lines] == [
        ("layer0", (10, 20), (0.1, 0.3)),
        ("layer1", (10, 20), (0.2, 0.5)),
    ]


@pytest.mark.parametrize("undefined", [math.nan, math.inf])
def test_undefined_values_are_gaps(undefined: float) -> None:
    history = history_of([0.1], [undefined], [0.3])
    assert curves(history).data[0].y == (0.1, None, 0.3)
    assert heatmap(history).data[0].z == ([0.1, None, 0.3],)


def test_a_quantity_read_at_fewer_steps_has_no_gaps() -> None:
    history = RotationHistory(["fc"])
    history.append(1, rotation=[0.1], norm_ratio=[1.0])
    history.append(2, rotation=[0.2])
    history.append(3, rotation=[0.3], norm_ratio=[1.2])
    line = curves(history, "norm_ratio").data[0]
    assert (line.x, line.y) == ((1, 3), (1.0, 1.2))


@pytest.mark.parametrize(
    ("quantity", "title", "rangemode"),
    [
        ("rotation", "cosine distance from initialization", "tozero"),
        ("angular_update", "angle turned by one optimizer step (radians)", "tozero"),
        ("norm_ratio", "norm of the weights / norm of the reference (ratio)", "normal"),
        ("straightness", "angle from the start / that of a random walk (ratio)", "tozero"),
        ("my_quantity", "my quantity", "normal"),
    ],
)
def test_axes_say_what_they_show(quantity: str, title: str, rangemode: str) -> None:
    history = RotationHistory(["fc"])
    history.append(1, **{quantity: [0.1]})
    layout = curves(history, quantity).layout
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("optimizer steps", title)
    assert layout.yaxis.rangemode == rangemode


@pytest.mark.parametrize("draw", [curves, heatmap])
def test_unknown_quantity_is_refused(draw: object) -> None:
    known = r"\['rotation', 'angular_update', 'norm_ratio', 'straightness'\]"
    match = rf"`quantity` must be one of {known}, got 'speed'\. Pass one that was recorded\."
    with pytest.raises(ValueError, match=match):
        draw(history_of([0.1]), "speed")  # type: ignore[operator]


def test_hover_names_layer_depth_shape_step_and_value() -> None:
    assert curves(history_of([0.1, 0.2])).data[1].hovertemplate == (
        "<b>layer1</b><br>depth 1, shape 3 \u00d7 3<br>step %{x:,}<br>cosine distance %{y:.3g}<extra></extra>"
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<b>x</b>", "&lt;b&gt;x&lt;/b&gt;"),
        ("a&amp;b", "a&amp;amp;b"),
        ("%{y}", "%&#123;y}"),
        ("$x$", "&#36;x&#36;"),
        ("two\nlines", "two lines"),
        ("left\u202eright", "left right"),
        ("層 'é\"", "層 'é\""),
    ],
)
def test_names_are_shown_as_they_are(name: str, shown: str) -> None:
    history = history_of([0.1], names=[name])
    line = curves(history).data[0]
    assert line.name == shown
    assert line.hovertemplate.startswith(f"<b>{shown}</b><br>")
    assert heatmap(history).data[0].y == final_rotation(history).data[0].y == (f"0 {shown}",)


@pytest.mark.parametrize(("layers", "readings", "kept"), [(2, 5_000, 5_000), (2, 5_001, 5_000), (6_000, 4, 2)])
def test_thinned_to_ten_thousand_points_with_first_and_last(layers: int, readings: int, kept: int) -> None:
    history = history_of(*[[i / readings] * layers for i in range(readings)])
    cells = heatmap(history).data[0]
    assert len(cells.x) == len(cells.z[0]) == kept
    assert (cells.x[0], cells.x[-1]) == (10, 10 * readings)
    assert list(cells.x) == sorted(set(cells.x))


def test_curves_are_thinned_alike() -> None:
    history = history_of(*[[i / 400] * 100 for i in range(400)])
    line = curves(history).data[0]
    assert len(line.x) == len(line.y) == 100
    assert (line.y[0], line.y[-1]) == (0.0, 0.9975)


def test_values_are_rounded_plain_numbers() -> None:
    for figure in figures(history_of([1 / 3, 2 / 3], [1e-9 / 3, 0.5])).values():
        assert "bdata" not in figure.to_json()
    assert curves(history_of([1 / 3], [1e-9 / 3])).data[0].y == (0.33333, 3.3333e-10)


def test_bars_are_final_values_in_depth_order() -> None:
    bars = final_rotation(history_of([0.1, 0.2, math.nan], [0.3, math.nan, math.nan])).data[0]
    assert bars.x == (0.3, 0.2, None)
    assert bars.y == ("0 layer0", "1 layer1", "2 layer2")
    assert list(bars.marker.color) == depth_colors(3)


def test_first_layer_is_on_top() -> None:
    history = history_of([0.1, 0.2])
    for figure in (final_rotation(history), heatmap(history)):
        assert figure.layout.yaxis.autorange == "reversed"
        assert figure.layout.yaxis.categoryarray == ("0 layer0", "1 layer1")


def test_heatmap_is_depth_by_step() -> None:
    cells = heatmap(history_of([0.1, 0.2], [0.3, 0.5])).data[0]
    assert (cells.x, cells.y) == ((10, 20), ("0 layer0", "1 layer1"))
    assert cells.z == ([0.1, 0.3], [0.2, 0.5])


def test_heatmap_scale_starts_at_zero() -> None:
    axis = heatmap(history_of([0.1, 0.2], [0.3, 0.5])).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 0.5)


def test_long_names_drop_what_they_share_and_keep_their_end() -> None:
    names = [f"transformer.encoder.layers.{i}.attention.projection" for i in (1, 2)]
    bars = final_rotation(history_of([0.1, 0.2], names=names)).data[0]
    assert bars.y == ("0 …1.attention.projection", "1 …2.attention.projection")
    bars = final_rotation(history_of([0.1, 0.2], names=["a" * 20 + "b" * 20, "c"])).data[0]
    assert bars.y == ("0 aaaaaaaa…bbbbbbbbbbbbbbb", "1 c")


def test_same_short_labels_stay_apart() -> None:
    names = ["x" * 20 + middle + "y" * 20 for middle in "ab"]
    labels = heatmap(history_of([0.1, 0.2], names=names)).data[0].y
    assert len(set(labels)) == 2


def test_colours_can_be_seen_on_white_and_on_black() -> None:
    for color in depth_colors(50):
        assert 1.05 / (luminance(color) + 0.05) > 2.6
        assert (luminance(color) + 0.05) / 0.05 > 3


def test_lightness_grows_with_depth() -> None:
    shades = [luminance(color) for color in depth_colors(9)]
    assert shades == sorted(shades)


def test_colour_bar_spans_the_depths() -> None:
    figure = curves(history_of([0.1, 0.2, 0.3]))
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax, axis.colorbar.tickvals) == (0, 2, (0, 2))
    assert figure.data[0].marker.coloraxis == "coloraxis"


def test_a_single_reading_is_marked() -> None:
    assert curves(history_of([0.1])).data[0].mode == "lines+markers"


@pytest.mark.parametrize("names", [[], ["fc"], ["conv", "fc"]])
def test_without_readings_each_figure_says_so(names: list[str]) -> None:
    for figure in figures(RotationHistory(names)).values():
        assert "No values were recorded." in [note.text for note in figure.layout.annotations]
        assert json.loads(figure.to_json())["layout"]


def test_without_values_each_figure_says_so() -> None:
    for figure in figures(history_of([math.nan, math.nan])).values():
        assert "No values were recorded." in [note.text for note in figure.layout.annotations]


def test_figures_of_a_history_without_rotation() -> None:
    history = RotationHistory(["fc"])
    history.append(1, norm_ratio=[1.1])
    assert list(figures(history)) == ["rotation", "final_rotation", "heatmap"]


def walked(momentum: float | None = 0.5) -> RotationHistory:
    history = RotationHistory(["a", "b", "still"], facts={} if momentum is None else {"momentum": momentum})
    for i in (1, 2):
        history.append(
            10 * i,
            rotation=[0.1 * i, 0.2 * i, 0.0],
            angular_update=[0.01, 0.02, 0.0],
            straightness=[1.0, 1.5, math.nan],
            path_square=[0.1 * i, 0.3 * i, 0.0],
            requested_angle=[0.03, 0.03, 0.03],
        )
    return history


def test_a_random_walk_is_drawn_beside_the_rotation() -> None:
    *lines, walk = curves(walked()).data
    assert [line.name for line in lines] == ["a", "b", "still"]
    assert (walk.name, walk.x, walk.line.dash, walk.line.width) == ("random walk", (10, 20), "dot", 1.2)
    # c = (1 + 0.5) / (1 - 0.5) = 3; the median of two layers is their mean, and a layer that is still has no walk.
    expected = [sum(1 - math.exp(-1.5 * square * i) for square in (0.1, 0.3)) / 2 for i in (1, 2)]
    assert walk.y == pytest.approx(expected, rel=1e-4, abs=0)


@pytest.mark.parametrize("momentum", [None, 1.0, -0.1, math.nan])
def test_without_a_known_momentum_there_is_no_random_walk(momentum: float | None) -> None:
    assert [line.name for line in curves(walked(momentum)).data] == ["a", "b", "still"]


def test_the_requested_angle_is_one_line_where_all_layers_share_it() -> None:
    guide = curves(walked(), "angular_update").data[-1]
    assert (guide.name, guide.x, guide.y, guide.text) == ("requested", (10, 20), (0.03, 0.03), ("", "requested"))
    assert len(curves(walked(), "angular_update").data) == 4


def test_requested_angles_that_differ_have_the_colours_of_their_layers() -> None:
    history = RotationHistory(["a", "b", "plain"])
    history.append(10, angular_update=[0.01, 0.02, 0.1], requested_angle=[0.01, 0.02, math.nan])
    guides = curves(history, "angular_update").data[3:]
    assert [(guide.y, guide.line.color) for guide in guides] == [
        ((0.01,), depth_colors(3)[0]),
        ((0.02,), depth_colors(3)[1]),
    ]


def test_straightness_is_compared_with_one() -> None:
    guide = curves(walked(), "straightness").data[-1]
    assert (guide.name, guide.x, guide.y) == ("random walk", (10, 20), (1.0, 1.0))


def test_the_axis_names_another_reference() -> None:
    history = history_of([0.1])
    history.facts["reference"] = "<b>" + "x" * 60
    title = curves(history).layout.yaxis.title.text
    assert title.startswith("cosine distance from the reference weights (&lt;b&gt;xxxx")
    assert len(title) < 110


def test_fewer_points_can_be_asked_for() -> None:
    history = history_of(*[[i / 400] * 10 for i in range(400)])
    assert len(curves(history, points=500).data[0].x) == len(heatmap(history, points=500).data[0].x) == 50
