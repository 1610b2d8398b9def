"""What counts as a number where Python is lax: True and False do not."""

from numbers import Real
from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is a real number, of Python's, NumPy's or another make; NaN and infinities are.

    Example::

        >>> is_number(0.1), is_number(3), is_number(True), is_number("0.1")
        (True, True, False, False)

    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number of at least so many.

    Example::

        >>> is_count(3), is_count(3, least=4), is_count(3.0), is_count(True)
        (True, False, False, False)

    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
