"""PPO: sample responses, score them, estimate advantages, take clipped steps, and again.

Ziegler et al. 2019 (arXiv:1909.08593) with the losses of Schulman et al. 2017 (arXiv:1707.06347).
The equations are in `dpo.core.ppo`; `docs/ppo.md` lists every detail, its source and its test.

A round: `prompts_per_round` prompts, `samples_per_prompt` responses to each from the policy as it
is; their scores; the log-probabilities of policy and reference, and the values; rewards, advantages
and returns, fixed for the round; then `epochs_per_round` passes over the responses in minibatches
of `batch.size`, in a new order each time.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.config import RunConfig
from dpo.core.ppo import (
    adapted_coefficient,
    approximate_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
)
from dpo.data.order import batch_rows, steps_per_epoch
from dpo.data.pack import packed_tokens
from dpo.errors import InputError
from dpo.models.actor_critic import ActorCritic
from dpo.models.load import max_positions, weights_digest
from dpo.models.recompute import enable_recomputation
from dpo.models.reward import open_reward_model
from dpo.online_config import PPOConfig
from dpo.train.adapters import open_reference_of, open_trained
from dpo.train.jobs import check_same_tokens
from dpo.train.loop import BatchResult, PlainMethod, fit
from dpo.train.on_policy import OnPolicyEvaluation
from dpo.train.online import evaluation_reward, held_out_measures, make_sampler
from dpo.train.prepare import load_prompts
from dpo.train.reward_source import open_reward
from dpo.train.rollouts import Rollouts, Targets, make_targets, roll_out
from dpo.train.run import save_train_prompts
from dpo.train.samples import Samples, round_name
from dpo.train.session import (
    Policy,
    choose_held_out,
    make_run_encoder,
    model_saver,
    opened_run,
    prompts_seen,
    write_samples,
)

log = logging.getLogger("dpo")


@dataclass
class PPOMethod(PlainMethod):
    """Rounds of rollouts and clipped steps on them. The policy of the loop is an `ActorCritic`.

    What was rolled out in the round travels in the checkpoints, with the KL coefficient, so that a
    run which was killed inside a round goes on with the same targets.
    """

    config: PPOConfig
    draw: Callable[[nn.Module, int], Samples]
    """The samples of a round, counted from 0."""
    reference: nn.Module
    on_policy: OnPolicyEvaluation
    save: Callable[[nn.Module, Path], None]
    round: int = field(default=-1, init=False)
    kl_coefficient: float = field(init=False)
    """Of this round."""
    rollouts: Rollouts = field(init=False)
    targets: Targets = field(init=False)
    of_round: dict[str, float] = field(default_factory=dict, init=False)
    """What is logged of the round, with each of its steps."""

    def __post_init__(self) -> None:
        self.kl_coefficient = self.config.kl.coefficient

    # -- which rows ------------------------------------------------------------------------------

    def num_steps(self, config: RunConfig) -> int:
        return self.config.rounds * self.steps_per_pass(config)

    def steps_per_pass(self, config: RunConfig) -> int:
        """The steps of a round: where the configuration says "epoch", it means a round."""
        steps = steps_per_epoch(self.config.responses_per_round, config.batch.size)
        return self.config.epochs_per_round * steps

    def rows(self, policy: nn.Module, step: int, config: RunConfig) -> list[int]:
        number = step // self.steps_per_pass(config)
        if number != self.round:
            self._begin(policy, number)
        return batch_rows(
            step,
            num_rows=self.config.responses_per_round,
            batch_size=config.batch.size,
            seed=config.seed,
        )

    def _begin(self, policy: nn.Module, number: int) -> None:
        """Roll out a round; its KL coefficient follows from the KL of the round before."""
        assert isinstance(policy, ActorCritic)
        settings = self.config.kl
        if number > 0 and settings.target is not None:
            self.kl_coefficient = adapted_coefficient(
                self.kl_coefficient,
                self.of_round["samples/kl_k1"],
                target=settings.target,
                gain=settings.gain,
            )
        samples = self.draw(policy.policy, number)
        self._take(roll_out(policy, self.reference, samples, **self._arithmetic()), number)
        log.info(
            "Round %d: mean reward %.4g; KL to the reference %.3g.",
            number + 1,
            self.of_round["samples/reward"],
            self.of_round["samples/kl_k1"],
        )

    def _take(self, rollouts: Rollouts, number: int) -> None:
        config = self.config
        self.round, self.rollouts = number, rollouts
        self.targets = make_targets(
            rollouts,
            kl_coefficient=self.kl_coefficient,
            kl_estimator=config.kl.estimator,
            missing_eos_penalty=config.missing_eos_penalty,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            whitened=config.whiten_advantages,
        )
        self.of_round = {
            **rollouts.metrics(),
            **self.targets.metrics,
            "samples/drawn": (number + 1) * config.responses_per_round,
        }

    def _arithmetic(self) -> dict[str, Any]:
        return {
            "max_tokens": self.config.batch.max_tokens,
            "max_logit_bytes": self.config.batch.max_logit_mib << 20,
            "precision": self.config.precision,
        }

    # -- the loss --------------------------------------------------------------------------------

    def num_tokens(self, row: int) -> int:
        return packed_tokens([self.rollouts.samples.sequences[row]])

    def weight(self, rows: Sequence[int]) -> int:
        """Tokens of the responses: every one counts the same."""
        return sum(self.rollouts.samples.sequences[row].num_scored for row in rows)

    def loss(self, policy: nn.Module, rows: Sequence[int]) -> BatchResult:
        """The policy's clipped loss and `value_coefficient` times the value function's, and what
        they say of the step.
        """
        config, rollouts = self.config, self.rollouts
        sequences = [rollouts.samples.sequences[row] for row in rows]
        logps, values = policy(sequences, **self._arithmetic())

        def of_rows(tensor: Tensor) -> Tensor:
            return tensor[list(rows), : logps.shape[1]].to(logps.device)

        old_logps, mask = of_rows(rollouts.logps), of_rows(rollouts.mask)
        advantages = of_rows(self.targets.advantages)
        policy_loss = clipped_policy_loss(logps, old_logps, advantages, mask, clip=config.clip)
        value_loss = clipped_value_loss(
            values,
            of_rows(rollouts.values),
            of_rows(self.targets.returns),
            mask,
            clip=torch.inf if config.value_clip is None else config.value_clip,
        )
        with torch.no_grad():
            metrics = {
                "ppo/policy_loss": policy_loss.item(),
                "ppo/value_loss": value_loss.item(),
                "ppo/approximate_kl": approximate_kl(logps, old_logps, mask).item(),
                "ppo/clip_fraction": clip_fraction(
                    logps, old_logps, advantages, mask, clip=config.clip
                ).item(),
                **self.of_round,
            }
        count = self.weight(rows)  # means over tokens become sums, as the loop adds them
        total = policy_loss + config.value_coefficient * value_loss
        return BatchResult(total * count, {name: m * count for name, m in metrics.items()})

    # -- around it -------------------------------------------------------------------------------

    def evaluate(self, policy: nn.Module) -> dict[str, float]:
        """Reward and KL of samples for held-out prompts. `eval/loss`, by which the best model is
        chosen, is minus the objective: `coefficient KL - E[score]`, with the coefficient that the
        configuration names, also where it adapts.
        """
        assert isinstance(policy, ActorCritic)
        found = self.on_policy(policy.policy)
        loss = self.config.kl.coefficient * found["eval/kl"] - found["eval/reward"]
        return {"eval/loss": loss, **found}

    def state(self) -> dict[str, Any]:
        return {"round": self.round, "kl_coefficient": self.kl_coefficient}

    def tensors(self) -> dict[str, Tensor]:
        return self.rollouts.as_tensors()

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.kl_coefficient = float(state["kl_coefficient"])
        self._take(Rollouts.from_tensors(tensors), int(state["round"]))

    def describe(self, row: int) -> str:
        line = row // self.config.samples_per_prompt + 1
        return f"samples/{round_name(self.round)}.jsonl:{line}"

    def save_model(self, policy: nn.Module, folder: Path) -> None:
        """The policy alone: the value function is of no use to who generates."""
        assert isinstance(policy, ActorCritic)
        self.save(policy.policy, folder)


# -- the job -----------------------------------------------------------------------------------


def train_ppo(config: PPOConfig, *, trust_remote_code: bool = False) -> Path:
    """PPO from an SFT model; returns the run directory, finished.

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
    encoder = make_run_encoder(config, policy, data)
    reference = open_reference_of(config, config.reference, policy, trust_remote_code)
    check_same_tokens(policy, reference)
    model = ActorCritic(policy.model, critic_trunk(config, policy, trust_remote_code))
    if config.gradient_checkpointing:
        for trained in (model.policy, model.trunk):
            if trained is not None:
                enable_recomputation(trained)
    digests = {
        "reference_sha256": weights_digest(reference.model),
        "reward_sha256": reward.digest,
        "evaluation_reward_sha256": measured.digest,
        "actor_critic_sha256": weights_digest(model),
    }
    with opened_run(config, data, policy, encoder, command="ppo", **digests) as run:
        if run.finished:
            return run.folder
        held_out = choose_held_out(data.test, config)
        prompts = list(dict.fromkeys(row.prompt for row in data.train))
        method = PPOMethod(
            config=config,
            draw=make_sampler(config, policy, encoder, reward, prompts, run.folder / "samples"),
            reference=reference.model,
            on_policy=held_out_measures(config, policy, reference, encoder, measured, data.test),
            save=model_saver(config, policy, encoder, TITLE),
        )
        if run.writes:
            save_train_prompts(run.folder, prompts_seen(config, data))
        fit(method, model, config, run)
        write_samples(policy, encoder, held_out, config, run)
        run.update_manifest(status="finished")
    return run.folder


