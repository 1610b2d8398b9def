"""The page as a reader sees it: drawn, silent, alone, and within the screen."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from visits import Visit

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.page import write_page

pytestmark = pytest.mark.browser

LONG = "transformer.encoder.blocks.{}.attention.out_proj"
EVIL = [
    "</script><script>hit = 1</script>",
    "<img src=x onerror='hit = 1'>",
    "\"'><svg onload=hit=1>",
    "line\u2028\u2029break",
    "\u05e9\u05db\u05d1\u05d4\u202e4\u202c",
    "__proto__",
    "constructor",
    "${hit=1} {{7*7}} %{y} `x`",
]
EVIL_RUNS = [EVIL[0], EVIL[4], "__proto__"]


def history_of(names: list[str], readings: int = 20) -> RotationHistory:
    layers = len(names)
    facts = {"optimizer": "SGD", "momentum": 0.9}
    history = RotationHistory(names, [(16, depth + 1) for depth in range(layers)], facts)
    for i in range(readings):
        rotation = [0.05 * i * (depth + 1) / layers for depth in range(layers)]
        history.append(
            i,
            rotation=rotation,
            angular_update=[0.01 * (depth + 1) for depth in range(layers)],
            norm_ratio=[1 + 0.1 * i] * layers,
            path_square=[1e-3 * i] * layers,
            requested_angle=[0.02] * layers,
        )
    return history


def broken() -> RotationHistory:
    """A layer that is NaN from step 6 on, one that is still, one that started at zero."""
    history = RotationHistory(["nan", "still", "zero", "fine"], facts={"reference_steps": {"zero": 1}})
    for i in range(1, 20):
        history.append(
            i, rotation=[0.02 * i if i < 6 else math.nan, 0.0, 0.01 * i - 0.01, 0.03 * i], norm_ratio=[1.0] * 4
        )
    return history


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    small, tall = history_of(["conv1", "<b>conv2</b>", "fc"]), history_of([LONG.format(i) for i in range(60)])
    runs = {
        "one": {"run": small},
        "three": {"sgd": small, "layca": tall, "adam with a name as long as those of real runs are": small},
        "empty": {"none": RotationHistory([]), "waiting": RotationHistory(["fc"]), "small": small},
        "broken": {"run": broken()},
        "deep": {"run": history_of([LONG.format(i) for i in range(300)])},
        "large": {"run": history_of([LONG.format(i) for i in range(500)], 500)},
        "evil": {name: history_of(EVIL) for name in EVIL_RUNS},
    }
    for name, histories in runs.items():
        write_page(folder / f"{name}.html", histories)
    return {name: folder / f"{name}.html" for name in runs}


class OpenPage(Visit):
    """What a reader does with the page of a run."""

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def choose(self, label: str, within: str = "#run-0") -> None:
        self.page.locator(f"{within} .choice label", has_text=label).first.click()

    def lines(self, plot: str = "curves-0") -> Any:
        """Names and last values of the lines, title and type of the vertical axis."""
        return self.page.evaluate(
            """id => {
                const plot = document.getElementById(id);
                const {title, type} = plot._fullLayout.yaxis;
                return [title.text, type, plot._fullData.map(line => [line.name, line.y.at(-1)])];
            }""",
            plot,
        )

    def column(self, number: int) -> list[str]:
        """Text of a column of the first run's table of layers, as far as it is shown."""
        return self.page.locator(f"#run-0 .layers tbody tr:visible td:nth-child({number})").all_inner_texts()


@pytest.fixture
def visit(browser: Browser, files: dict[str, Path]) -> Iterator[Any]:
    visits: list[OpenPage] = []

    def open_page(name: str, **options: Any) -> OpenPage:
        visits.append(OpenPage(browser, files[name], **options))
        return visits[-1].drawn()

    yield open_page
    for opened in visits:
        opened.page.close()


def test_one_line_and_one_bar_a_layer_and_a_random_walk(visit: Any) -> None:
    opened = visit("three")
    for i, layers in enumerate((3, 60, 3)):
        assert opened.count(f"#curves-{i} .scatterlayer .trace") == layers + 1
        assert opened.count(f"#overview-{i} .scatterlayer .trace") == layers + 1
        assert opened.count(f"#final_rotation-{i} .barlayer .point") == layers
        assert opened.count(f"#heatmap-{i} .heatmaplayer image") == 1


