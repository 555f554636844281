"""Options of the commands that learn from samples of the policy: which reward, how to sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from dpo.config import (
    DataConfig,
    EvaluationDuringTraining,
    ModelConfig,
    MovingReferenceConfig,
    RewardSource,
    RunConfig,
    check_float32_weights,
    check_frozen_reference,
)
from dpo.loss_config import DPOLossConfig, LossConfig, MixLossConfig, takes_reference, with_name
from dpo.sections import Count, NonNegative, Positive, Section, shorthand


class SamplingConfig(Section):
    """How responses are sampled for training."""

    temperature: Positive = Field(1.0, description="1 samples from the policy itself.")
    max_new_tokens: Count = Field(128, description="Longest response, in tokens.")
    batch_size: Count = Field(64, description="Responses generated at once.")


class OnlineEvaluation(EvaluationDuringTraining):
    """What is measured on samples for held-out prompts."""

    max_rows: Count = Field(64, description="Held-out prompts, at most (seeded choice).")
    samples_per_prompt: Count = Field(
        1, description="Samples of each prompt, for the mean reward and the KL."
    )
    reward: RewardSource | None = Field(
        None,
        description="What they are measured by, and the best model chosen by, if not the reward "
        "that is trained on.",
    )


def check_rounds(config: RunConfig) -> None:
    """Refuse what does not go with rounds of samples."""
    check_float32_weights(config)
    if config.optimizer.in_backward:
        raise ValueError("optimizer.in_backward: is for dpo sft, dpo train and dpo reward")
    if config.distributed.kind == "fsdp":
        raise ValueError(
            "distributed.kind: fsdp runs the model equally often in every process, and sampling "
            "runs it as often as its own responses are long; take ddp"
        )


def check_prompts_only(data: DataConfig) -> None:
    """Refuse what concerns the responses of the data: only its prompts are used."""
    for name in ("max_length", "max_dropped"):
        if name in data.model_fields_set:
            raise ValueError(f"data.{name}: has no effect on samples; sampling.max_new_tokens has")


class OnlineConfig(RunConfig):
    """Online or iterative DPO: sample, score, make preferences, train on them, and again."""

    reward: RewardSource = Field(description="What scores the samples.")
    rounds: Count = Field(4, description="Times that responses are sampled and trained on.")
    prompts_per_round: Count | None = Field(
        None, description="Prompts sampled in a round; none: every training prompt once."
    )
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(
        4, description="Responses to each prompt."
    )
    pairs: Literal["best_worst", "all"] = Field(
        "best_worst", description="Which responses to a prompt are paired."
    )
    labels: Literal["hard", "bradley_terry"] = Field(
        "hard",
        description="hard: the higher reward is chosen; bradley_terry: drawn with probability "
        "sigmoid of the rewards' difference.",
    )
    epochs_per_round: Count = Field(1, description="Passes over the rows of a round.")
    sampling: SamplingConfig = SamplingConfig()
    loss: Annotated[LossConfig, BeforeValidator(with_name)] = Field(
        DPOLossConfig(),
        description="Any loss on pairs or rankings, as in dpo train: `dpo losses` lists them.",
    )
    reference: Annotated[ModelConfig | None, BeforeValidator(shorthand)] = Field(
        None,
        description="The reference, if not the model that training starts from; the KL is to it, "
        "also where the loss takes none or it moves.",
    )
    moving_reference: MovingReferenceConfig | None = Field(
        None, description="Mix the policy into the reference at intervals; frozen by default."
    )
    reset_reference_each_round: bool = Field(
        False, description="Iterative DPO: from round 2 on, the policy at its start is the one."
    )
    evaluation: OnlineEvaluation = OnlineEvaluation()

    @model_validator(mode="after")
    def _trained_models(self) -> OnlineConfig:
        check_rounds(self)
        if any(c is not None and c.fresh is not None for c in (self.model, self.reference)):
            raise ValueError("online DPO starts from a trained model; model.fresh is for dpo sft")
        return self

    @model_validator(mode="after")
    def _only_the_prompts_of_the_data(self) -> OnlineConfig:
        check_prompts_only(self.data)
        return self

    @model_validator(mode="after")
    def _a_loss_on_what_a_reward_can_order(self) -> OnlineConfig:
        loss = self.loss
        if loss.kind == "unpaired":
            raise ValueError(f"loss: {loss.name} takes judged responses; name one on pairs")
        if loss.kind == "list":
            for name in ("pairs", "labels"):
                if name in self.model_fields_set:
                    raise ValueError(f"{name}: has no effect, {loss.name} takes rankings by reward")
        parts = [p.loss for p in loss.mix] if isinstance(loss, MixLossConfig) else [loss]
        names = {part.name for part in parts}
        if "sppo_soft" in names:
            raise ValueError("loss: sppo_soft takes winning probabilities, and rewards are none")
        if "odpo" in names and self.labels == "bradley_terry":
            raise ValueError("labels: odpo takes pairs whose chosen response has the higher reward")
        return self

    @model_validator(mode="after")
    def _reference_has_an_effect(self) -> OnlineConfig:
        check_frozen_reference(self, "moving_reference", "reset_reference_each_round")
        if self.moving_reference is not None and self.reset_reference_each_round:
            raise ValueError("give moving_reference or reset_reference_each_round, not both")
        if not takes_reference(self.loss):
            for name in ("moving_reference", "reset_reference_each_round"):
                if getattr(self, name):
                    raise ValueError(f"{name}: has no effect, {self.loss.name} takes no reference")
        if self.reset_reference_each_round and self.rounds == 1:
            raise ValueError("reset_reference_each_round: has no effect with one round")
        return self


class KLPenaltyConfig(Section):
    """What PPO pays for each nat that it moves from the reference."""

    coefficient: NonNegative = Field(0.05, description="Score per nat; the first, with a target.")
    estimator: Literal["k1", "k3"] = Field(
        "k1", description="k1: log-ratio, right in its gradient; k3: never negative, and biased."
    )
    target: Positive | None = Field(
        None, description="Nats per response: adapt the coefficient to keep the KL there."
    )
    gain: Positive = Field(0.1, description="How fast it adapts.")

    @model_validator(mode="after")
    def _what_adapts(self) -> KLPenaltyConfig:
        if self.target is None and "gain" in self.model_fields_set:
            raise ValueError("gain: has no effect without a target")
        if self.target is not None and self.coefficient == 0:
            raise ValueError("coefficient: 0 cannot be adapted to a target; begin above it")
        return self


class PPOConfig(RunConfig):
    """PPO from an SFT model: sample, score, estimate advantages, take clipped steps, and again."""

    reward: RewardSource = Field(description="What scores the samples.")
    rounds: Count = Field(20, description="Times that responses are sampled and trained on.")
    prompts_per_round: Count = Field(128, description="Training prompts sampled in a round.")
    samples_per_prompt: Count = Field(1, description="Responses to each of them.")
    epochs_per_round: Count = Field(4, description="Passes over a round's responses.")
    sampling: SamplingConfig = SamplingConfig()
    kl: KLPenaltyConfig = KLPenaltyConfig()
    missing_eos_penalty: NonNegative = Field(
        0.0, description="Taken from the score of a response that the token limit ended."
    )
    critic: Literal["separate", "shared", "reward_model"] = Field(
        "separate",
        description="separate: values from a copy of the model's trunk; shared: from the policy's "
        "own trunk; reward_model: from a copy of the reward model's.",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of a token.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Of the advantages' estimates.")
    whiten_advantages: bool = Field(True, description="Mean 0 and variance 1 over a round.")
    clip: float = Field(0.2, gt=0, lt=1, description="Of the ratio of probabilities, around 1.")
    value_clip: Positive | None = Field(
        0.2, description="Of a value, around that of the rollout; null: none."
    )
    value_coefficient: Positive = Field(0.1, description="Of the value loss, beside the policy's.")
    reference: Annotated[ModelConfig | None, BeforeValidator(shorthand)] = Field(
        None, description="The reference, if not the model that training starts from."
    )
    evaluation: OnlineEvaluation = OnlineEvaluation()

    @property
    def responses_per_round(self) -> int:
        """Rows of a round."""
        return self.prompts_per_round * self.samples_per_prompt

    @model_validator(mode="after")
    def _trained_models(self) -> PPOConfig:
        check_rounds(self)
        if any(c is not None and c.fresh is not None for c in (self.model, self.reference)):
            raise ValueError("PPO starts from a trained model; model.fresh is for dpo sft")
        if self.critic == "reward_model" and self.reward.model is None:
            raise ValueError("critic: there is no reward model to copy; give reward.model")
        return self

    @model_validator(mode="after")
    def _only_the_prompts_of_the_data(self) -> PPOConfig:
        check_prompts_only(self.data)
        return self

    @model_validator(mode="after")
    def _a_ratio_of_two_policies(self) -> PPOConfig:
        if self.dropout:
            raise ValueError("dropout: PPO compares probabilities, and dropout changes both")
        if self.adapter is not None and self.adapter.dropout > 0:
            raise ValueError("adapter.dropout: PPO compares probabilities; dropout changes both")
        if self.adapter is not None and self.critic == "reward_model":
            raise ValueError(
                "critic: reward_model is trained whole, so it does not go with an adapter; take "
                "separate or shared"
            )
        if self.sampling.temperature != 1:
            raise ValueError("sampling.temperature: PPO samples from the policy itself, at 1")
        if self.batch.size > self.responses_per_round:
            raise ValueError(
                f"batch.size: {self.batch.size} is more than the {self.responses_per_round} "
                "responses of a round (prompts_per_round times samples_per_prompt)"
            )
        return self
