"""What can be set of the sentiment study, and the runs that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dpo.config import ModelConfig, PreferenceConfig, RewardConfig, SFTConfig, Sources
from dpo.config_files import nested, validate
from dpo.errors import InputError
from dpo.experiment.frontier_config import (
    ALL,
    OWN_SETTINGS,
    PROMPTS_PER_ROUND,
    QUICK,
    Budget,
    FrontierRun,
    SeedFolder,
    steps_between,
)
from dpo.experiment.methods import (
    METHOD_KINDS,
    REWARD_MODEL,
    Dotted,
    dotted_for_each,
    refuse_own,
)
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.sections import Count, Folder, Positive, Section, Seed, shorthand

DATA = "data"
CLASSIFIER = "classifier"
"""Folders of the study: the passages, and the classifier that was fitted."""


class ReviewsConfig(Section):
    """Which reviews, and how they are cut. Every review is in one part, by a hash of its text."""

    path: Sources = Field(description="File, folder, list of them, or hub id.")
    split: str | None = Field(None, description="Split of a hub data set.")
    revision: str | None = Field(None, description="Revision of a hub data set.")
    text: str = Field("text", description="The column of the text.")
    label: str = Field("label", description="The column of the label.")
    positive: Annotated[str, BeforeValidator(str)] = Field(
        "pos", description="The label of a positive review."
    )
    held_out_share: float = Field(
        0.15, gt=0, lt=1, description="Of the reviews, measured on and never trained on."
    )
    passage_words: Count = Field(
        40, description="A passage is whole sentences, as many as fit into so many words."
    )
    passages_per_review: Count | None = Field(
        None, description="From a review's beginning on; none: all."
    )
    prefix_words: tuple[Count, Count] = Field(
        (2, 8), description="Fewest and most words of a prompt, the beginning of a passage."
    )

    @model_validator(mode="after")
    def _room_for_a_rest(self) -> ReviewsConfig:
        fewest, most = self.prefix_words
        if not fewest <= most < self.passage_words:
            raise ValueError(
                f"prefix_words: expected fewest <= most < passage_words ({self.passage_words}), "
                f"got [{fewest}, {most}]"
            )
        return self


class SentimentRewardConfig(Section):
    """The true reward: the log-odds of "positive" of a classifier."""

    model: str | None = Field(
        None, description="Sequence classifier, by hub id or folder; none: one is fitted."
    )
    label: str | None = Field(None, description="Its label whose log-odds are meant.")
    share: float = Field(
        0.4, gt=0, lt=1, description="Of the reviews, that a classifier is fitted on."
    )

    @model_validator(mode="after")
    def _one_source(self) -> SentimentRewardConfig:
        if self.model is None and self.label is not None:
            raise ValueError("label has no effect without a model")
        if self.model is not None and "share" in self.model_fields_set:
            raise ValueError("share has no effect with a model, for none is fitted")
        return self


class PairsConfig(Section):
    """Preferences: samples of the SFT model that go on from prefixes, ordered by the reward."""

    prefixes: Count = Field(500, description="At most; each once.")
    samples: Annotated[int, Field(ge=2)] = Field(
        4, description="Of each prefix; K make K(K-1)/2 pairs."
    )
    labels: Literal["hard", "bradley_terry"] = Field(
        "hard",
        description="hard: the higher reward is chosen; bradley_terry: drawn with probability "
        "sigmoid of the rewards' difference.",
    )


class MeasureConfig(Section):
    """What is measured on held-out prefixes."""

    prefixes: Annotated[int, Field(ge=2)] = Field(64, description="At most.")
    samples: Count = Field(4, description="Of a policy for each, at every evaluation.")
    evaluations: Count = Field(4, description="Of each run, the last at its end.")
    reference_samples: Annotated[int, Field(ge=2)] = Field(
        256, description="Of the SFT model for each, for best-of-n and the optimum."
    )
    best_of: list[Count] = Field(
        [1, 2, 4, 8, 16, 32, 64], min_length=1, description="Responses to choose from."
    )


class SentimentConfig(Section):
    """Which model and reviews, which reward, which methods at which strengths."""

    out: Folder = Field(description="The study's folder.")
    seeds: list[Seed] = Field([0], min_length=1, description="Each has runs of its own.")
    processes: Count = Field(1, description="Runs at the same time, each with one thread.")
    quick: bool = Field(False, description="A small form of it, in a folder beside it.")
    model: Annotated[ModelConfig, BeforeValidator(shorthand)] = ModelConfig(path="gpt2-large")
    data: Annotated[ReviewsConfig, BeforeValidator(shorthand)]
    reward: SentimentRewardConfig = SentimentRewardConfig()
    max_length: Annotated[int, Field(ge=2)] = Field(
        128, description="Prefix and the rest, tokens, of all that is trained on."
    )
    max_new_tokens: Count = Field(64, description="Longest sample, tokens.")
    sft: Dotted = Field(default={}, description="Settings of dpo sft: {epochs: 2}.")
    every_run: Dotted = Field(
        default={}, description="Settings of every command: {precision: bf16}."
    )
    pairs: PairsConfig = PairsConfig()
    budget: Budget = Budget()
    strengths: dict[str, Annotated[list[Positive], Field(min_length=1)]] = Field(
        default={
            "dpo": [0.1, 0.3, 1.0],
            "preferred_ft": [3e-4],
            "unlikelihood": [0.1, 1.0],
            "ppo_rm": [0.1],
            "ppo_true": [0.1, 0.3],
        },
        min_length=1,
        description="Methods and their strengths: beta, IPO's tau, a learning rate, alpha, PPO's "
        "KL coefficient.",
    )
    settings: Annotated[dict[str, dict[str, Any]], BeforeValidator(dotted_for_each)] = Field(
        default={},
        description="Settings of the command that trains a method or the reward model: "
        "{ppo_true: {rounds: 20}, reward_model: {optimizer.learning_rate: 1e-3}}.",
    )
    measure: MeasureConfig = MeasureConfig()

    @property
    def classifier_share(self) -> float:
        """Of the reviews, that a classifier is fitted on: none where one is named."""
        return self.reward.share if self.reward.model is None else 0.0

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the numbers: not the folder, how many seeds, how many at the same time."""
        return self.model_dump(mode="json", exclude={"out", "seeds", "processes"})


