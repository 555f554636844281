"""What can be set of the study of frontiers, and the runs that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from dpo.config import PreferenceConfig, RewardConfig, RunConfig
from dpo.config_files import nested, validate
from dpo.data.order import steps_per_epoch
from dpo.data.synthetic import KINDS, all_facts
from dpo.errors import InputError
from dpo.experiment.embedded import MAX_NEW_TOKENS, TEST_FRACTION, data_settings
from dpo.experiment.methods import METHOD_KINDS, REWARD_MODEL, dotted_for_each, refuse_own
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.sections import Count, Positive, Section, Seed
from dpo.train.online import rows_per_round

ALL = 10_000
"""More than there are held-out questions or pairs: all of them are measured."""

PROMPTS_PER_ROUND = 128
"""Of PPO and online DPO, if their settings say nothing else."""

SAMPLES = "samples.safetensors"
"""In a seed's `samples`: true rewards and the reward model's, (P, N) each."""
DIVERGED = "diverged.json"
"""In a run's folder, if it did not come to its end."""


_PPO = {
    "rounds": 24,
    "epochs_per_round": 2,
    "batch.size": 64,
    "optimizer.learning_rate": 3e-4,
}
TUNED: dict[str, dict[str, Any]] = {
    "ipo": {"optimizer.learning_rate": 2e-4},
    "ppo_rm": _PPO,
    "ppo_true": _PPO,
    "online": {"rounds": 24, "samples_per_prompt": 2},
    "reward_model": {"optimizer.learning_rate": 1e-3},
}
"""Chosen in trials with a seed that is not among the study's."""

QUICK = {
    "ppo_rm": {"rounds": 4},
    "ppo_true": {"rounds": 4},
    "online": {"rounds": 4, "samples_per_prompt": 2},
}
"""Settings of the small form, on top of the others."""


class Budget(Section):
    """Of every method that learns from the pairs; the others' are in their settings."""

    steps: Count = Field(120, description="Gradient steps.")
    pairs_per_step: Count = Field(32, description="Of a gradient step.")
    learning_rate: Positive = Field(1e-4, description="Peak; it falls linearly to 0.")


class FrontierConfig(Section):
    """Which methods at which strengths, on how much data, for how long."""

    out: str = Field(description="The study's folder.")
    seeds: list[Seed] = Field([0, 1, 2, 3], min_length=1, description="Each has runs of its own.")
    processes: Count = Field(2, description="Runs at the same time, each with one thread.")
    quick: bool = Field(False, description="A small form of it in less than three minutes.")
    sft_steps: Count = Field(700, description="Optimizer steps of SFT.")
    num_facts: Count = Field(80, ge=8, le=80, description="Each is asked in four phrasings.")
    pairs_per_question: Count = Field(24, description="Of the SFT model's answers, labelled.")
    budget: Budget = Budget()
    strengths: dict[str, Annotated[list[Positive], Field(min_length=1)]] = Field(
        default={
            "dpo": [0.03, 0.1, 0.3, 1.0],
            "ipo": [0.03, 0.1, 0.3],
            "preferred_ft": [3e-4, 1e-3],
            "unlikelihood": [0.1, 1.0],
            "ppo_rm": [0.03, 0.1, 0.3],
            "ppo_true": [0.03, 0.1, 0.3],
            "online": [0.03, 0.1, 0.3],
        },
        description="Methods and their strengths: beta, IPO's tau, a learning rate, alpha, PPO's "
        "KL coefficient.",
    )
    best_of: list[Count] = Field(
        [1, 2, 4, 8, 16, 32, 64], min_length=1, description="Responses to choose from."
    )
    settings: Annotated[dict[str, dict[str, Any]], BeforeValidator(dotted_for_each)] = Field(
        default=TUNED,
        description="Settings of the command that trains a method or the reward model: "
        "{ppo_rm: {epochs: 4}, reward_model: {optimizer.learning_rate: 1e-3}}.",
    )
    shift: dict[str, Positive] = Field(
        default={"dpo": 0.1, "ipo": 0.1, "ppo_rm": 0.1, "online": 0.1},
        description="Methods that are also trained without one kind of questions, and the strength "
        "at which they are.",
    )
    evaluations: Count = Field(4, description="Of each run, the last at its end.")
    samples_per_question: Count = Field(
        4, description="Answers of a policy to each held-out question, at every evaluation."
    )
    optimum_samples: Count = Field(
        512, ge=2, description="Answers of the SFT model to each, for the optimum and best-of-n."
    )


