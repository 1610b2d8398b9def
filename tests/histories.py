"""Histories with known values, and what a page made of them holds."""

import base64
import json
import math
import re
import zlib
from html.parser import HTMLParser
from typing import Any

import torch

from pl_layer_rotation import RotationHistory

NAN, INF = math.nan, math.inf
HOSTILE = "</script><img src=x onerror=alert(1)>\"'\x1b[2J\u202e"
HOSTILE_NAMES = [
    *("a/b", "a b", "a[0]", "x:y", '"quoted"', "<b>", "</script>", "é", "层", "__proto__", "n" * 300, "{{x}}"),
    *("back\\slash", "new\nline", "tab\t", "zero\x00", "\x1c", "", "step"),
]


def history_of(*rows: list[float], names: list[str] | None = None, **facts: Any) -> RotationHistory:
    """One reading of the rotation every 10 steps."""
    names = names or [f"layer{i}" for i in range(len(rows[0]))]
    history = RotationHistory(names, [(8, 3)] * len(names), facts)
    for i, row in enumerate(rows):
        history.append(10 * (i + 1), rotation=row)
    return history


def recorded() -> RotationHistory:
    history = RotationHistory(["stem", "head"], [(8, 1, 3, 3), (10, 8)], {"lr": 0.1, "optimizer": "Layca(SGD)"})
    history.append(1, rotation=[0.0, 1e-12], norm_ratio=[1.0, INF])
    history.append(5, rotation=[0.25, NAN], angular_update=[0.1, -INF])
    history.append(70, rotation=[2.0, NAN])
    return history


def assert_values(history: RotationHistory, quantity: str, expected: list[list[float]]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(history.values(quantity), wanted, rtol=0, atol=0, equal_nan=True)


def unpacked(data: str) -> str:
    """A text as pages carry it."""
    return zlib.decompress(base64.b64decode(data)).decode()


class PageReader(HTMLParser):
    """The tags of a page with their attributes, its visible text, the rows of its tables and its figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self._hidden = False
        data = re.search(r'<script type="text/plain" id="figures">(.*?)</script>', page, re.DOTALL)
        self.figures: dict[str, Any] = json.loads(unpacked(data[1])) if data else {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            self._hidden = False
        elif data.strip():
            self.words.append(data)
            if self.tags[-1][0] in ("td", "th", "span", "button", "i") and self.rows and self.rows[-1]:
                self.rows[-1][-1] += data.strip()

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())