def quick_form(config: SentimentConfig) -> SentimentConfig:
    """One seed, one strength of every method, a fraction of the steps; in a folder beside it."""
    measure, pairs, budget = config.measure, config.pairs, config.budget
    samples = min(measure.reference_samples, 32)
    return config.model_copy(
        update={
            "out": f"{config.out}-quick",
            "seeds": config.seeds[:1],
            "sft": {k: v for k, v in config.sft.items() if k != "epochs"} | {"max_steps": 60},
            "pairs": pairs.model_copy(update={"prefixes": min(pairs.prefixes, 64)}),
            "budget": budget.model_copy(update={"steps": min(budget.steps, 20)}),
            "strengths": {n: [values[len(values) // 2]] for n, values in config.strengths.items()},
            "settings": {
                name: {**config.settings.get(name, {}), **QUICK.get(name, {})}
                for name in {*config.settings, *QUICK}
            },
            "measure": measure.model_copy(
                update={
                    "prefixes": min(measure.prefixes, 24),
                    "samples": min(measure.samples, 2),
                    "evaluations": min(measure.evaluations, 2),
                    "reference_samples": samples,
                    "best_of": [n for n in measure.best_of if n <= samples] or [1],
                }
            ),
        }
    )


# -- the plan ------------------------------------------------------------------------------------


def plan(config: SentimentConfig) -> list[FrontierRun]:
    """Every run, seed after seed, validated before anything runs.

    Raises:
        InputError: there is no such method, or a setting is wrong.
    """
    _check(config)
    for seed in config.seeds:
        sft_config(config, seed)
        reward_model_config(config, seed)
    return [
        _run(config, method, strength, seed)
        for seed in config.seeds
        for method, strengths in config.strengths.items()
        for strength in strengths
    ]


def _check(config: SentimentConfig) -> None:
    known = [*METHOD_KINDS, REWARD_MODEL]
    for name in config.strengths:
        if name not in METHOD_KINDS:
            raise InputError(f"strengths.{name}: expected one of {', '.join(METHOD_KINDS)}.")
    lists: dict[str, list[Any]] = {"seeds": config.seeds, "measure.best_of": config.measure.best_of}
    lists |= {f"strengths.{name}": values for name, values in config.strengths.items()}
    for key, values in lists.items():
        if len({*values}) < len(values):
            raise InputError(f"{key}: expected different ones, got {values}.")
    if max(config.measure.best_of) > config.measure.reference_samples:
        raise InputError(
            f"measure.best_of: {max(config.measure.best_of)} is more than the "
            f"measure.reference_samples, {config.measure.reference_samples}."
        )
    if config.classifier_share + config.data.held_out_share >= 1:
        raise InputError("reward.share and data.held_out_share leave no reviews for the model.")
    sections = {"sft": config.sft, "every_run": config.every_run}
    for name, settings in config.settings.items():
        if name not in known:
            raise InputError(f"settings.{name}: expected one of {', '.join(known)}.")
        sections[f"settings.{name}"] = settings
    for where, settings in sections.items():
        strength = METHOD_KINDS.get(where.removeprefix("settings."))
        own = (*OWN_SETTINGS, strength.strength) if strength is not None else OWN_SETTINGS
        refuse_own(settings, own, where=where)


def seed_folder(config: SentimentConfig, seed: int) -> SeedFolder:
    """The folder of a seed."""
    return SeedFolder(Path(config.out) / f"seed-{seed}")


def held_out_pairs(folder: SeedFolder) -> Path:
    """Pairs on held-out prefixes, which every run of the seed is measured on."""
    return folder.pairs().with_name("held-out.jsonl")


def reward_source(config: SentimentConfig) -> dict[str, str]:
    """The true reward, as the commands name it."""
    if config.reward.model is None:
        return {"model": str(Path(config.out) / CLASSIFIER)}
    label = {} if config.reward.label is None else {"label": config.reward.label}
    return {"model": config.reward.model, **label}


def sft_config(config: SentimentConfig, seed: int) -> SFTConfig:
    """A seed's SFT on passages: the loss is on all their tokens, the prefix's too."""
    data = Path(config.out) / DATA
    values = {
        "model": config.model.model_dump(exclude_unset=True),
        "out": str(seed_folder(config, seed).sft),
        "seed": seed,
        "data": {
            "path": str(data / "passages.jsonl"),
            "test": str(data / "held-out.jsonl"),
            "template": "plain",
            "max_length": config.max_length,
            "max_dropped": 1.0,
        },
        "evaluation": {"num_samples": 0},
        "train_on_prompt": True,
    }
    values = nested(nested(values, config.every_run), config.sft)
    return validate(SFTConfig, values, where="sft")


def reward_model_config(config: SentimentConfig, seed: int) -> RewardConfig:
    """A seed's reward model, on the same pairs as DPO, for as many steps."""
    values = {
        **_common(
            config, seed_folder(config, seed), seed, seed_folder(config, seed).reward_model()
        ),
        **_on_pairs(config, seed_folder(config, seed)),
        "evaluation": {"every": config.budget.steps, "max_rows": ALL},
    }
    settings = config.every_run | config.settings.get(REWARD_MODEL, {})
    return validate(RewardConfig, nested(values, settings), where=f"settings.{REWARD_MODEL}")


def _run(config: SentimentConfig, method: str, strength: float, seed: int) -> FrontierRun:
    kind, folder = METHOD_KINDS[method], seed_folder(config, seed)
    values = _common(config, folder, seed, folder.run(method, strength))
    if kind.schema is PreferenceConfig:
        measured = {"kl_prompts": ALL, "kl_samples": config.measure.samples}
        every = max(1, config.budget.steps // config.measure.evaluations)
        values |= _on_pairs(config, folder) | {"evaluation": _measured(config, every, **measured)}
    else:
        measured = {"samples_per_prompt": config.measure.samples}
        values |= _on_samples(config, folder) | {"evaluation": _measured(config, **measured)}
    settings = {k: v for k, v in kind.settings.items() if not k.startswith("reward")}
    if kind.by_reward_model:
        settings["reward"] = str(folder.reward_model())
    elif kind.schema is PPOConfig:
        settings["reward"] = reward_source(config)
    settings |= config.every_run | config.settings.get(method, {}) | {kind.strength: strength}
    values = nested(values, settings)
    where = f"settings.{method}"
    checked = validate(kind.schema, values, where=where)
    if isinstance(checked, OnlineConfig | PPOConfig):
        every = steps_between(checked, config.measure.evaluations)
        values = nested(values, {"evaluation.every": every, "save_every": every})
        checked = validate(kind.schema, values, where=where)
    return FrontierRun(method, strength, seed, False, checked)


def _common(config: SentimentConfig, folder: SeedFolder, seed: int, out: Path) -> dict[str, Any]:
    batch = {"size": config.budget.pairs_per_step, "max_tokens": 16_384}
    return {
        "model": str(folder.sft),
        "out": str(out),
        "seed": seed,
        "optimizer": {"learning_rate": config.budget.learning_rate},
        "batch": batch,
    }


def _on_pairs(config: SentimentConfig, folder: SeedFolder) -> dict[str, Any]:
    return {
        "data": {
            "path": str(folder.pairs()),
            "test": str(held_out_pairs(folder)),
            "max_length": config.max_length,
            "max_dropped": 1.0,
        },
        "max_steps": config.budget.steps,
        "save_every": config.budget.steps,
    }


def _on_samples(config: SentimentConfig, folder: SeedFolder) -> dict[str, Any]:
    """Of PPO and online DPO, which take the prefixes of the pairs alone."""
    return {
        "data": {"path": str(folder.pairs()), "test": str(held_out_pairs(folder))},
        "prompts_per_round": PROMPTS_PER_ROUND,
        "sampling": {"max_new_tokens": config.max_new_tokens, "batch_size": 128},
    }


def _measured(config: SentimentConfig, every: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "every": every,
        "max_rows": ALL,
        "num_samples": 0,
        "max_new_tokens": config.max_new_tokens,
        "reward": reward_source(config),
        **more,
    }
