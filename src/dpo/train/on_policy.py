"""What a policy's own responses to held-out prompts show: how far it has moved from its reference
and, where a reward is known, how good they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from dpo.config import RunConfig
from dpo.core.diagnostics import distinct_share, repeated_share
from dpo.data.tokenize import Encoder
from dpo.models.divergence import along_samples, mean_over_prompts, sample_on_policy
from dpo.models.generate import SampledResponse
from dpo.models.load import max_positions
from dpo.models.parts import is_sharded, settle
from dpo.train import ranks
from dpo.train.prepare import encode_prompts
from dpo.train.reward_source import RewardFunction


@dataclass(frozen=True)
class OnPolicyEvaluation:
    """Samples at temperature 1 for some held-out prompts, the same random numbers every time, so
    that two policies differ by what they are and not by their luck.
    """

    prompts: Sequence[Any]
    ids: Sequence[Sequence[int]]
    """The tokens of the prompts."""
    encoder: Encoder
    reference: nn.Module | None
    reward: RewardFunction | None
    samples_per_prompt: int
    max_new_tokens: int
    max_tokens: int
    precision: str
    seed: int

    def __call__(self, policy: nn.Module) -> dict[str, float]:
        """`eval/kl` (nats a response), `eval/entropy` (nats a token) and `eval/reward`, where there
        is a reference and a reward, each with its standard error over prompts; and what the samples
        are like (`_health`).

        Ranks share the prompts, unless the policy is sharded: then each has all, and keeps step.
        """
        work, numbers = partial(self._measured, policy), range(len(self.prompts))
        by_prompt = work(numbers) if is_sharded(policy) else ranks.shared_out(work, numbers)
        measured = [of_sample for of_prompt in by_prompt for of_sample in of_prompt]
        found = self._health([SampledResponse(tuple(m["ids"]), m["end"]) for m in measured])
        for name in ("kl", "entropy", "reward"):
            if name in measured[0]:
                values = np.array([m[name] for m in measured])
                mean, stderr = mean_over_prompts(values, num_prompts=len(self.prompts))
                found |= {f"eval/{name}": mean, f"eval/{name}_stderr": stderr}
        return found

    def _measured(self, policy: nn.Module, numbers: Sequence[int]) -> list[list[dict[str, Any]]]:
        """The samples of some prompts, and what is measured of each: in JSON, prompt by prompt."""
        if not numbers:
            return []
        many, ids = self.samples_per_prompt, [self.ids[i] for i in numbers]
        samples = sample_on_policy(
            policy,
            ids,
            stop_ids=self.encoder.stop_ids,
            max_new_tokens=self.max_new_tokens,
            samples_per_prompt=many,
            seed=self.seed,
            precision=self.precision,
            numbers=numbers,
        )
        columns: dict[str, Any] = {"ids": [s.ids for s in samples], "end": [s.end for s in samples]}
        if self.reference is not None:
            kl, entropy = along_samples(
                policy,
                self.reference,
                ids,
                samples,
                max_tokens=self.max_tokens,
                precision=self.precision,
            )
            settle(self.reference)
            columns |= {"kl": kl.tolist(), "entropy": entropy.tolist()}
        if self.reward is not None:
            prompts = [self.prompts[i] for i in numbers for _ in range(many)]
            texts = [self.encoder.decode(s.ids) for s in samples]
            columns["reward"] = self.reward(prompts, texts).tolist()
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [rows[start : start + many] for start in range(0, len(rows), many)]

    def _health(self, samples: Sequence[SampledResponse]) -> dict[str, float]:
        """Length, and the marks of a policy that has broken: cut, empty or repetitive responses.

        Shares but for `eval/sample_tokens`, the mean length in tokens; of 4-grams of tokens for
        `eval/repeated_4grams`, of 2-grams for `eval/distinct_2grams`.
        """
        many = len(samples)
        tokens = np.array([float(len(s.drawn)) for s in samples])
        repeated = np.array([repeated_share(s.ids) for s in samples])
        _, tokens_stderr = mean_over_prompts(tokens, num_prompts=len(self.prompts))
        mean_repeated, stderr = mean_over_prompts(repeated, num_prompts=len(self.prompts))
        return {
            "eval/truncated": sum(s.truncated for s in samples) / many,
            "eval/empty": sum(not self.encoder.decode(s.ids).strip() for s in samples) / many,
            "eval/sample_tokens": sum(len(s.drawn) for s in samples) / many,
            "eval/sample_tokens_stderr": tokens_stderr,
            "eval/repeated_4grams": mean_repeated,
            "eval/repeated_4grams_stderr": stderr,
            "eval/distinct_2grams": distinct_share([s.ids for s in samples], 2),
        }


def evaluation_on_policy(
    config: RunConfig,
    policy: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Any],
    *,
    reference: nn.Module | None,
    reward: RewardFunction | None,
    samples_per_prompt: int,
) -> OnPolicyEvaluation:
    """The evaluation of a run on some held-out prompts, with the run's settings."""
    longest = config.evaluation.max_new_tokens
    return OnPolicyEvaluation(
        prompts=prompts,
        ids=encode_prompts(
            encoder, prompts, max_new_tokens=longest, positions=max_positions(policy)
        ),
        encoder=encoder,
        reference=reference,
        reward=reward,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=longest,
        max_tokens=config.batch.max_tokens,
        precision=config.precision,
        seed=config.seed,
    )
