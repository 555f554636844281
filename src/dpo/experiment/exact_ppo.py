"""PPO in the enumerable world: its models, its rollouts and its clipped steps, on one page."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import deepcopy
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from dpo.core.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_k1,
    penalised_rewards,
    whiten,
)
from dpo.experiment.exact_config import PPOSettings
from dpo.experiment.exact_methods import Fit, Snapshot, Start, descend, draw_prompts, snapshots
from dpo.experiment.exact_world import LENGTH, Scorer, sample, token_logps


class Rollouts(NamedTuple):
    """Responses of the policy as it was when they were drawn: (B,) the first two, others (B, T)."""

    prompts: Tensor
    responses: Tensor
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def ppo(
    start: Start,
    scores: Tensor,
    settings: PPOSettings,
    *,
    beta: float,
    checkpoints: Collection[int],
    generator: torch.Generator,
) -> Iterator[Snapshot]:
    """Maximise the expected score less `beta` KL to the reference, by PPO.

    Args:
        scores: of every response to every prompt, (P, Y): the true reward, or a reward model's. A
            reward model is frozen, so that its scores are computed once.
    """
    policy, critic = deepcopy(start.reference), Scorer(start.reference)
    minibatches = chain.from_iterable(
        _shuffled(
            _roll_out(start, policy, critic, scores, settings, beta, generator), settings, generator
        )
        for _ in range(settings.rounds)
    )

    def loss() -> Tensor:
        batch = next(minibatches)
        mask = torch.ones_like(batch.logps)
        return clipped_policy_loss(
            token_logps(policy, batch.prompts, batch.responses),
            batch.logps,
            batch.advantages,
            mask,
            clip=settings.clip,
        ) + clipped_value_loss(
            critic(batch.prompts, batch.responses)[:, :LENGTH],
            batch.values,
            batch.returns,
            mask,
            clip=settings.value_clip,
        )

    fit = Fit(settings.steps, settings.minibatch_size, settings.learning_rate, checkpoints)
    return snapshots(policy, descend(chain(policy.parameters(), critic.parameters()), loss, fit))


@torch.no_grad()
def _roll_out(
    start: Start,
    policy: GPT2LMHeadModel,
    critic: Scorer,
    scores: Tensor,
    settings: PPOSettings,
    beta: float,
    generator: torch.Generator,
) -> Rollouts:
    """Draw responses, and say what was better about each word than expected, whitened."""
    prompts = draw_prompts(start.world, settings.rollouts, generator)
    responses = sample(policy, prompts, generator)
    logps = token_logps(policy, prompts, responses)
    values = critic(prompts, responses)[:, :LENGTH]
    mask = torch.ones_like(logps)
    kl = kl_k1(logps, token_logps(start.reference, prompts, responses))
    rewards = penalised_rewards(scores[prompts, responses], kl, mask, coefficient=beta)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=settings.gae_lambda)
    return Rollouts(prompts, responses, logps, values, whiten(advantages, mask), returns)


def _shuffled(
    rollouts: Rollouts, settings: PPOSettings, generator: torch.Generator
) -> Iterator[Rollouts]:
    """The minibatches of a round."""
    for _ in range(settings.epochs):
        order = torch.randperm(settings.rollouts, generator=generator)
        for rows in order.split(settings.minibatch_size):
            yield Rollouts(*(values[rows] for values in rollouts))
