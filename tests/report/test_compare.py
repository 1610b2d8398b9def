"""What the page of several runs shows, and that nothing in it can break out of its place."""

import math
from pathlib import Path
from typing import Any

import pytest
from histories import HOSTILE, PageReader, history_of

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.compare import render_comparison, write_comparison
from pl_layer_rotation.report.compare_figures import final_rotation, mean_curves, run_colors, scatter, united_layers
from pl_layer_rotation.report.comparison import Comparison, compare


def read(histories: dict[str, RotationHistory], **options: Any) -> PageReader:
    return PageReader(render_comparison(histories, **options))


def many(number: int, layers: int = 3) -> dict[str, RotationHistory]:
    """Runs of which the n-th turned by n and was the n-th best."""
    names = [f"layer{i}" for i in range(layers)]
    return {
        f"run{n}": history_of(
            [0.0] * layers, [n / number] * layers, names=names, lr=n, metrics={"val_loss": 1 - n / number}
        )
        for n in range(1, number + 1)
    }


def drawn(histories: dict[str, RotationHistory]) -> tuple[dict[str, RotationHistory], Comparison]:
    return histories, compare(histories)


def test_two_runs_have_lines_points_and_a_row_each() -> None:
    one = history_of([0.1, 0.3], [0.2, 0.6], optimizer="SGD", seed=1, metrics={"acc": 0.5, "time": 3.0})
    two = history_of([0.4, 0.5], optimizer="Layca", seed=1, metrics={"acc": 0.75})
    page = read({"one": one, "two": two})
    assert page.rows == [
        ["run", "acc", "mean rotation", "min", "max", "median straightness", "optimizer", "steps", "time"],
        ["two", "0.750", "0.450", "0.400", "0.500", "\u2013", "Layca", "10", "\u2013"],
        ["one", "0.500", "0.400", "0.200", "0.600", "\u2013", "SGD", "20", "3.00"],
    ]
    shared = page.words.index("The same in all runs")
    assert page.words[shared + 1 : shared + 3] == ["seed", "1"]
    assert [a["id"] for _, a in page.tags if a.get("class") == "plot"] == ["curves", "mean", "straightness", "layers"]


def test_mean_line_and_band_of_each_run() -> None:
    figure = mean_curves(*drawn({"one": history_of([0.1, 0.3], [0.2, 0.6]), "two": history_of([math.nan, 0.4])}))
    band, _, *lines = figure.data
    assert {line.name: (line.x, line.y) for line in lines} == {"one": ((10, 20), (0.2, 0.4)), "two": ((10,), (0.4,))}
    assert (band.x, band.y) == ((10,) * 2, (0.4,) * 2)  # `two` is lower in rank, so it is drawn first
    assert figure.data[1].y == (0.3, 0.6, 0.2, 0.1)


def test_layers_side_by_side_are_the_union_in_depth_order() -> None:
    one, two = history_of([0.1, 0.3], names=["a", "c"]), history_of([0.2, 0.4, 0.5], names=["a", "b", "c"])
    figure = final_rotation(*drawn({"one": one, "two": two}))
    assert [(points.name, points.x) for points in figure.data] == [("one", (0.1, None, 0.3)), ("two", (0.2, 0.4, 0.5))]
    assert figure.data[0].y == ("0 a", "1 b", "2 c")
    assert "1 is not in every run." in read({"one": one, "two": two}).text


@pytest.mark.parametrize(
    ("lists", "union"),
    [
        ([["a", "b"], ["a", "b"]], ["a", "b"]),
        ([["b"], ["a", "b", "c"]], ["a", "b", "c"]),
        ([["a", "b"], ["x", "y"]], ["x", "y", "a", "b"]),
        ([[], ["a"]], ["a"]),
    ],
)
def test_union_of_layers(lists: list[list[str]], union: list[str]) -> None:
    assert united_layers([RotationHistory(names) for names in lists]) == union


