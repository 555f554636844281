"""Online and iterative DPO: sample responses, score them, make preferences, train, and again.

A round draws `samples_per_prompt` responses to each of its prompts from the policy as it is, asks
the reward source for their rewards, and makes pairs (or rankings) of them: the preference data that
the rest of the training is the usual one on. One round on given pairs is `dpo train`.

Guo et al. 2024, Direct Language Model Alignment from Online AI Feedback (arXiv:2402.04792): a new
pair of samples at every step; here a round is as long as the configuration says. Yuan et al. 2024,
Self-Rewarding Language Models (arXiv:2401.10020): the best of several responses against the worst.
Pang et al. 2024, Iterative Reasoning Preference Optimization (arXiv:2404.19733): the last round's
policy is the reference of the next, `reset_reference_each_round`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from dpo.config import RunConfig
from dpo.data.order import epoch_order, steps_per_epoch
from dpo.data.rows import Prompt
from dpo.data.tokenize import Encoder
from dpo.errors import InputError
from dpo.models.load import max_positions, weights_digest
from dpo.models.recompute import enable_recomputation
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train.adapters import open_reference_of, open_trained
from dpo.train.jobs import check_same_tokens
from dpo.train.loop import BatchResult, fit
from dpo.train.objective import make_objective, reward_scale
from dpo.train.on_policy import OnPolicyEvaluation, evaluation_on_policy
from dpo.train.preference import PreferenceMethod, move_reference
from dpo.train.prepare import encode_prompts, load_prompts
from dpo.train.reference import score_all
from dpo.train.reward_source import RewardFunction, open_reward
from dpo.train.run import save_train_prompts
from dpo.train.samples import Sampler, Samples, make_pairs, make_rankings, round_name
from dpo.train.session import (
    Policy,
    choose_held_out,
    distinct_prompts,
    make_run_encoder,
    model_saver,
    opened_run,
    prompts_seen,
    write_samples,
)

log = logging.getLogger("dpo")


def rows_per_round(config: OnlineConfig, num_prompts: int) -> int:
    """Pairs or rankings that a round makes where all rewards differ."""
    prompts = config.prompts_per_round or num_prompts
    if config.loss.kind == "pair" and config.pairs == "all":
        return prompts * math.comb(config.samples_per_prompt, 2)
    return prompts


def rows_of_step(
    step: int, *, num_rows: int, num_planned: int, batch_size: int, seed: int
) -> list[int]:
    """The rows of optimizer step `step` (counted from 0) where fewer rows came than were planned.

    The number of steps is that of the planned rows, so a run's length is known before it samples:
    its batches are smaller instead. As in `batch_rows` a pass leaves no row out and repeats none,
    unless there are fewer rows than steps; then each step has one. With all rows it *is*
    `batch_rows`.

    >>> [rows_of_step(s, num_rows=4, num_planned=6, batch_size=3, seed=0) for s in range(2)]
    [[2, 0], [1, 3]]
    """
    epoch, position = divmod(step, steps_per_epoch(num_planned, batch_size))
    order = epoch_order(num_rows, seed=seed, epoch=epoch)
    start, end = (
        min(number * batch_size * num_rows // num_planned, num_rows)
        for number in (position, position + 1)
    )
    return [int(i) for i in order[start : max(end, start + 1)]]


@dataclass(kw_only=True)
class OnlineMethod(PreferenceMethod):
    """A loss on rows that are made anew, round by round, of samples of the policy.

    The samples of the round and the reference's log-probabilities of its rows travel in the
    checkpoints, so a run that was killed inside a round goes on with the same rows.
    """

    draw: Callable[[nn.Module, int], Samples]
    """The samples of a round, counted from 0."""
    make_rows: Callable[[Samples, int], list[Any]]
    """The round's pairs or rankings, a function of its samples and its number."""
    num_planned: int
    """Rows that a round makes where all rewards differ."""
    reset_reference: bool = False
    """From the second round on, the reference is the policy as it is when the round begins."""
    round: int = field(default=-1, init=False)
    samples: Samples | None = field(default=None, init=False)
    of_round: dict[str, float] = field(default_factory=dict, init=False)
    """What is logged of the round, with each of its steps."""

    def num_steps(self, config: RunConfig) -> int:
        assert isinstance(config, OnlineConfig)
        return config.rounds * self.steps_per_pass(config)

    def steps_per_pass(self, config: RunConfig) -> int:
        """The steps of a round: where the configuration says "epoch", it means a round."""
        assert isinstance(config, OnlineConfig)
        return config.epochs_per_round * steps_per_epoch(self.num_planned, config.batch.size)

    def rows(self, policy: nn.Module, step: int, config: RunConfig) -> list[int]:
        number = step // self.steps_per_pass(config)
        if number != self.round:
            self._begin(policy, number)
        return rows_of_step(
            step,
            num_rows=len(self.train),
            num_planned=self.num_planned,
            batch_size=config.batch.size,
            seed=config.seed,
        )

    def _begin(self, policy: nn.Module, number: int) -> None:
        """Sample a round, and score its rows under the reference, unless that moves."""
        self._take(self.draw(policy, number), number)
        log.info(
            "Round %d: mean reward %.4g; %d rows; %.0f%% of the prompts have responses of one "
            "reward.",
            number + 1,
            self.of_round["samples/reward"],
            len(self.train),
            100 * self.of_round["samples/equal_rewards"],
        )
        if not self.train:
            raise InputError(
                f"Round {number + 1}: the responses to every prompt have equal rewards, so none is "
                "preferred. Take more samples_per_prompt or a reward that tells them apart."
            )
        if self.reset_reference and number > 0:
            assert self.reference is not None
            move_reference(self.reference, policy, mix=1.0)
        if self.reference is not None and self.moving is None:
            self.train_reference = score_all(
                self.reference,
                self.kind.sequences(self.train),
                precision=self.precision,
                max_tokens=self.max_tokens,
            )

    def _take(self, samples: Samples, number: int) -> None:
        self.round, self.samples = number, samples
        self.train = self.make_rows(samples, number)
        self.of_round = {**samples.metrics(), "samples/rows": len(self.train)}

    def loss(self, policy: nn.Module, rows: Sequence[int]) -> BatchResult:
        result = super().loss(policy, rows)
        if not result.sums:  # the first rank logs a batch that all compute
            return result
        # What is logged is summed over rows and divided by their number.
        of_round = {name: value * len(rows) for name, value in self.of_round.items()}
        return BatchResult(result.loss, {**result.sums, **of_round})

    def evaluate(self, policy: nn.Module) -> dict[str, float]:
        """Reward and KL of samples for held-out prompts. `eval/loss`, by which the best model is
        chosen, is minus the reward that the KL is paid from: `beta KL(pi || pi_ref) - E r`, without
        the KL where the loss takes no reference.
        """
        assert self.on_policy is not None
        found = self.on_policy(policy)
        beta = reward_scale(self.objective) if self.objective.needs_reference else 0.0
        return {"eval/loss": beta * found["eval/kl"] - found["eval/reward"], **found}

    def companion(self) -> nn.Module | None:
        return self.reference if self.reset_reference else super().companion()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "round": self.round}

    def tensors(self) -> dict[str, Tensor]:
        if self.samples is None:
            return {}
        reference = self.train_reference
        scored = {} if reference is None else {"reference_logps": reference}
        return {**self.samples.as_tensors(), **scored}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(state, tensors)
        self._take(Samples.from_tensors(tensors), int(state["round"]))
        self.train_reference = tensors.get("reference_logps")


