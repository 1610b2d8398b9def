"""What pages are made of: templates, and large texts compressed for the browser's own DecompressionStream."""

import base64
import hashlib
import zlib
from functools import cache
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs


class Script(NamedTuple):
    """A script in a page.

    Attributes:
        packed: its text as :func:`pack` made it.
        source: what a Content-Security-Policy calls it: the hash of its text.

    """

    packed: str
    source: str


def pack(text: str) -> str:
    """Deflate and base64: letters that mean nothing in HTML. Equal texts give equal letters under one zlib.

    Example::

        >>> letters = pack("</script>" * 1000)
        >>> len(letters) < 100, zlib.decompress(base64.b64decode(letters)) == b"</script>" * 1000
        (True, True)

    """
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii")


def source_hash(script: str) -> str:
    """The hash by which a Content-Security-Policy permits this inline script and no other.

    Example::

        >>> source_hash("alert(1)")
        "'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='"

    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}'"


@cache
def plotly_js() -> Script:
    """The plotly.js that the installed plotly package brings: 4.8 MB, packed 2.0. Kept, since each page needs it."""
    script = get_plotlyjs()
    return Script(pack(script), source_hash(script))


def templates() -> Environment:
    """The templates of this folder; what they are given is escaped."""
    return Environment(
        loader=PackageLoader("pl_layer_rotation", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def source(name: str) -> str:
    """A file of this folder as it is."""
    environment = templates()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def script(name: str) -> str:
    """The script of a page with charts: what all such pages share, and its own."""
    return source("charts.js") + source(name)


def style(name: str) -> str:
    """The style sheet of a page: what all pages share, and its own."""
    return source("common.css") + source(name)
