"""One noisy judge for pairs, rankings and judged responses alike, so that losses can be compared.

The judge rates every answer `u = r*(x, y) + g`, g standard Gumbel noise, drawn once an answer. The
order of several ratings is then a draw of the Plackett-Luce model under the true reward, and of
two, of the Bradley-Terry model: the difference of two Gumbel variables is logistic (Yellott 1977).
So pairs, rankings and judged responses that are made of the same ratings say the same thing about
the same answers, in three forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo.data.rows import PreferenceRow, RankedRow
from dpo.data.synthetic import World

LIST_SIZE = 4
"""Answers in a ranking; every ranking gives two pairs, and these four judged responses."""


@dataclass(frozen=True, slots=True)
class RatedRows:
    """The same rated answers as rankings and as pairs."""

    rankings: tuple[RankedRow, ...]
    pairs: tuple[PreferenceRow, ...]


def rated_rows(
    world: World, prompts: Sequence[str], answers: Sequence[Sequence[str]], *, seed: int
) -> RatedRows:
    """Rank each four consecutive answers to a question; pair the first two and the last two.

    The score of an answer is the share of the other answers to its question that are rated below
    it: in [0, 1], 1/2 on average, in the order of the ratings. It is SPPO's estimate of how often
    an answer is preferred to the policy's own. Equal answers teach nothing: such pairs are left
    out, and rankings of nothing else. A ranking with some equal answers keeps them.

    Args:
        answers: those to each prompt; a multiple of four, at least four.
        seed: of the judge's noise.
    """
    rng = np.random.default_rng([seed, 3])
    rankings: list[RankedRow] = []
    pairs: list[PreferenceRow] = []
    for prompt, texts in zip(prompts, answers, strict=True):
        assert len(texts) % LIST_SIZE == 0
        rewards = np.array([world.reward(prompt, text) for text in texts])
        scores = shares_below(rewards + rng.gumbel(size=len(texts)))
        for start in range(0, len(texts), LIST_SIZE):
            members = range(start, start + LIST_SIZE)
            if len({texts[i] for i in members}) > 1:
                rankings.append(_ranking(prompt, texts, scores, members))
            pairs += [
                _pair(prompt, texts, scores, members[i : i + 2])
                for i in range(0, LIST_SIZE, 2)
                if texts[members[i]] != texts[members[i + 1]]
            ]
    return RatedRows(tuple(rankings), tuple(pairs))


def shares_below(ratings: NDArray[np.float64]) -> list[float]:
    """For each rating the share of the others that are below it.

    >>> shares_below(np.array([0.3, -1.0, 2.5]))
    [0.5, 0.0, 1.0]
    """
    places = ratings.argsort().argsort()
    return [float(place) / (len(ratings) - 1) for place in places]


def _ranking(
    prompt: str, texts: Sequence[str], scores: Sequence[float], members: Sequence[int]
) -> RankedRow:
    order = sorted(members, key=lambda i: -scores[i])
    return RankedRow(prompt, tuple(texts[i] for i in order), tuple(scores[i] for i in order))


def _pair(
    prompt: str, texts: Sequence[str], scores: Sequence[float], members: Sequence[int]
) -> PreferenceRow:
    chosen, rejected = sorted(members, key=lambda i: -scores[i])
    return PreferenceRow(
        prompt, texts[chosen], texts[rejected], scores=(scores[chosen], scores[rejected])
    )


def label_accuracy(world: World, pairs: Sequence[PreferenceRow]) -> float:
    """Share of pairs whose label is what the true reward says, equal rewards counted half: about
    the best that a policy trained on such labels can reach.
    """
    hits = 0.0
    for pair in pairs:
        assert isinstance(pair.prompt, str)
        gap = world.reward(pair.prompt, pair.chosen) - world.reward(pair.prompt, pair.rejected)
        hits += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
    return hits / len(pairs)
