"""Numbers and texts as a page shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpo.report.page.folders import number

CHANCE = 0.5

ROUNDING = 1e-8
"""Below this a measured number is what rounding left of 0."""


def decimal(value: object, digits: int = 4) -> str:
    """A number with four significant digits, 0 where it is rounding; text that is no number as it
    is.

    >>> decimal(0.123456), decimal("12345678"), decimal("a name")
    ('0.1235', '12345678', 'a name')
    """
    if value is None or value == "":
        return ""
    if isinstance(value, bool) or math.isnan(number(value)):
        return str(value)
    found = number(value)
    if abs(found) < ROUNDING:
        return "0"
    if found.is_integer() and abs(found) < 1e15:
        return f"{found:.0f}"
    return f"{found:.{digits}g}"


def share(value: object) -> str:
    """A share within [0, 1] as a percentage; empty where it is not known."""
    return "" if math.isnan(number(value)) else f"{number(value):.1%}"


def points(value: object) -> str:
    """A difference of shares, in percentage points with its sign."""
    return "" if math.isnan(number(value)) else f"{100 * number(value):+.1f}"


def interval_of_shares(low: object, high: object) -> str:
    """`[58.1%, 67.7%]`"""
    known = not math.isnan(number(low) + number(high))
    return f"[{number(low):.1%}, {number(high):.1%}]" if known else ""


def p_value(value: object) -> str:
    """`p = 0.012`, never 0."""
    p = number(value)
    if math.isnan(p):
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


def duration(seconds: object) -> str:
    """`48 s`, `12 min`, `3.4 h`; empty where it is not known."""
    value = number(seconds)
    if math.isnan(value):
        return ""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
