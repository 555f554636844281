"""Ways to a policy in the enumerable world, each in a few lines: imitation, preferences, rewards.

Every method starts from the same reference and is one loop (`descend`) over one loss. It is an
iterator of snapshots: the whole policy as a table, after some of its steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from dpo.core.exact import World
from dpo.core.reference_free import nll
from dpo.core.rewards import bradley_terry_log_prob, bradley_terry_nll
from dpo.errors import DivergedError
from dpo.experiment.exact_world import LENGTH, Scorer, log_policy, sample, token_logps

MAX_GRADIENT_NORM = 1.0

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Log-probabilities of the chosen and the rejected response under the policy, then under the
reference, (B,) each; returns the loss of each pair, (B,).
"""


@dataclass(frozen=True, slots=True)
class Fit:
    """How long a loss is followed, and how fast."""

    steps: int
    batch_size: int
    learning_rate: float
    checkpoints: Collection[int]
    """After which steps the policy is looked at, beside the last."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A policy on its way. Processor seconds, of training alone."""

    step: int
    seconds: float
    log_policy: Tensor


@dataclass(frozen=True, slots=True)
class Start:
    """What all methods of a seed share: the reference as a model, and as a table in its world."""

    reference: GPT2LMHeadModel
    world: World

    def reference_logps(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """log pi_ref of these responses, (B,), float32."""
        return self.world.log_ref[prompts, responses].float()


@dataclass(frozen=True, slots=True)
class Pairs:
    """Prompts and, for each, the response that was preferred and the one that was not, (N,)."""

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Tensor | slice) -> Pairs:
        return Pairs(self.prompts[index], self.chosen[index], self.rejected[index])

    def covered(self, shape: torch.Size) -> Tensor:
        """Which responses of which prompts occur in the pairs, a boolean table."""
        seen = torch.zeros(shape, dtype=torch.bool)
        seen[self.prompts, self.chosen] = True
        seen[self.prompts, self.rejected] = True
        return seen


# -- data ----------------------------------------------------------------------------------------


def draw_prompts(world: World, count: int, generator: torch.Generator) -> Tensor:
    """Prompts by their probabilities, (count,)."""
    return torch.multinomial(world.prompt_probs, count, replacement=True, generator=generator)


def draw_responses(log_policy: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """One response to each prompt from a table of log-probabilities, (B,).

    The first response whose cumulative probability is above a uniform number.
    """
    uniform = torch.rand(len(prompts), 1, generator=generator, dtype=log_policy.dtype)
    cumulative = log_policy.exp().cumsum(dim=-1)
    responses = torch.zeros_like(prompts)
    for prompt in prompts.unique():
        own = prompts == prompt
        scaled = uniform[own, 0] * cumulative[prompt, -1]
        responses[own] = torch.searchsorted(cumulative[prompt], scaled, right=True)
    return responses


def label(
    world: World, prompts: Tensor, first: Tensor, second: Tensor, generator: torch.Generator
) -> Pairs:
    """Pairs as a Bradley-Terry judge of the true reward orders them.

    A pair of equal responses stays: no loss of a difference learns from it.
    """
    log_p = bradley_terry_log_prob(world.reward[prompts, first], world.reward[prompts, second])
    uniform = torch.rand(len(prompts), generator=generator, dtype=log_p.dtype)
    first_wins = uniform < log_p.exp()
    return Pairs(
        prompts, torch.where(first_wins, first, second), torch.where(first_wins, second, first)
    )


def sample_pairs(world: World, log_policy: Tensor, count: int, generator: torch.Generator) -> Pairs:
    """Pairs of independent responses of a policy, labelled by Bradley-Terry."""
    prompts = draw_prompts(world, count, generator)
    first = draw_responses(log_policy, prompts, generator)
    second = draw_responses(log_policy, prompts, generator)
    return label(world, prompts, first, second, generator)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches without end: every pass in a new order, its short remainder left out.

    Fewer than `size` are one batch.
    """
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].split(size)


# -- the loop ------------------------------------------------------------------------------------


def descend(
    parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], fit: Fit
) -> Iterator[tuple[int, float]]:
    """Follow a loss with AdamW, its rate falling linearly to 0; step and seconds at checkpoints.

    Seconds are the processor's, so that what else runs on the machine does not count. The clock
    stands still while a checkpoint is looked at.

    Raises:
        DivergedError: a loss is not finite.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=fit.learning_rate, weight_decay=0.0, fused=True)
    seconds = 0.0
    for step in range(1, fit.steps + 1):
        begun = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = fit.learning_rate * (1 - (step - 1) / fit.steps)
        optimizer.zero_grad()
        value = loss()
        if not value.isfinite():
            raise DivergedError(f"Step {step}: the loss is {value.item()}.")
        value.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizer.step()
        seconds += time.process_time() - begun
        if step in fit.checkpoints or step == fit.steps:
            yield step, seconds