def train_online(config: OnlineConfig, *, trust_remote_code: bool = False) -> Path:
    """Online or iterative DPO; returns the run directory, finished.

    Raises:
        InputError, DivergedError, CheckpointError, StorageError, Stopped: as their classes say.
    """
    data = load_prompts(config.data)
    reward = open_reward(
        config.reward,
        precision=config.precision,
        max_tokens=config.batch.max_tokens,
        trust_remote_code=trust_remote_code,
    )
    measured = evaluation_reward(config, reward, trust_remote_code)
    policy = open_trained(config, [], trust_remote_code)
    if config.gradient_checkpointing:
        enable_recomputation(policy.model)
    encoder = make_run_encoder(config, policy, data)
    reference = open_reference_of(config, config.reference, policy, trust_remote_code)
    check_same_tokens(policy, reference)
    digests = {
        "reference_sha256": weights_digest(reference.model),
        "reward_sha256": reward.digest,
        "evaluation_reward_sha256": measured.digest,
    }
    with opened_run(config, data, policy, encoder, command="online", **digests) as run:
        if run.finished:
            return run.folder
        held_out = choose_held_out(data.test, config)
        prompts = list(dict.fromkeys(row.prompt for row in data.train))
        sampler = make_sampler(config, policy, encoder, reward, prompts, run.folder / "samples")
        on_policy = held_out_measures(config, policy, reference, encoder, measured, data.test)
        method = _method(config, policy, reference, encoder, sampler, on_policy)
        if run.writes:
            save_train_prompts(run.folder, prompts_seen(config, data))
        fit(method, policy.model, config, run)
        write_samples(policy, encoder, held_out, config, run)
        run.update_manifest(status="finished")
    return run.folder


