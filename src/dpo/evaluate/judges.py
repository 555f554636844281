"""Judges: who says which of two responses to a prompt is better.

A judge that scores one response at a time prefers the higher score (`ScalarJudge`): Sentence-BERT,
the true reward, a reward model or classifier. A language model behind an endpoint sees both
responses at once (`endpoint.py`). What each measures and how it errs: docs/judges.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dpo.config import RewardSourceConfig
from dpo.data.rows import Prompt
from dpo.evaluate.endpoint import open_endpoint_judge
from dpo.evaluate.matchups import Matchup
from dpo.evaluate.records import Verdict
from dpo.evaluate.sbert import TIE_TOLERANCE, SentenceScorer, cosine_margins
from dpo.evaluation_config import EvaluateConfig, JudgeName
from dpo.train.reward_source import RewardFunction, open_reward

Floats = NDArray[np.float64]


class Judge(Protocol):
    """Compares responses, two at a time."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    def compare(self, matchups: Sequence[Matchup]) -> list[Verdict]:
        """A verdict for each matchup, from the side of its response a; in their order.

        A verdict depends on its own matchup alone, and that of the swapped matchup is its mirror.
        """

    def describe(self) -> dict[str, Any]:
        """What decides its verdicts, and what came up while it judged; never a secret."""


class Candidate(NamedTuple):
    """A response to be scored, with its prompt and that prompt's preference pair."""

    prompt: Prompt
    chosen: str
    rejected: str
    response: str


@dataclass(frozen=True)
class ScalarJudge:
    """The response of higher score wins; scores within `TIE_TOLERANCE` of each other tie."""

    name: str
    score: Callable[[Sequence[Candidate]], Floats]
    """Scores of responses, (N,), finite."""
    source: dict[str, Any]
    """What identifies the scores: model, digest."""

    def compare(self, matchups: Sequence[Matchup]) -> list[Verdict]:
        """Each distinct response is scored once, in an order that is that of the texts alone: a
        batch's company moves float32 scores by their last bits, which must not decide a verdict.
        """
        sides = [_candidates(matchup) for matchup in matchups]
        distinct = sorted({candidate for pair in sides for candidate in pair}, key=repr)
        scores = dict(zip(distinct, self.score(distinct).tolist(), strict=True))
        return [_verdict(scores[a] - scores[b]) for a, b in sides]

    def describe(self) -> dict[str, Any]:
        return {"kind": "scalar", **self.source, "tie_tolerance": TIE_TOLERANCE}


def _candidates(m: Matchup) -> tuple[Candidate, Candidate]:
    a = Candidate(m.prompt, m.chosen, m.rejected, m.response_a)
    return a, a._replace(response=m.response_b)


def _verdict(difference: float) -> Verdict:
    if abs(difference) <= TIE_TOLERANCE:
        return "tie"
    return "win" if difference > 0 else "loss"


def sentence_judge(embed: SentenceScorer) -> ScalarJudge:
    """Sentence-BERT: `score(y) = cos(y, chosen) - cos(y, rejected)` of the prompt's pair.

    The score is made from the chosen response, so as a contestant that one starts ahead: its own
    score is `1 - cos(chosen, rejected)`, which only a response further along can pass.
    """

    def score(candidates: Sequence[Candidate]) -> Floats:
        return cosine_margins(
            embed,
            [candidate.response for candidate in candidates],
            [candidate.chosen for candidate in candidates],
            [candidate.rejected for candidate in candidates],
        )

    return ScalarJudge("sentence_bert", score, {"model": embed.name})


def reward_judge(name: JudgeName, reward: RewardFunction) -> ScalarJudge:
    """A reward as a judge: the true one, a reward model, a classifier or the user's function."""

    def score(candidates: Sequence[Candidate]) -> Floats:
        prompts = [candidate.prompt for candidate in candidates]
        responses = [candidate.response for candidate in candidates]
        return np.asarray(reward(prompts, responses), dtype=np.float64)

    return ScalarJudge(name, score, {"model": reward.name, "digest": reward.digest})


def open_judges(
    config: EvaluateConfig, embed: SentenceScorer, *, trust_remote_code: bool = False
) -> list[Judge]:
    """The judges that a configuration names, in its order, ready to judge.

    Raises:
        InputError: a model, function or key that is named cannot be had.
    """

    def opened(name: JudgeName) -> Judge:
        if name == "sentence_bert":
            return sentence_judge(embed)
        if name == "endpoint":
            assert config.endpoint is not None
            return open_endpoint_judge(config.endpoint)
        truth = RewardSourceConfig(function="synthetic")
        source = truth if name == "true_reward" else config.reward
        assert source is not None
        reward = open_reward(
            source, precision=config.precision, trust_remote_code=trust_remote_code
        )
        return reward_judge(name, reward)

    return [opened(name) for name in config.judges]
