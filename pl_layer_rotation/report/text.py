"""Numbers and shapes as a reader sees them, the same in table, page and figures."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pl_layer_rotation._numbers import is_number

MISSING = "–"  # noqa: RUF001
_SHOWN = 3  # layers that a sentence names
_NAME = 60  # characters of a name in a sentence


def three_digits(value: float, missing: str = "-") -> str:
    """A measured value to three significant digits, zeros kept so that columns line up.

    Example::

        >>> three_digits(0.5), three_digits(12345.6), three_digits(7.4e33), three_digits(0), three_digits(float("nan"))
        ('0.500', '12,346', '7.40e+33', '0', '-')

    """
    if not math.isfinite(value):
        return missing
    if value == 0:
        return "0"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:#.3g}".rstrip(".")


def measure_text(value: float | None) -> str:
    """A value that the monitor measured in a cell of a page, or a dash where there is none.

    Example::

        >>> measure_text(0.98), measure_text(None), measure_text(math.nan)
        ('0.980', '–', '–')

    """  # noqa: RUF002
    return MISSING if value is None else three_digits(value, MISSING)


def metric_text(value: Any) -> str:
    """A metric of the run in a cell of a page: one that is NaN is told from one that is missing.

    Example::

        >>> metric_text(0.98), metric_text(math.nan), metric_text(None), metric_text("text, for files hold anything")
        ('0.980', 'nan', '–', 'text, for files hold anything')

    """  # noqa: RUF002
    return three_digits(value) if is_number(value) and math.isfinite(value) else fact_text(value)


def fact_text(value: Any) -> str:
    """A setting of a run in a cell of a page: numbers as they were set, to three digits.

    Example::

        >>> fact_text(0.1), fact_text(12000), fact_text(False), fact_text("AdamW"), fact_text([1, 2]), fact_text(None)
        ('0.1', '12,000', 'no', 'AdamW', '[1, 2]', '–')

    """  # noqa: RUF002
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shape_text(shape: Sequence[int], missing: str = "unknown") -> str:
    """The sizes with multiplication signs between them.

    Example::

        >>> shape_text((8, 1, 3, 3))
        '8 × 1 × 3 × 3'

    """
    return " × ".join(map(str, shape)) or missing


def two_digits(value: float) -> str:
    """A number in a sentence to two significant digits, zeros kept.

    Example::

        >>> two_digits(4.0), two_digits(0.0461), two_digits(1234.5)
        ('4.0', '0.046', '1,234')

    """
    return f"{value:,.0f}" if value >= 100 else f"{value:#.2g}".rstrip(".")


def between(low: float, high: float, sign: str = "") -> str:
    """A range in a sentence, or the one number that both ends are written as.

    Example::

        >>> between(0.25, 0.5), between(0.9, 0.901, "×")
        ('0.25 to 0.50', '×0.90')

    """
    first, last = f"{sign}{two_digits(low)}", f"{sign}{two_digits(high)}"
    return first if first == last else f"{first} to {last}"


def count(number: int, noun: str) -> str:
    """A number of things.

    Example::

        >>> count(1, "layer"), count(1200, "step")
        ('1 layer', '1,200 steps')

    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: in backticks, on one line, three at most and none too long.

    Example::

        >>> listed(["conv", "fc"]), listed(["a", "b", "c", "d"])
        ('`conv` and `fc`', '`a`, `b`, `c` and 1 more')

    """
    shown = [f"`{_on_one_line(name)}`" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        return f"{', '.join(shown)} and {len(names) - _SHOWN} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def origin(facts: Mapping[str, Any]) -> str:
    """What rotation is measured from, to stand behind "from": the initialization unless the run says otherwise.

    Example::

        >>> origin({}), origin({"reference": "pretrained.ckpt"})
        ('initialization', 'the reference weights (pretrained.ckpt)')

    """
    reference = facts.get("reference", "init")
    return "initialization" if reference in ("init", None) else f"the reference weights ({reference})"


def printable(text: str) -> str:
    r"""The text on one line, with blanks for what would move a terminal's cursor or turn its writing around.

    Example::

        >>> printable("fc\x1b[2J")
        'fc [2J'

    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _on_one_line(name: str) -> str:
    line = printable(name)
    return line if len(line) <= _NAME else f"{line[: _NAME // 2]}…{line[-_NAME // 2 :]}"