TITLE = "Proximal policy optimisation on the policy's own samples."


def critic_trunk(config: PPOConfig, policy: Policy, trust_remote_code: bool) -> nn.Module | None:
    """The trunk of the value function, or None where it is the policy's own.

    Raises:
        InputError: the reward model cannot read what the policy writes.
    """
    start: Any = policy.model
    if config.critic == "shared":
        return None
    if config.critic == "separate":
        return _trunk_of(copy.deepcopy(start))
    assert config.reward.model is not None
    model, tokenizer, _ = open_reward_model(
        config.reward.model, trust_remote_code=trust_remote_code
    )
    own, other = policy.tokenizer.get_vocab(), tokenizer.get_vocab()
    if not own.items() <= other.items():  # a reward model may have padding besides
        raise InputError(
            f"critic: {config.reward.model} has another tokenizer than {policy.name}, so its trunk "
            "cannot read the policy's tokens; take critic=separate."
        )
    if max_positions(model) < max_positions(start):
        raise InputError(
            f"critic: {config.reward.model} has {max_positions(model)} positions and {policy.name} "
            f"{max_positions(start)}; take critic=separate."
        )
    return _trunk_of(model)


def _trunk_of(model: Any) -> nn.Module:
    """A model without its head."""
    trunk: nn.Module = model.base_model
    return trunk