def test_eight_runs_have_colours_of_their_own_and_nine_share_a_scale() -> None:
    assert len(set(run_colors(compare(many(8))))) == 8
    legend = [tag for tag, a in read(many(8)).tags if a.get("class") == "legend"]
    assert legend == ["ul"]
    page = read(many(9))
    assert "worst" in page.text
    assert not [tag for tag, a in page.tags if a.get("class") == "legend"]
    assert [trace["type"] for trace in page.figures["layers"]["data"]] == ["heatmap"]


def test_heatmap_has_the_best_run_on_top_and_gaps_where_a_layer_is_missing() -> None:
    histories = many(9)
    histories["run9"] = history_of([0.9], names=["other"], metrics={"val_loss": 0.0})
    (cells,) = final_rotation(*drawn(histories)).data
    assert cells.y[:2] == ("1 run9", "2 run8")
    assert list(cells.z[0]) == [0.9, None, None, None]
    assert list(cells.z[1]) == [None, *[0.88889] * 3]
    assert list(cells.meta) == ["other", "layer0", "layer1", "layer2"]


def test_runs_as_points_have_rotation_and_metric() -> None:
    (points,) = scatter(compare(many(4)), "mean").data
    assert (points.x, points.y) == ((0.25, 0.5, 0.75, 1.0), (0.75, 0.5, 0.25, 0.0))
    text = read(many(4)).text
    assert "Spearman's \u03c1 = -1.00 over n = 4 runs. It shows what goes together, not what causes what." in text
    assert "Too few runs for a rank correlation: n = 0, and it takes 4." in text


def test_same_value_in_all_runs_has_no_rank_correlation() -> None:
    runs = {f"run{i}": history_of([0.1 * i], metrics={"acc": 0.5}) for i in range(4)}
    assert "All 4 runs have the same value of one of the two, so there is no rank correlation." in read(runs).text


def test_without_a_shared_metric_nothing_is_set_against_it() -> None:
    page = read({"one": history_of([0.1]), "two": history_of([0.2], metrics={"val_acc": 0.5})})
    assert "No two runs have a metric in common whose name says what is better" in page.text
    assert set(page.figures) == {"curves", "layers"}
    assert page.rows[1][0] == "two"


def test_metric_and_mode_can_be_chosen() -> None:
    runs = {f"run{i}": history_of([0.1], metrics={"val_acc": 0.5, "speed": float(i)}) for i in range(3)}
    page = read(runs, metric="speed", mode="max")
    assert [row[:2] for row in page.rows[:2]] == [["run", "speed"], ["run2", "2.00"]]
    assert "Runs are judged by their last value of speed; larger is better." in page.text


def test_findings_stand_under_the_names_of_a_few_runs_and_in_the_table_of_many() -> None:
    still = RotationHistory(["fc", "out"], facts={"metrics": {"val_loss": 2.0}})
    still.append(10, rotation=[0.1, 0.0], norm_ratio=[1.0, 1.0])
    said = "did not turn at all: its weights never changed."
    assert said in read({"still": still, **many(2)}).text
    rows = read({"still": still, **many(9)}).rows
    assert [row[-1] for row in rows][-1] == f"`out` {said} Frozen, missing from the optimizer, or without gradient."
    assert rows[0][-1] == "findings"
    assert rows[1][-1] == "\u2013"


@pytest.mark.parametrize("number", [2, 9])
def test_no_name_breaks_out_of_its_place(number: int) -> None:
    evil = history_of([0.1, 0.2], names=[HOSTILE, "fc"], **{HOSTILE: HOSTILE}, metrics={"acc" + HOSTILE: 0.5})
    page = read({HOSTILE: evil, "other": evil, **{f"run{i}": evil for i in range(2, number)}})
    assert not {"img", "b"} & {tag for tag, _ in page.tags}
    assert page.text.count("</script><img src=x onerror=alert(1)>") >= 4
    names = [line["name"] for line in page.figures["curves"]["data"] if "name" in line]
    shown = "".join(letter if letter.isprintable() else " " for letter in HOSTILE)
    assert shown.replace("<", "&lt;").replace(">", "&gt;") in names


