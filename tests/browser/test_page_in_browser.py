"""The page as a reader sees it: drawn, silent, alone, and within the screen."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.page import write_page

pytestmark = pytest.mark.browser

LONG = "transformer.encoder.blocks.{}.attention.out_proj"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail("No Chromium on the path, and REQUIRE_BROWSER=1 asks for one.")
        pytest.skip("no Chromium on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def history_of(names: list[str], readings: int = 20) -> RotationHistory:
    history = RotationHistory(names, [(16, depth + 1) for depth in range(len(names))], {"optimizer": "SGD"})
    for i in range(readings):
        history.append(i, rotation=[0.05 * i * (depth + 1) / len(names) for depth in range(len(names))])
    return history


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    small, tall = history_of(["conv1", "<b>conv2</b>", "fc"]), history_of([LONG.format(i) for i in range(60)])
    runs = {
        "one": {"run": small},
        "three": {"sgd": small, "layca": tall, "adam with a name as long as those of real runs are": small},
        "empty": {"none": RotationHistory([]), "waiting": RotationHistory(["fc"]), "small": small},
    }
    for name, histories in runs.items():
        write_page(folder / f"{name}.html", histories)
    return {name: folder / f"{name}.html" for name in runs}


class Visit:
    """An open page with everything that it said on the console and asked of the network."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**{"viewport": {"width": 1240, "height": 900}, **options})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_function("[...document.querySelectorAll('.plot')].every(plot => plot._fullLayout)")

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()


@pytest.fixture
def visit(browser: Browser, files: dict[str, Path]) -> Iterator[Any]:
    visits: list[Visit] = []

    def open_page(name: str, **options: Any) -> Visit:
        visits.append(Visit(browser, files[name], **options))
        return visits[-1]

    yield open_page
    for opened in visits:
        opened.page.close()


def test_one_line_and_one_bar_a_layer(visit: Any) -> None:
    opened = visit("three")
    for i, layers in enumerate((3, 60, 3)):
        assert opened.count(f"#rotation-{i} .scatterlayer .trace") == layers
        assert opened.count(f"#overview-{i} .scatterlayer .trace") == layers
        assert opened.count(f"#final_rotation-{i} .barlayer .point") == layers
        assert opened.count(f"#heatmap-{i} .heatmaplayer image") == 1


def test_hover_names_the_layer_and_its_shape(visit: Any) -> None:
    opened = visit("one")
    area = opened.page.locator("#rotation-0 .nsewdrag").bounding_box()
    # The second of three layers ends at 2/3 of the last one's height, which the axis shows with a margin.
    top = opened.page.evaluate("document.getElementById('rotation-0')._fullLayout.yaxis.range[1]")
    last = 0.05 * 19 * 2 / 3
    opened.page.mouse.move(area["x"] + area["width"] - 1, area["y"] + area["height"] * (1 - last / top))
    label = opened.page.locator("#rotation-0 .hovertext")
    label.wait_for()
    assert "<b>conv2</b>" in label.text_content()
    assert "shape 16 \u00d7 2" in label.text_content()


@pytest.mark.parametrize("name", ["one", "three", "empty"])
def test_silent_and_alone(visit: Any, name: str) -> None:
    opened = visit(name)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("name", ["one", "three", "empty"])
def test_a_phone_never_scrolls_sideways(visit: Any, name: str) -> None:
    opened = visit(name, viewport={"width": 360, "height": 780}, has_touch=True, is_mobile=True)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
    assert max(opened.page.evaluate("[...document.querySelectorAll('.plot .main-svg')].map(s => s.clientWidth)")) <= 360


@pytest.mark.parametrize(("scheme", "paper", "dark"), [("light", 255, False), ("dark", 20, True)])
def test_follows_the_colour_scheme(visit: Any, scheme: str, paper: int, dark: bool) -> None:
    page = visit("one", color_scheme=scheme).page
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    text = page.evaluate("getComputedStyle(document.querySelector('#rotation-0 .ytick text')).fill")
    assert background.startswith(f"rgb({paper}, ")
    assert (int(text[4:].split(",")[0]) > 128) is dark


def test_printed_on_white_and_within_the_paper(visit: Any) -> None:
    page = visit("three", color_scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = page.evaluate("[...document.querySelectorAll('.plot .main-svg')].map(svg => svg.clientWidth)")
    assert max(widths) == 680
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
