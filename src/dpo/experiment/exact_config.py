"""What can be set of the study of exact worlds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dpo.sections import Count, Positive, Section, Seed

Share = Annotated[float, Field(gt=0, lt=1)]


class FitSettings(Section):
    """How long and how fast a loss is followed; the rate falls linearly to 0."""

    steps: Count = Field(description="Gradient steps.")
    batch_size: Count = Field(description="Rows of a step.")
    learning_rate: Positive = Field(description="At the start.")


class PPOSettings(Section):
    """Schulman et al. 2017 (arXiv:1707.06347), as used on language models by Ziegler et al. 2019
    (arXiv:1909.08593); future rewards are not discounted.
    """

    rounds: Count = Field(30, description="How often responses are drawn.")
    rollouts: Count = Field(512, description="Responses drawn in a round.")
    epochs: Count = Field(2, description="Passes over the rollouts of a round.")
    minibatch_size: Count = Field(128, description="Responses of an optimizer step.")
    learning_rate: Positive = Field(1e-3, description="Of the policy and the critic.")
    clip: Positive = Field(0.2, description="Of the ratio of probabilities, around 1.")
    value_clip: Positive = Field(0.2, description="Of a value, around that of the rollout.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Of the advantages.")

    @model_validator(mode="after")
    def _whole_minibatches(self) -> PPOSettings:
        if self.rollouts % self.minibatch_size:
            raise ValueError(
                f"rollouts ({self.rollouts}) must be a multiple of "
                f"minibatch_size ({self.minibatch_size})"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.rounds * self.epochs * (self.rollouts // self.minibatch_size)


class OnlineSettings(Section):
    """Where the pairs of online DPO come from; its steps are those of offline DPO."""

    pairs_per_round: Count = Field(4_096, description="Drawn from the policy and labelled.")
    passes: Count = Field(4, description="Over the pairs of a round.")


class ExactStudyConfig(Section):
    """Which methods at which strengths, on how much data, for how long."""

    out: str = Field(description="The study's folder.")
    seeds: list[Seed] = Field([6, 7, 8], min_length=1, description="Each has runs of its own.")
    processes: Count = Field(2, description="Half seeds at the same time, each with one thread.")
    demonstrations: Count = Field(4_000, description="Responses that the reference imitates.")
    reference: FitSettings = FitSettings(steps=300, batch_size=128, learning_rate=1e-3)
    pairs: Count = Field(20_000, description="Labelled pairs of the reference's responses.")
    offline: FitSettings = Field(
        FitSettings(steps=400, batch_size=128, learning_rate=1e-3), description="On pairs."
    )
    reward_model: FitSettings = FitSettings(steps=1_000, batch_size=128, learning_rate=1e-3)
    ppo: PPOSettings = PPOSettings()
    online: OnlineSettings = OnlineSettings()
    betas: list[Positive] = Field([1.0, 0.3, 0.1], min_length=1, description="DPO's.")
    on_policy_betas: list[Positive] = Field(
        [1.0, 0.3, 0.1], min_length=1, description="Of PPO and online DPO."
    )
    ipo_betas: list[Positive] = Field([0.17, 0.05], description="IPO's tau.")
    unlikelihood_alphas: list[Positive] = Field([0.3, 1.0], description="Its weight.")
    best_of: list[Count] = Field([2, 4, 16, 64, 256], description="Responses to choose from.")
    beta: Positive = Field(1.0, description="Where one effect is studied; one of both lists.")
    pair_counts: list[Count] = Field([1_000, 5_000, 100_000], description="Beside pairs.")
    reward_model_pairs: list[Count] = Field([5_000], description="Beside pairs.")
    shares: list[Share] = Field(
        [0.25], description="As many pairs, but of that share of the responses alone."
    )
    rate_factors: list[Positive] = Field([3.0], description="On the learning rates.")

    @model_validator(mode="after")
    def _consistent(self) -> ExactStudyConfig:
        for key in ("betas", "on_policy_betas"):
            if self.beta not in getattr(self, key):
                raise ValueError(f"{key}: expected to find beta ({self.beta:g}) there")
        for key, values in self:
            if isinstance(values, list) and len({*values}) < len(values):
                raise ValueError(f"{key}: expected different ones, got {values}")
        for key in ("pair_counts", "reward_model_pairs"):
            if self.pairs in getattr(self, key):
                raise ValueError(f"{key}: {self.pairs} is measured anyway, for it is pairs")
        if 1.0 in self.rate_factors:
            raise ValueError("rate_factors: 1 is measured anyway")
        return self


def quick_form(config: ExactStudyConfig) -> ExactStudyConfig:
    """The study in about a minute: one seed, one strength of most methods, fewer steps."""

    def shorter(fit: FitSettings) -> FitSettings:
        return fit.model_copy(update={"steps": max(1, fit.steps // 3)})

    rounds = max(1, config.ppo.rounds // 2)
    return config.model_copy(
        update={
            "out": f"{config.out}-quick",
            "seeds": config.seeds[:1],
            "offline": shorter(config.offline),
            "reward_model": shorter(config.reward_model),
            "ppo": config.ppo.model_copy(update={"rounds": rounds}),
            "betas": [config.beta],
            "on_policy_betas": [config.beta],
            "ipo_betas": config.ipo_betas[:1],
            "unlikelihood_alphas": config.unlikelihood_alphas[:1],
            "pair_counts": config.pair_counts[:1],
            "reward_model_pairs": [],
            "shares": config.shares[:1],
            "rate_factors": config.rate_factors[:1],
        }
    )
