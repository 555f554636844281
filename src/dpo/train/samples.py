"""Samples of the policy with their rewards, and the preferences that they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dpo.data.order import epoch_order
from dpo.data.rows import Prompt, RankedRow
from dpo.data.sources import write_jsonl
from dpo.data.tokenize import Encoder, TokenSequence
from dpo.models.generate import generate
from dpo.online_config import SamplingConfig
from dpo.train import ranks
from dpo.train.encoded import EncodedPair, EncodedRanking
from dpo.train.reward_source import RewardFunction


@dataclass(frozen=True)
class Samples:
    """K responses to each of P prompts, prompt after prompt, and their rewards."""

    sequences: list[TokenSequence]
    """(P * K,)"""
    rewards: Tensor
    """(P, K), float64"""
    truncated: Tensor
    """(P * K,), whether the token limit ended the response; then it has no end token."""

    def of_prompt(self, p: int) -> tuple[list[TokenSequence], list[float]]:
        """The responses to a prompt and their rewards, best first; ties as they were drawn."""
        rewards: list[float] = self.rewards[p].tolist()
        start = p * len(rewards)
        order = sorted(range(len(rewards)), key=lambda k: -rewards[k])
        return [self.sequences[start + k] for k in order], [rewards[k] for k in order]

    def metrics(self) -> dict[str, float]:
        """What is logged of a round."""
        best, worst = self.rewards.amax(1), self.rewards.amin(1)
        return {
            "samples/reward": self.rewards.mean().item(),
            "samples/reward_best": best.mean().item(),
            "samples/equal_rewards": (best == worst).double().mean().item(),
            "samples/truncated": self.truncated.double().mean().item(),
            "samples/tokens": sum(s.num_scored for s in self.sequences) / len(self.sequences),
        }

    def as_tensors(self) -> dict[str, Tensor]:
        """The same in tensors, for a checkpoint."""
        return {
            "ids": torch.tensor([i for sequence in self.sequences for i in sequence.ids]),
            "lengths": torch.tensor([len(sequence) for sequence in self.sequences]),
            "prompt_lengths": torch.tensor([s.prompt_length for s in self.sequences]),
            "rewards": self.rewards,
            "truncated": self.truncated,
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Samples:
        pieces = tensors["ids"].split(tensors["lengths"].tolist())
        sequences = [
            TokenSequence(tuple(ids.tolist()), length)
            for ids, length in zip(pieces, tensors["prompt_lengths"].tolist(), strict=True)
        ]
        return Samples(sequences, tensors["rewards"], tensors["truncated"])


@dataclass(frozen=True)
class Sampler:
    """Draws and scores the samples of a round, a function of the policy, the seed and the round."""

    prompts: Sequence[Prompt]
    """Every training prompt, once."""
    ids: Sequence[Sequence[int]]
    """The tokens of the prompts."""
    encoder: Encoder
    reward: RewardFunction
    settings: SamplingConfig
    prompts_per_round: int
    samples_per_prompt: int
    precision: str
    seed: int
    folder: Path
    """The run's `samples`, where each round is written as rankings, to look at or to train on."""

    def chosen(self, number: int) -> list[int]:
        """The prompts of a round: the next in a seeded order that goes through all, again and
        again.
        """
        total = len(self.prompts)
        first = number * self.prompts_per_round
        places = [divmod(k, total) for k in range(first, first + self.prompts_per_round)]
        return [int(epoch_order(total, seed=self.seed, epoch=e)[place]) for e, place in places]

    def __call__(self, policy: nn.Module, number: int) -> Samples:
        """The samples of round `number`, counted from 0. Of several ranks each draws and scores
        those of its share of the prompts, and has all of them.
        """
        chosen = self.chosen(number)
        by_prompt = ranks.shared_out(partial(self._draw, policy, number), list(enumerate(chosen)))
        sequences = [
            TokenSequence((*self.ids[i], *drawn), len(self.ids[i]))
            for i, responses in zip(chosen, by_prompt, strict=True)
            for drawn, _, _ in responses
        ]
        rewards = [[reward for _, _, reward in responses] for responses in by_prompt]
        truncated = [cut for responses in by_prompt for _, cut, _ in responses]
        samples = Samples(
            sequences, torch.tensor(rewards, dtype=torch.float64), torch.tensor(truncated)
        )
        with ranks.together():
            if ranks.is_first():
                self._write(number, [self.prompts[i] for i in chosen], samples)
        return samples

    def _draw(
        self, policy: nn.Module, number: int, prompts: Sequence[tuple[int, int]]
    ) -> list[list[tuple[tuple[int, ...], bool, float]]]:
        """Responses to some prompts of a round, each given by its place there and its number among
        all: what was drawn, whether the token limit cut it, and its reward.

        A response's random numbers belong to its place in the round.
        """
        many = self.samples_per_prompt
        members = [i for _, i in prompts for _ in range(many)]
        responses = generate(
            policy,
            [self.ids[i] for i in members],
            keys=[
                f"round/{number}/{place * many + k}" for place, _ in prompts for k in range(many)
            ],
            temperature=self.settings.temperature,
            max_new_tokens=self.settings.max_new_tokens,
            stop_ids=self.encoder.stop_ids,
            seed=self.seed,
            batch_size=self.settings.batch_size,
            precision=self.precision,
        )
        texts = [self.encoder.decode(response.ids) for response in responses]
        rewards = self._rewards([self.prompts[i] for i in members], texts).tolist()
        found = [
            (response.drawn, response.truncated, reward)
            for response, reward in zip(responses, rewards, strict=True)
        ]
        return [found[start : start + many] for start in range(0, len(found), many)]

    def _rewards(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        """A response drawn twice is scored once: rounding must not prefer one of two equal ones."""
        answers = list(zip(prompts, texts, strict=True))
        place = {answer: i for i, answer in enumerate(dict.fromkeys(answers))}
        rewards = self.reward([prompt for prompt, _ in place], [text for _, text in place])
        return rewards[[place[answer] for answer in answers]]

    def _write(self, number: int, prompts: Sequence[Prompt], samples: Samples) -> None:
        rows = []
        for p, prompt in enumerate(prompts):
            sequences, rewards = samples.of_prompt(p)
            texts = [self.encoder.decode(x.ids[x.prompt_length :]) for x in sequences]
            rows.append(RankedRow(prompt, tuple(texts), tuple(rewards)))
        self.folder.mkdir(exist_ok=True)
        write_jsonl(rows, self.folder / f"{round_name(number)}.jsonl")


def round_name(number: int) -> str:
    """`round-0001` for the first."""
    return f"round-{number + 1:04d}"


# -- preferences -----------------------------------------------------------------------------------


def make_pairs(
    samples: Samples, *, pairs: str, labels: str, draws: np.random.Generator, source: str
) -> list[EncodedPair]:
    """Preference pairs of scored samples, prompt after prompt.

    Args:
        samples: P prompts with K responses each.
        pairs: "best_worst", one pair a prompt; or "all", each of the K(K-1)/2.
        labels: "hard", the higher reward is chosen and equal rewards make no pair; "bradley_terry",
            `P(y is chosen) = sigmoid(r(y) - r(y'))`, equal rewards included.
        draws: decides Bradley-Terry labels.
        source: where the samples are to be found; a pair names the line of its prompt.

    Two responses of the same tokens make no pair.
    """
    made: list[EncodedPair] = []
    for p in range(len(samples.rewards)):
        sequences, rewards = samples.of_prompt(p)
        for better, worse in _compared(len(rewards), pairs):
            gap = rewards[better] - rewards[worse]
            if labels == "bradley_terry":
                if draws.random() * (1 + math.exp(-gap)) >= 1:
                    better, worse = worse, better
            elif gap == 0:
                continue
            if sequences[better] != sequences[worse]:
                scores = rewards[better], rewards[worse]
                pair = EncodedPair(sequences[better], sequences[worse], f"{source}:{p + 1}", scores)
                made.append(pair)
    return made


def _compared(num_responses: int, pairs: str) -> Iterator[tuple[int, int]]:
    """Places of the responses that are compared, among those of a prompt, best first."""
    if pairs == "all":
        yield from itertools.combinations(range(num_responses), 2)
    else:
        yield 0, num_responses - 1


def make_rankings(samples: Samples, *, source: str) -> list[EncodedRanking]:
    """The responses to each prompt by their rewards, equal ones tied; none where all are equal."""
    made: list[EncodedRanking] = []
    for p in range(len(samples.rewards)):
        sequences, rewards = samples.of_prompt(p)
        distinct = sorted(set(rewards), reverse=True)
        if len(distinct) > 1:
            ranks = tuple(distinct.index(reward) for reward in rewards)
            where = f"{source}:{p + 1}"
            made.append(EncodedRanking(tuple(sequences), ranks, where, tuple(rewards)))
    return made
