"""What evaluation passes around: a generated response, the same with its verdict, and the
responses of one responder by prompt.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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


class Responder(NamedTuple):
    """Who responded: one line of the table."""

    kind: Kind
    model: str
    temperature: float | None


SamplesByPrompt = dict[int, list[ScoredGeneration]]
"""One responder's scored samples by the index of their prompt."""


def by_responder(scored: Iterable[ScoredGeneration]) -> dict[Responder, SamplesByPrompt]:
    """Every responder's samples by prompt, in order of appearance."""
    responders: dict[Responder, SamplesByPrompt] = {}
    for record in scored:
        responder = Responder(record.kind, record.model, record.temperature)
        prompts = responders.setdefault(responder, defaultdict(list))
        prompts[record.prompt_index].append(record)
    return responders


def win_share(samples: Iterable[ScoredGeneration]) -> float | None:
    """Wins among the decided responses; None where there is none."""
    verdicts = Counter(record.verdict for record in samples)
    decided = verdicts["win"] + verdicts["loss"]
    return verdicts["win"] / decided if decided else None


def prompts_won(won: Sequence[bool], prompts: Sequence[Hashable]) -> tuple[int, int]:
    """How many prompts are won by majority, and how many lost: one vote a prompt, however many
    decided comparisons it has.

    Args:
        won: whether each decided comparison was won.
        prompts: of which prompt each is.

    >>> prompts_won([True, True, False, False, True, False], ["a", "a", "a", "b", "c", "c"])
    (1, 1)
    """
    lead: Counter[Hashable] = Counter()  # wins less losses of each prompt
    for prompt, win in zip(prompts, won, strict=True):
        lead[prompt] += 1 if win else -1
    return sum(n > 0 for n in lead.values()), sum(n < 0 for n in lead.values())
