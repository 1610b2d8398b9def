"""Turn a page into the picture that README shows, with the Chromium of this machine.

uv run docs/screenshot.py quickstart/layer_rotation.html docs/quickstart.png
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description="Screenshot of a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1240)
    parser.add_argument("--height", type=int, default=900)
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"needs one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": arguments.width, "height": arguments.height})
        view.goto(arguments.page.resolve().as_uri())
        view.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
        view.wait_for_timeout(1000)
        view.screenshot(path=arguments.picture)
        chromium.close()


if __name__ == "__main__":
    main()
