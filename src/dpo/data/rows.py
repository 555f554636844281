"""The rows that everything downstream reads: validated, in one shape, each knowing where it came
from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


Prompt = str | tuple[Message, ...]
"""A prompt is text, or a conversation whose next turn the assistant takes."""


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """One prompt with a chosen and a rejected response, and the place it was read from
    (`prefs.jsonl:417`); `scores` of the two where the data rates them; `subset`, the name of the
    part of the data that it belongs to, where the data says.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    source: str = field(default="", compare=False)
    scores: tuple[float, float] | None = None
    subset: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class RankedRow:
    """One prompt with responses, best first; `scores` (same order, non-increasing) where the data
    has them.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    source: str = field(default="", compare=False)
    subset: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class UnpairedRow:
    """One prompt with one completion, labelled desirable (True) or undesirable (False)."""

    prompt: Prompt
    completion: str
    label: bool
    source: str = field(default="", compare=False)
    subset: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class DemonstrationRow:
    """One prompt with one response to imitate, for supervised fine-tuning."""

    prompt: Prompt
    response: str
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt alone, for those who sample the responses themselves."""

    prompt: Prompt
    source: str = field(default="", compare=False)


Row = PreferenceRow | RankedRow | UnpairedRow | DemonstrationRow | PromptRow