def test_hover_names_the_layer_and_its_shape(visit: Any) -> None:
    opened = visit("one")
    area = opened.page.locator("#curves-0 .nsewdrag").bounding_box()
    # The second of three layers ends at 2/3 of the last one's height, which the axis shows with a margin.
    top = opened.page.evaluate("document.getElementById('curves-0')._fullLayout.yaxis.range[1]")
    last = 0.05 * 19 * 2 / 3
    opened.page.mouse.move(area["x"] + area["width"] - 1, area["y"] + area["height"] * (1 - last / top))
    label = opened.page.locator("#curves-0 .hovertext")
    label.wait_for()
    assert "<b>conv2</b>" in label.text_content()
    assert "shape 16 \u00d7 2" in label.text_content()
    assert "step 19cosine distance 0.633" in label.text_content()


@pytest.mark.parametrize(
    ("view", "title", "values"),
    [
        ("angular update", "angle turned by one optimizer step (radians)", [0.01, 0.02, 0.03, 0.02]),
        ("norm ratio", "norm of the weights / norm of the reference (ratio)", [2.9, 2.9, 2.9]),
    ],
)
def test_each_view_is_a_click_away(visit: Any, view: str, title: str, values: list[float]) -> None:
    opened = visit("one")
    assert opened.lines()[0] == "cosine distance from initialization"
    opened.choose(view)
    shown, _, lines = opened.lines()
    assert (shown, [value for _, value in lines]) == (title, values)
    assert opened.page.locator("#caption-0 > span:visible").count() == 1
    assert "Cosine distance" not in opened.page.locator("#caption-0").inner_text()
    opened.choose("rotation")
    assert opened.lines()[0] == "cosine distance from initialization"


def test_only_recorded_views_are_offered(visit: Any) -> None:
    labels = visit("one").page.locator("#run-0 [data-choice=view] label").all_inner_texts()
    assert labels == ["rotation", "angular update", "norm ratio"]


def test_guides_are_thin_and_dotted(visit: Any) -> None:
    opened = visit("one")
    guide = "(({name, line}) => [name, line.dash, line.width])(document.getElementById('curves-0')._fullData.at(-1))"
    assert opened.page.evaluate(guide) == ["random walk", "dot", 1.2]
    opened.choose("angular update")
    assert opened.page.evaluate(guide) == ["requested", "dot", 1.2]


def test_logarithmic_and_back(visit: Any) -> None:
    opened = visit("one")
    assert opened.lines()[1] == "linear"
    opened.choose("log")
    assert opened.lines()[1] == "log"
    opened.choose("angular update")
    assert opened.lines()[1] == "log"
    opened.choose("linear")
    assert opened.lines()[1] == "linear"


def test_the_overview_switches_all_runs(visit: Any) -> None:
    opened = visit("three")
    opened.choose("norm ratio", within=".panel:has(.multiples)")
    for i in range(3):
        assert {value for _, value in opened.lines(f"overview-{i}")[2]} == {2.9}
    assert opened.lines()[0] == "cosine distance from initialization"


def test_a_part_of_a_name_filters_table_and_lines(visit: Any) -> None:
    opened = visit("one")
    opened.page.locator("#run-0 .layers .search").fill("CONV")
    assert opened.column(2) == ["conv1", "<b>conv2</b>"]
    assert opened.page.locator("#run-0 .matches").inner_text() == "2 of 3 layers"
    fade = "[...document.querySelectorAll('#curves-0 .scatterlayer .trace')].map(trace => trace.style.opacity)"
    assert opened.page.evaluate(fade) == ["", "", "0.06", ""]
    opened.choose("norm ratio")
    assert opened.page.evaluate(fade) == ["", "", "0.06"]
    opened.page.locator("#run-0 .panel .search").fill("")
    assert opened.column(2) == ["conv1", "<b>conv2</b>", "fc"]
    assert opened.page.evaluate(fade) == [""] * 3


def test_columns_sort_by_value_with_gaps_last(visit: Any) -> None:
    opened = visit("broken")
    head = opened.page.locator("#run-0 .layers th", has_text="final rotation")
    head.get_by_role("button").click()
    assert opened.column(4) == ["0", "0.100", "0.180", "0.570"]
    head.get_by_role("button").click()
    assert opened.column(2) == ["fine", "zero", "nan", "still"]
    assert head.get_attribute("aria-sort") == "descending"
    opened.page.locator("#run-0 .layers th", has_text="layer").get_by_role("button").click()
    assert opened.column(2) == ["fine", "nan", "still", "zero"]


def test_shapes_sort_by_size(visit: Any) -> None:
    opened = visit("deep")
    button = opened.page.locator("#run-0 .layers th", has_text="shape").get_by_role("button")
    for expected in ("16 \u00d7 1", "16 \u00d7 300"):
        button.click()
        assert opened.column(3)[0] == expected