def make_sampler(
    config: OnlineConfig | PPOConfig,
    policy: Policy,
    encoder: Encoder,
    reward: RewardFunction,
    prompts: Sequence[Prompt],
    folder: Path,
) -> Sampler:
    """What draws the samples of each round."""
    ids = encode_prompts(
        encoder,
        prompts,
        max_new_tokens=config.sampling.max_new_tokens,
        positions=max_positions(policy.model),
    )
    return Sampler(
        prompts=prompts,
        ids=ids,
        encoder=encoder,
        reward=reward,
        settings=config.sampling,
        prompts_per_round=config.prompts_per_round or len(prompts),
        samples_per_prompt=config.samples_per_prompt,
        precision=config.precision,
        seed=config.seed,
        folder=folder,
    )


def evaluation_reward(
    config: OnlineConfig | PPOConfig, reward: RewardFunction, trust_remote_code: bool
) -> RewardFunction:
    """What held-out samples are measured by: the trained reward, if no other is named."""
    other = config.evaluation.reward
    if other is None:
        return reward
    return open_reward(
        other,
        precision=config.precision,
        max_tokens=config.batch.max_tokens,
        trust_remote_code=trust_remote_code,
    )


def held_out_measures(
    config: OnlineConfig | PPOConfig,
    policy: Policy,
    reference: Policy,
    encoder: Encoder,
    reward: RewardFunction,
    rows: Sequence[Any],
) -> OnPolicyEvaluation:
    """What is measured on samples for held-out prompts: reward and KL."""
    settings = config.evaluation
    return evaluation_on_policy(
        config,
        policy.model,
        encoder,
        distinct_prompts(rows, settings.max_rows, config.seed),
        reference=reference.model,
        reward=reward,
        samples_per_prompt=settings.samples_per_prompt,
    )


def _method(
    config: OnlineConfig,
    policy: Policy,
    reference: Policy,
    encoder: Encoder,
    sampler: Sampler,
    on_policy: OnPolicyEvaluation,
) -> OnlineMethod:
    """The KL is to the reference as it was read; one that moves is a copy of it."""
    objective = make_objective(config.loss)
    moves = config.moving_reference is not None or config.reset_reference_each_round
    in_loss = copy.deepcopy(reference.model) if moves else reference.model

    def make_rows(samples: Samples, number: int) -> list[Any]:
        source = f"samples/{round_name(number)}.jsonl"
        if objective.kind == "list":
            return make_rankings(samples, source=source)
        draws = np.random.default_rng([config.seed, number])
        return make_pairs(
            samples, pairs=config.pairs, labels=config.labels, draws=draws, source=source
        )

    return OnlineMethod(
        train=[],
        test=[],
        train_reference=None,
        test_reference=None,
        loss_config=config.loss,
        precision=config.precision,
        max_tokens=config.batch.max_tokens,
        max_logit_bytes=config.batch.max_logit_mib << 20,
        on_policy=on_policy,
        save=model_saver(config, policy, encoder, TITLE.format(config.loss.name)),
        reference=in_loss if objective.needs_reference else None,
        vocab_size=policy.model.get_output_embeddings().weight.shape[0],  # type: ignore[operator]
        moving=config.moving_reference,
        draw=sampler,
        make_rows=make_rows,
        num_planned=rows_per_round(config, len(sampler.prompts)),
        reset_reference=config.reset_reference_each_round,
    )


TITLE = "Online preference optimisation on the policy's own samples, with the loss `{}`."
