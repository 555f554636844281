"""What evaluation passes around: a generated response, and the same with its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["model", "null"]
Verdict = Literal["win", "loss", "tie"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One response to one prompt of the evaluation set, with that prompt's preference pair.

    `prompt_index` is the prompt's place in the evaluation set, `sample` numbers several responses
    to it. A null response (`kind="null"`) has no temperature and no token count.
    """

    model: str
    temperature: float | None
    prompt_index: int
    sample: int
    prompt: str
    chosen: str
    rejected: str
    generated: str
    num_tokens: int | None
    truncated: bool
    kind: Kind = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGeneration(Generation):
    """A generation with its cosines to chosen and rejected: `margin` is chosen minus rejected."""

    cos_chosen: float
    cos_rejected: float
    margin: float
    verdict: Verdict