def test_a_broken_layer_has_a_gap_and_a_sentence(visit: Any) -> None:
    opened = visit("broken")
    text = opened.page.locator("#run-0").inner_text()
    assert "nan has no defined rotation since step 6; shown is the last defined value, if any." in text
    assert "still did not turn at all" in text
    assert "zero starts at zero" in text
    assert opened.lines()[2] == [["nan", None], ["still", 0], ["zero", 0.18], ["fine", 0.57]]


def test_300_layers_are_all_drawn(visit: Any) -> None:
    opened = visit("deep")
    assert opened.count("#curves-0 .scatterlayer .trace") == 301
    assert opened.count("#final_rotation-0 .barlayer .point") == 300


@pytest.mark.parametrize("view", ["rotation", "angular update"])
def test_no_name_runs_or_hides(visit: Any, view: str) -> None:
    opened = visit("evil")
    opened.choose(view)
    assert opened.page.evaluate("typeof hit") == "undefined"
    assert opened.count("svg svg, img") == 0
    cells = opened.page.locator("#run-0 .layers td:nth-child(2)").all_text_contents()
    assert cells == EVIL
    assert opened.page.locator("h2 bdi").all_text_contents() == EVIL_RUNS
    opened.page.locator("#run-0 .layers .search").fill("__proto__")
    assert opened.column(2) == ["__proto__"]


def test_hover_shows_a_name_as_it_is(visit: Any) -> None:
    opened = visit("evil")
    opened.page.locator("#final_rotation-0").scroll_into_view_if_needed()
    area = opened.page.locator("#final_rotation-0 .nsewdrag").bounding_box()
    for depth, name in enumerate(EVIL):
        opened.page.mouse.move(area["x"] + 2, area["y"] + area["height"] * (depth + 0.5) / len(EVIL))
        label = opened.page.locator("#final_rotation-0 .hovertext", has_text=f"depth {depth},")
        label.wait_for()
        assert label.text_content().startswith("".join(c if c.isprintable() else " " for c in name))


def test_opens_500_layers_by_500_readings_in_five_seconds(browser: Browser, files: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1240, "height": 900})
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(files["large"].as_uri())
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(plot => plot._fullLayout)", timeout=90_000)
    measured = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    page.close()
    # Processor time: the clock on the wall also counts what else the machine does.
    print(f"500 layers x 500 readings: opened in {measured['ProcessTime']:.1f} s of processor time")
    assert 0 < measured["ProcessTime"] < 5


def test_a_browser_too_old_says_so_and_keeps_the_tables(browser: Browser, files: dict[str, Path]) -> None:
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(files["one"].as_uri())
    page.locator("#no-charts").wait_for()
    assert "need a browser of 2023 or later" in page.locator("#no-charts").inner_text()
    page.locator(".layers .search").fill("fc")
    assert page.locator(".layers tbody tr:visible").count() == 1
    page.close()


def test_a_script_that_is_not_the_pages_own_is_refused(visit: Any) -> None:
    opened = visit("one")
    opened.page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), {textContent: 'hit = 1'}))"
    )
    assert opened.page.evaluate("typeof hit") == "undefined"
    assert any("Content Security Policy" in text for text in opened.said)


@pytest.mark.parametrize("name", ["one", "three", "empty", "broken", "deep", "evil"])
def test_silent_and_alone(visit: Any, name: str) -> None:
    opened = visit(name)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("name", ["one", "three", "empty", "broken", "deep", "evil"])
def test_a_phone_never_scrolls_sideways(visit: Any, name: str) -> None:
    opened = visit(name, viewport={"width": 360, "height": 780}, has_touch=True, is_mobile=True)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
    assert max(opened.page.evaluate("[...document.querySelectorAll('.plot .main-svg')].map(s => s.clientWidth)")) <= 360


@pytest.mark.parametrize(("scheme", "paper", "dark"), [("light", 255, False), ("dark", 20, True)])
def test_follows_the_colour_scheme(visit: Any, scheme: str, paper: int, dark: bool) -> None:
    page = visit("one", color_scheme=scheme).page
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    text = page.evaluate("getComputedStyle(document.querySelector('#curves-0 .ytick text')).fill")
    assert background.startswith(f"rgb({paper}, ")
    assert (int(text[4:].split(",")[0]) > 128) is dark


def test_printed_on_white_and_within_the_paper(visit: Any) -> None:
    page = visit("three", color_scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = page.evaluate("[...document.querySelectorAll('.plot .main-svg')].map(svg => svg.clientWidth)")
    assert max(widths) == 680
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
