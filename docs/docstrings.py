"""Our docstrings for mkdocs: Sphinx's roles become links and formulas text, so that no script needs to draw them."""

import re
from typing import Any

import griffe

# What our formulas use of LaTeX; anything else stops the build.
_LATEX = (
    (re.compile(r"\\(?:mathrm|text)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\sqrt\{([^{}]*)\}"), r"√\1"),
    (re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}"), r"(\1 / \2)"),
    (re.compile(r"\^\{([^{}]*)\}"), r"<sup>\1</sup>"),
    (re.compile(r"\^(\w)"), r"<sup>\1</sup>"),
    (re.compile(r"_(\w)"), r"<sub>\1</sub>"),
    (re.compile(r"\\(arctan|cos|min|max)\b"), r"\1"),
    (re.compile(r"\\leftarrow\b"), "←"),
    (re.compile(r"\\cdot\b"), "·"),
    (re.compile(r",? *\\quad\b"), "<br>"),
    (re.compile(r"\\,"), " "),
)
_FORMULA = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n)+)", re.MULTILINE)


class PlainMarkdown(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each class, function, attribute and module."""
        if obj.docstring is not None:
            owner = obj if obj.is_class else obj.parent
            obj.docstring.value = plain_markdown(obj.docstring.value, owner.name if owner is not None else "")


def plain_markdown(docstring: str, owner: str) -> str:
    """A docstring in Sphinx's words as Markdown.

    Args:
        docstring: the text.
        owner: class to which names without a dot belong.

    Raises:
        ValueError: If a formula uses more of LaTeX than is known here.

    """
    text = _FORMULA.sub(lambda block: f"{block[1]}<p class='formula'>{_plain(block[2])}</p>\n", docstring)
    text = re.sub(r":math:`([^`]+)`", lambda formula: f"*{_plain(formula[1])}*", text)
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda role: _link(role[1], owner), text)
    # A section of its own, which an empty line after the title would prevent.
    text = re.sub(r"^( *)Example::\n+(?=\1 )", r"\1Examples:\n", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _plain(formula: str) -> str:
    text = " ".join(formula.split())
    for latex, replacement in _LATEX:
        text = latex.sub(replacement, text)
    if "\\" in text:
        raise ValueError(f"docs/docstrings.py does not know a command in the formula {formula!r}. Add it there.")
    return text


def _link(name: str, owner: str) -> str:
    short = name.removeprefix("pl_layer_rotation.")
    path = short if name != short or "." in short else f"{owner}.{short}"
    return f"[`{short}`][pl_layer_rotation.{path}]"
