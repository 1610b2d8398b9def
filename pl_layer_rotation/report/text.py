"""Numbers and shapes as a reader sees them, the same in table, page and figures."""

import math
from collections.abc import Sequence


def three_digits(value: float, missing: str = "-") -> str:
    """A measured value to three significant digits, zeros kept so that columns line up.

    Example::

        >>> three_digits(0.5), three_digits(12345.6), three_digits(float("nan"))
        ('0.500', '12,346', '-')

    """
    if not math.isfinite(value):
        return missing
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def shape_text(shape: Sequence[int], missing: str = "unknown") -> str:
    """The sizes with multiplication signs between them.

    Example::

        >>> shape_text((8, 1, 3, 3))
        '8 × 1 × 3 × 3'

    """
    return " × ".join(map(str, shape)) or missing
