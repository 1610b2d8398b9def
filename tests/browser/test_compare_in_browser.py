"""The page of several runs as a reader sees it: drawn, silent, alone, sortable and within the screen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from histories import HOSTILE, history_of
from playwright.sync_api import Browser
from visits import Visit

from pl_layer_rotation.report.compare import write_comparison

pytestmark = pytest.mark.browser

NUMBERS = {"few": 3, "many": 200}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of three runs and of 200; the n-th run turned by n and was the n-th best."""
    folder = tmp_path_factory.mktemp("pages")
    for name, number in NUMBERS.items():
        runs = {f"run{n}{HOSTILE * (n == 1)}": n / number for n in range(1, number + 1)}
        histories = {
            run: history_of(
                *([size * step / 20 * (layer + 1) / 5 for layer in range(5)] for step in range(21)),
                lr=size, metrics={"val_acc": size},
            )
            for run, size in runs.items()
        }  # fmt: skip
        write_comparison(folder / f"{name}.html", histories)
    return {name: folder / f"{name}.html" for name in NUMBERS}


@pytest.fixture
def visit(browser: Browser, files: dict[str, Path]) -> Iterator[Any]:
    visits: list[Visit] = []

    def open_page(name: str, **options: Any) -> Visit:
        visits.append(Visit(browser, files[name], **options).drawn())
        return visits[-1]

    yield open_page
    for opened in visits:
        opened.page.close()


def test_three_runs_are_drawn_side_by_side(visit: Any) -> None:
    page = visit("few").page
    assert page.locator("#curves .scatterlayer .trace").count() == 6  # a line and a band each
    assert page.locator("#layers .scatterlayer .point").count() == 15
    assert page.locator("#mean .scatterlayer .point").count() == 3
    assert page.locator(".legend li").count() == 3


def test_two_hundred_runs_are_lines_points_and_rows_of_a_heatmap(visit: Any) -> None:
    page = visit("many").page
    assert page.locator("#curves .scatterlayer .trace").count() == 200
    assert page.locator("#mean .scatterlayer .point").count() == 200
    assert page.locator("#layers .heatmaplayer image").count() == 1
    assert page.locator("tbody tr").count() == 200


@pytest.mark.parametrize("name", NUMBERS)
def test_silent_and_alone(visit: Any, name: str) -> None:
    opened = visit(name)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert opened.page.locator("img").count() == 0


@pytest.mark.parametrize("name", NUMBERS)
def test_a_phone_never_scrolls_sideways(visit: Any, name: str) -> None:
    page = visit(name, viewport={"width": 360, "height": 780}, has_touch=True, is_mobile=True).page
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert max(page.evaluate("[...document.querySelectorAll('.plot .main-svg')].map(s => s.clientWidth)")) <= 360


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 28)")])
def test_follows_the_colour_scheme(visit: Any, scheme: str, paper: str) -> None:
    page = visit("few", color_scheme=scheme).page
    text = page.evaluate("getComputedStyle(document.querySelector('#curves .ytick text')).fill")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    assert (int(text[4:].split(",")[0]) > 128) is (scheme == "dark")


def test_a_click_on_a_column_sorts_by_it_and_another_turns_it_round(visit: Any) -> None:
    page = visit("many").page

    def first() -> str:
        return page.locator("tbody tr").first.locator("th").inner_text()

    assert first() == "run200"
    page.get_by_role("button", name="mean rotation").click()
    assert first() == "run200"
    page.get_by_role("button", name="mean rotation").click()
    assert first().startswith("run1<")
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("mean rotation")


def test_hover_names_the_run(visit: Any) -> None:
    page = visit("few").page
    page.locator("#curves").scroll_into_view_if_needed()
    area = page.locator("#curves .nsewdrag").bounding_box()
    # The mean of the second run ends at 2/3 · 3/5, under an axis that ends a little above the highest layer's 1.
    top = page.evaluate("document.getElementById('curves')._fullLayout.yaxis.range[1]")
    page.mouse.move(area["x"] + area["width"] - 1, area["y"] + area["height"] * (1 - 0.4 / top))
    label = page.locator("#curves .hovertext")
    label.wait_for()
    assert label.text_content().startswith("run2")


def test_hover_on_the_heatmap_names_run_layer_and_depth(visit: Any) -> None:
    page = visit("many").page
    page.locator("#layers").evaluate("chart => chart.scrollIntoView()")  # it is taller than the window
    area = page.locator("#layers .nsewdrag").bounding_box()
    page.mouse.move(area["x"] + area["width"] * 0.5, area["y"] + 2)
    label = page.locator("#layers .hovertext")
    label.wait_for()
    assert label.text_content().startswith("1 run200depth 2: layer2rotation 0.6")
