"""Rollouts: sampled responses with everything that PPO must know of how they were drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpo.core.ppo import (
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    penalised_rewards,
    sampled_entropy,
    whiten,
)
from dpo.data.order import split_among
from dpo.data.pack import packed_tokens
from dpo.models.actor_critic import ActorCritic, token_mask
from dpo.models.plan import as_evaluated
from dpo.models.scoring import MAX_LOGIT_BYTES, response_token_logps
from dpo.train import ranks
from dpo.train.samples import Samples

KL_ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}


@dataclass(frozen=True)
class Rollouts:
    """R responses and, of each of their tokens, (R, T) on the CPU, float64, 0 in the padding:"""

    samples: Samples
    logps: Tensor
    """of the policy that drew them"""
    reference_logps: Tensor
    values: Tensor
    """of the value function as it was then"""

    @property
    def mask(self) -> Tensor:
        """(R, T). Nothing stands after a response's end token, so there is nothing to mask out."""
        return token_mask(self.samples.sequences)

    @property
    def scores(self) -> Tensor:
        """What the reward source says of each response, (R,)."""
        return self.samples.rewards.flatten()

    def kl(self, estimator: str) -> Tensor:
        """The estimate of KL(policy || reference) of each token, (R, T)."""
        return KL_ESTIMATORS[estimator](self.logps, self.reference_logps)

    def metrics(self) -> dict[str, float]:
        """What is logged of a round, per response: KL in nats, both estimates; and per token: the
        policy's entropy.
        """
        of_samples = self.samples.metrics()
        kept = ("samples/reward", "samples/truncated", "samples/tokens")
        return {
            **{name: of_samples[name] for name in kept},
            **{f"samples/kl_{name}": self.kl(name).sum(-1).mean().item() for name in KL_ESTIMATORS},
            "samples/entropy": sampled_entropy(self.logps, self.mask).item(),
        }

    def as_tensors(self) -> dict[str, Tensor]:
        """The same in tensors, for a checkpoint."""
        return {
            **self.samples.as_tensors(),
            "logps": self.logps,
            "reference_logps": self.reference_logps,
            "values": self.values,
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Rollouts:
        return Rollouts(
            Samples.from_tensors(tensors),
            tensors["logps"],
            tensors["reference_logps"],
            tensors["values"],
        )


def roll_out(
    policy: ActorCritic,
    reference: nn.Module,
    samples: Samples,
    *,
    max_tokens: int,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
    precision: str = "fp32",
) -> Rollouts:
    """Score the policy's own samples as training will score them, under policy and reference.

    The sampler's own log-probabilities are not used: it adds in another order, and a ratio that
    begins at anything but 1 is a step that nobody asked for. Of several ranks each scores its
    share, about as many tokens, and has all values.
    """
    sequences = samples.sequences
    own = _share(samples)
    longest = max(s.num_scored for s in sequences)
    found = torch.zeros(3, len(sequences), longest, dtype=torch.float64)
    if own:
        members = [sequences[i] for i in own]
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "max_logit_bytes": max_logit_bytes,
            "precision": precision,
        }
        with as_evaluated(policy):
            logps, values = policy(members, **options)
        with as_evaluated(reference):
            reference_logps = response_token_logps(reference, members, **options)
        for place, tensor in enumerate((logps, reference_logps, values)):
            found[place, own, : tensor.shape[1]] = tensor.cpu()
    ranks.sum_in_place(found)  # each value is one rank's, and 0 on the others
    return Rollouts(samples, *found)


def _share(samples: Samples) -> list[int]:
    """The responses that this rank scores; those to one prompt stay together, for they share it."""
    many = samples.rewards.shape[1]
    prompts = [range(start, start + many) for start in range(0, len(samples.sequences), many)]
    costs = [packed_tokens([samples.sequences[i] for i in prompt]) for prompt in prompts]
    shares = split_among(costs, parts=ranks.size())
    return [i for p in shares[ranks.rank()] for i in prompts[p]]


@dataclass(frozen=True)
class Targets:
    """What a round's steps aim at, (R, T) each, 0 in the padding."""

    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]


def make_targets(
    rollouts: Rollouts,
    *,
    kl_coefficient: float,
    kl_estimator: str,
    missing_eos_penalty: float,
    gamma: float,
    gae_lambda: float,
    whitened: bool,
) -> Targets:
    """Rewards, advantages and returns of a round.

    The reward is the score, less `missing_eos_penalty` where the token limit ended the response, at
    its last token, and `-kl_coefficient` times the KL's estimate at every token. Advantages are
    whitened over all tokens of the round.
    """
    mask = rollouts.mask
    scores = rollouts.scores - missing_eos_penalty * rollouts.samples.truncated.double()
    kl = rollouts.kl(kl_estimator)
    rewards = penalised_rewards(scores, kl, mask, coefficient=kl_coefficient)
    advantages, returns = gae(rewards, rollouts.values, mask, gamma=gamma, lam=gae_lambda)
    metrics = {
        "samples/penalised_reward": rewards.sum(-1).mean().item(),
        "ppo/explained_variance": explained_variance(rollouts.values, returns, mask).item(),
        "ppo/kl_coefficient": kl_coefficient,
    }
    return Targets(whiten(advantages, mask) if whitened else advantages, returns, metrics)