def snapshots(policy: GPT2LMHeadModel, passed: Iterable[tuple[int, float]]) -> Iterator[Snapshot]:
    """The policy at each checkpoint that a loop comes to."""
    for step, seconds in passed:
        yield Snapshot(step, seconds, log_policy(policy))


# -- the methods ---------------------------------------------------------------------------------


def imitate(
    policy: GPT2LMHeadModel,
    prompts: Tensor,
    responses: Tensor,
    fit: Fit,
    generator: torch.Generator,
) -> Iterator[tuple[int, float]]:
    """SFT: maximum likelihood of responses, in place."""
    rows = batches(len(prompts), fit.batch_size, generator)
    lengths = torch.tensor(float(LENGTH))

    def loss() -> Tensor:
        row = next(rows)
        return nll(token_logps(policy, prompts[row], responses[row]).sum(dim=-1), lengths).mean()

    return descend(policy.parameters(), loss, fit)


def preferred_ft(
    start: Start, pairs: Pairs, fit: Fit, generator: torch.Generator
) -> Iterator[Snapshot]:
    """Imitate the chosen responses: the preferred-FT of Rafailov et al. 2023, Section 6."""
    policy = deepcopy(start.reference)
    return snapshots(policy, imitate(policy, pairs.prompts, pairs.chosen, fit, generator))


def prefer(
    start: Start, pairs: Pairs, loss: PairLoss, fit: Fit, generator: torch.Generator
) -> Iterator[Snapshot]:
    """Train on pairs that were drawn before: DPO, IPO or unlikelihood, as the loss is."""
    policy = deepcopy(start.reference)
    drawn = (pairs[row] for row in batches(len(pairs), fit.batch_size, generator))
    return _prefer(start, policy, drawn, loss, fit)


def prefer_online(
    start: Start,
    loss: PairLoss,
    fit: Fit,
    generator: torch.Generator,
    *,
    pairs_per_round: int,
    passes: int,
) -> Iterator[Snapshot]:
    """The same on pairs of the policy's own responses, drawn and labelled anew every round.

    The labels are Bradley-Terry draws of the true reward, as those of the pairs drawn before.

    Args:
        passes: over the pairs of a round.
    """
    policy = deepcopy(start.reference)

    def drawn() -> Iterator[Pairs]:
        while True:
            prompts = draw_prompts(start.world, pairs_per_round, generator)
            first, second = (sample(policy, prompts, generator) for _ in range(2))
            pairs = label(start.world, prompts, first, second, generator)
            for _ in range(passes):
                order = torch.randperm(pairs_per_round, generator=generator)
                yield from (pairs[rows] for rows in order.split(fit.batch_size))

    return _prefer(start, policy, drawn(), loss, fit)


def _prefer(
    start: Start, policy: GPT2LMHeadModel, drawn: Iterator[Pairs], pair_loss: PairLoss, fit: Fit
) -> Iterator[Snapshot]:
    def loss() -> Tensor:
        pairs = next(drawn)
        prompts = pairs.prompts.repeat(2)
        responses = torch.cat([pairs.chosen, pairs.rejected])
        chosen, rejected = token_logps(policy, prompts, responses).sum(dim=-1).chunk(2)
        reference = start.reference_logps(prompts, responses).chunk(2)
        return pair_loss(chosen, rejected, *reference).mean()

    return snapshots(policy, descend(policy.parameters(), loss, fit))


@dataclass(frozen=True, slots=True)
class RewardModel:
    """What a reward model says of every response, (P, Y), and its processor seconds."""

    seconds: float
    scores: Tensor


def fit_reward_model(
    start: Start, pairs: Pairs, fit: Fit, generator: torch.Generator
) -> RewardModel:
    """Bradley-Terry maximum likelihood of a score after the last word."""
    model = Scorer(start.reference)
    rows = batches(len(pairs), fit.batch_size, generator)

    def loss() -> Tensor:
        batch = pairs[next(rows)]
        responses = torch.cat([batch.chosen, batch.rejected])
        chosen, rejected = model(batch.prompts.repeat(2), responses)[:, -1].chunk(2)
        return bradley_terry_nll(chosen, rejected).mean()

    *_, (_, seconds) = descend(model.parameters(), loss, fit)
    return RewardModel(seconds, model.table())