def test_straightness_is_drawn_over_the_rates_where_they_differ() -> None:
    def straight(kappa: float, **facts: Any) -> RotationHistory:
        history = RotationHistory(["fc"], facts={"angle_readings": 60, "median_straightness": kappa, **facts})
        history.append(100, rotation=[0.5])
        return history

    runs = {f"run{lr}": straight(1 / (1 + lr), learning_rate=lr) for lr in (0.1, 1.0, 10.0)}
    figure = read(runs).figures["rates"]
    assert figure["layout"]["xaxis"]["type"] == "log"
    assert sorted(zip(figure["data"][0]["x"], figure["data"][0]["y"], strict=True)) == [
        (0.1, pytest.approx(1 / 1.1, rel=1e-3)),
        (1.0, 0.5),
        (10.0, pytest.approx(1 / 11, rel=1e-3)),
    ]
    assert "Median straightness and learning rate" in read(runs).text
    same = {name: straight(1.0, learning_rate=0.1, seed=i) for i, name in enumerate("ab")}
    unknown = {name: straight(1.0, learning_rate=rate) for name, rate in (("a", 0.1), ("b", "auto"))}
    assert "rates" not in read(same).figures
    assert "rates" not in read(unknown).figures


def test_runs_without_readings_are_rows_too() -> None:
    page = read({"none": RotationHistory([]), "waiting": RotationHistory(["fc"]), "some": history_of([0.5])})
    assert [row[:2] for row in page.rows[1:]] == [["some", "0.500"], ["none", "\u2013"], ["waiting", "\u2013"]]
    only = read({"none": RotationHistory([]), "waiting": RotationHistory(["fc"])})
    assert "No run has a defined rotation yet." in only.text


def test_two_hundred_runs_are_thinned() -> None:
    runs = many(200, layers=300)
    page = read(runs)
    lines = page.figures["curves"]["data"]
    assert len(lines) == 200
    (cells,) = page.figures["layers"]["data"]
    assert (len(cells["z"]), len(cells["z"][0])) == (200, 200)
    assert (cells["x"][0], cells["x"][-1]) == (0, 299)
    assert "Of the layers, 200 are drawn, evenly over depth." in page.text


def test_above_two_hundred_runs_the_curves_of_two_hundred_are_drawn() -> None:
    runs = many(201)
    lines = mean_curves(*drawn(runs)).data
    assert (len(lines), lines[0].name, lines[-1].name) == (200, "run1", "run201")
    assert "200 of them are drawn, evenly from best to worst." in read(runs).text


def test_long_curves_keep_their_first_and_last_reading() -> None:
    long = history_of(*([i / 1000] for i in range(1000)))
    line = mean_curves(*drawn({"one": long, "two": history_of([0.1])})).data[-1]
    assert (len(line.x), line.x[0], line.x[-1]) == (300, 10, 10_000)


def test_charts_are_put_in_words() -> None:
    page = read({"one": history_of([0.1]), "two": history_of([0.3])})
    words = "Mean rotation at the end: 0.300 (two), 0.100 (one)."
    labels = [a["aria-label"] for _, a in page.tags if a.get("id") == "curves"]
    assert labels == [f"Rotation over training. {words}"]
    assert words in page.text


def test_same_histories_give_the_same_bytes() -> None:
    assert render_comparison(many(12)) == render_comparison(many(12))


def test_nothing_is_loaded_from_elsewhere() -> None:
    tags = read(many(2)).tags
    sources = [a.get("src") or (a.get("href") if tag == "link" else None) for tag, a in tags]
    assert {source for source in sources if source} == {"data:,"}
    policy = next(a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")


def test_one_run_is_refused_and_nothing_written(tmp_path: Path) -> None:
    message = r"^`histories` must hold two runs at least, got 1\. Pass \{name: history, \u2026\}\.$"
    with pytest.raises(ValueError, match=message):
        write_comparison(tmp_path / "page.html", many(1))
    assert not (tmp_path / "page.html").exists()