def quick_form(config: FrontierConfig) -> FrontierConfig:
    """One seed, one strength of every method, a fraction of the steps; in a folder beside it."""
    middle = {name: [values[len(values) // 2]] for name, values in config.strengths.items()}
    return config.model_copy(
        update={
            "out": f"{config.out}-quick",
            "seeds": config.seeds[:1],
            "sft_steps": min(config.sft_steps, 150),
            "pairs_per_question": min(config.pairs_per_question, 4),
            "strengths": middle,
            "shift": {name: middle[name][0] for name in ("dpo", "ppo_rm") if name in config.shift},
            "budget": config.budget.model_copy(update={"steps": min(config.budget.steps, 30)}),
            "settings": {
                name: {**config.settings.get(name, {}), **QUICK.get(name, {})}
                for name in {*config.settings, *QUICK}
            },
            "evaluations": min(config.evaluations, 2),
            "samples_per_question": min(config.samples_per_question, 2),
            "optimum_samples": min(config.optimum_samples, 64),
        }
    )


# -- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FrontierRun:
    """One method at one strength from one seed's SFT model."""

    method: str
    """As in the configuration."""
    strength: float
    seed: int
    without: bool
    """Whether its preferences leave out the seed's kind of questions."""
    config: RunConfig

    @property
    def name(self) -> str:
        note = " without a kind" if self.without else ""
        return f"{METHOD_KINDS[self.method].title} {self.strength:g}{note}, seed {self.seed}"


def plan(config: FrontierConfig) -> list[FrontierRun]:
    """Every run, seed after seed, validated before anything runs.

    Raises:
        InputError: there is no such method, or a setting is wrong.
    """
    _check(config)
    runs = [
        _run(config, method, strength, seed, without=False)
        for seed in config.seeds
        for method, strengths in config.strengths.items()
        for strength in strengths
    ]
    return runs + [
        _run(config, method, strength, seed, without=True)
        for seed in config.seeds
        for method, strength in config.shift.items()
    ]


OWN_SETTINGS = ("model", "data", "out", "seed", "reward", "reference", "evaluation", "save_every")
"""What the study decides for each run."""


def _check(config: FrontierConfig) -> None:
    for key in ("strengths", "shift"):
        for name in getattr(config, key):
            if name not in METHOD_KINDS:
                raise InputError(f"{key}.{name}: expected one of {', '.join(METHOD_KINDS)}.")
    lists: dict[str, Sequence[float]] = {"seeds": config.seeds, "best_of": config.best_of}
    lists |= {f"strengths.{name}": values for name, values in config.strengths.items()}
    for key, values in lists.items():
        if len({*values}) < len(values):
            raise InputError(f"{key}: expected different ones, got {values}.")
    for name, strength in config.shift.items():
        if strength not in config.strengths.get(name, []):
            raise InputError(
                f"shift.{name}: expected one of strengths.{name}, for it is compared with that "
                f"run; got {strength:g}."
            )
    if max(config.best_of) > config.optimum_samples:
        raise InputError(
            f"best_of: {max(config.best_of)} is more than the optimum_samples, "
            f"{config.optimum_samples}."
        )
    for name, settings in config.settings.items():
        if name not in (*METHOD_KINDS, REWARD_MODEL):
            known = ", ".join([*METHOD_KINDS, REWARD_MODEL])
            raise InputError(f"settings.{name}: expected one of {known}.")
        own = (*OWN_SETTINGS, METHOD_KINDS[name].strength) if name in METHOD_KINDS else OWN_SETTINGS
        refuse_own(settings, own, where=f"settings.{name}")


def left_out(seed: int) -> str:
    """The kind of questions that a seed's preferences leave out: another one in turn."""
    return [*KINDS][seed % len(KINDS)]


def kind_of(prompt: str) -> str:
    """The kind of a question."""
    return next(fact.kind for fact in all_facts() if prompt in fact.prompts)


@dataclass(frozen=True, slots=True)
class SeedFolder:
    """Where what belongs to a seed is."""

    path: Path

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def sft(self) -> Path:
        return self.path / "sft"

    @property
    def samples(self) -> Path:
        """Rewards of the SFT model's samples."""
        return self.path / "samples"

    def pairs(self, *, without: bool = False) -> Path:
        return self.path / "pairs" / ("pairs-without.jsonl" if without else "pairs.jsonl")

    def reward_model(self, *, without: bool = False) -> Path:
        return self.path / ("reward-without" if without else "reward")

    def run(self, method: str, strength: float, *, without: bool = False) -> Path:
        return self.path / "runs" / f"{method}-{strength:g}{'-without' if without else ''}"


def seed_folder(config: FrontierConfig, seed: int) -> SeedFolder:
    """The folder of a seed."""
    return SeedFolder(Path(config.out) / f"seed-{seed}")


def _run(
    config: FrontierConfig, method: str, strength: float, seed: int, *, without: bool
) -> FrontierRun:
    kind, folder = METHOD_KINDS[method], seed_folder(config, seed)
    pairs = str(folder.pairs(without=without))
    values: dict[str, Any] = {
        "model": str(folder.sft),
        "out": str(folder.run(method, strength, without=without)),
        "seed": seed,
    }
    on_pairs = kind.schema is PreferenceConfig
    start = _on_pairs(config, pairs) if on_pairs else _on_samples(config, pairs)
    settings = dict(kind.settings)
    if kind.by_reward_model:
        settings["reward"] = str(folder.reward_model(without=without))
    settings |= config.settings.get(method, {})
    values = nested({**values, **start}, {**settings, kind.strength: strength})
    where = f"settings.{method}"
    checked = validate(kind.schema, values, where=where)
    if isinstance(checked, OnlineConfig | PPOConfig):
        every = steps_between(checked, config.evaluations)
        values = nested(values, {"evaluation.every": every, "save_every": every})
        checked = validate(kind.schema, values, where=where)
    return FrontierRun(method, strength, seed, without, checked)


def steps_between(config: OnlineConfig | PPOConfig, evaluations: int) -> int:
    """Gradient steps from one evaluation to the next: those of whole rounds."""
    assert config.prompts_per_round is not None
    if isinstance(config, PPOConfig):
        rows = config.responses_per_round
    else:
        rows = rows_per_round(config, config.prompts_per_round)
    per_round = config.epochs_per_round * steps_per_epoch(rows, config.batch.size)
    return per_round * max(1, config.rounds // evaluations)


def _on_pairs(config: FrontierConfig, pairs: str) -> dict[str, Any]:
    budget = config.budget
    return {
        "data": data_settings(pairs),
        "max_steps": budget.steps,
        "optimizer": {"learning_rate": budget.learning_rate},
        "batch": {"size": budget.pairs_per_step, "max_tokens": 16_384},
        "save_every": budget.steps,
        "evaluation": {
            "every": max(1, budget.steps // config.evaluations),
            "max_rows": ALL,
            "num_samples": 0,
            "max_new_tokens": MAX_NEW_TOKENS,
            "kl_prompts": ALL,
            "kl_samples": config.samples_per_question,
            "reward": {"function": "synthetic"},
        },
    }


def _on_samples(config: FrontierConfig, pairs: str) -> dict[str, Any]:
    """Of PPO and online DPO, which take the questions of the pairs alone."""
    return {
        "data": {"path": pairs, "test_fraction": TEST_FRACTION},
        "optimizer": {"learning_rate": config.budget.learning_rate},
        "batch": {"size": config.budget.pairs_per_step, "max_tokens": 16_384},
        "prompts_per_round": PROMPTS_PER_ROUND,
        "sampling": {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 256},
        "evaluation": {
            "max_rows": ALL,
            "num_samples": 0,
            "max_new_tokens": MAX_NEW_TOKENS,
            "samples_per_prompt": config.samples_per_question,
            "reward": {"function": "synthetic"},
        },
    }


def reward_model_config(config: FrontierConfig, seed: int, *, without: bool) -> RewardConfig:
    """A seed's reward model, on the same pairs as DPO, for as many steps.

    Raises:
        InputError: a setting is wrong.
    """
    folder, budget = seed_folder(config, seed), config.budget
    values = {
        "model": str(folder.sft),
        "out": str(folder.reward_model(without=without)),
        "seed": seed,
        "data": data_settings(str(folder.pairs(without=without))),
        "max_steps": budget.steps,
        "batch": {"size": budget.pairs_per_step, "max_tokens": 16_384},
        "save_every": budget.steps,
        "evaluation": {"every": budget.steps, "max_rows": ALL},
    }
    values = nested(values, config.settings.get(REWARD_MODEL, {}))
    return validate(RewardConfig, values, where=f"settings.{REWARD_MODEL}")
