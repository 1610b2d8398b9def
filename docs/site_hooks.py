"""What mkdocs does to our pages: links to files of the repository, which the site does not hold, become their names."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return _LINK.sub(_name_of_file, markdown)


def _name_of_file(link: re.Match[str]) -> str:
    text, path = link.groups()
    if not (ROOT / path).exists():
        return link[0]  # mkdocs says that it leads nowhere
    return text if text.startswith("`") else f"{text} (`{path}`)"
