"""A page opened in headless Chromium."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page


class Visit:
    """An open page with everything that it said on the console or in dialogs, and asked of the network."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**{"viewport": {"width": 1240, "height": 900}, **options})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", self._answer)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def drawn(self) -> Any:
        """The same, once every chart is there. A machine that does much else may take long."""
        self.page.wait_for_function(
            "[...document.querySelectorAll('.plot')].every(plot => plot._fullLayout)", timeout=90_000
        )
        return self

    def _answer(self, dialog: Any) -> None:
        self.said.append(dialog.message)
        dialog.dismiss()
