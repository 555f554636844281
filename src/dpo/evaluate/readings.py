"""What a diagnosis says in plain language: how serious, what was found, what to do about it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dpo.core.stats import Interval
from dpo.errors import InputError

Level = Literal["ok", "note", "warning"]
"""note: worth knowing. warning: look before you use the model."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One finding. `what_to_do` is empty where there is nothing to do."""

    level: Level
    title: str
    sentence: str
    what_to_do: str = ""

    def raised(self, level: Level, more: str, what_to_do: str) -> Reading:
        """The same finding where it is remarkable: what else there is to say, and what to do."""
        sentence = f"{self.sentence} {more}"
        return replace(self, level=level, sentence=sentence, what_to_do=what_to_do)


Found = tuple[dict[str, Any], list[Reading]]
"""The numbers of a topic and their readings."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The numbers of a run or an evaluation, by topic, and what they mean."""

    kind: Literal["run", "evaluation"]
    numbers: dict[str, Any]
    """Ready for JSON; an interval is [low, high] at 95%."""
    readings: list[Reading]

    @property
    def remarkable(self) -> list[Reading]:
        """Warnings, then notes."""
        return [r for level in ("warning", "note") for r in self.readings if r.level == level]


def percent(share: float) -> str:
    """`0.123` as `12%`."""
    return f"{share:.0%}"


def percents(interval: Interval) -> str:
    """An interval of shares as `[10%, 25%]`."""
    return f"[{interval.low:.0%}, {interval.high:.0%}]"


def span(interval: Interval, digits: int = 2) -> str:
    """An interval as `[-0.10, +0.25]`."""
    return f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file written by this package; empty where there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    if not file.is_file():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise InputError(f"{file}: expected a JSON object a line; it is damaged.") from error
    return rows


def differ(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two (mean, standard error) are more than 1.96 standard errors of their difference
    apart. That takes them for independent, which is cautious where they share their prompts.
    """
    return abs(a[0] - b[0]) > 1.96 * math.hypot(a[1], b[1])


def join(names: Sequence[str], most: int = 5) -> str:
    """`a, b and 3 more`."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
