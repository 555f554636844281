"""What can be set of a study of SFT, DPO and its rivals, and the runs that follow from it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from dpo.config import DataConfig, ModelConfig, PreferenceConfig, RewardConfig, RunConfig, SFTConfig
from dpo.config_files import nested, validate
from dpo.errors import InputError
from dpo.evaluate.jobs import check_backend
from dpo.evaluation_config import EvaluateConfig
from dpo.experiment.methods import METHOD_KINDS, REWARD_MODEL, Dotted, dotted, refuse_own
from dpo.online_config import PPOConfig
from dpo.report.exact_study import BEST_OF_RM, DPO
from dpo.report.study_results import SFT
from dpo.sections import Count, Folder, Section, Seed, shorthand

BASE = "base"
OWN_SETTINGS = ("model", "data", "out", "seed")
"""What the study decides for each run."""

Values = Annotated[list[Any], Field(min_length=1)]


class BestOfNConfig(Section):
    """No training: of n samples of the SFT model the one that the reward model scores highest."""

    n: Annotated[int, Field(ge=2)] = Field(16, description="Samples for each response.")


class RivalsConfig(Section):
    """What DPO is compared with, from the same SFT model. Those that learn from the pairs have the
    settings in `dpo`, and their own on top.
    """

    preferred_ft: Dotted | None = Field(
        None, description="Settings of dpo train, which imitates the chosen responses."
    )
    unlikelihood: Dotted | None = Field(
        None, description="Settings of dpo train, which makes the rejected ones unlikely besides."
    )
    ppo_rm: Dotted | None = Field(
        None, description="Settings of dpo ppo with the seed's reward model."
    )
    best_of_n: BestOfNConfig | None = Field(None, description="By the seed's reward model.")

    @property
    def trained(self) -> dict[str, dict[str, Any]]:
        """Those that train a policy, with their settings."""
        return {
            name: settings
            for name in type(self).model_fields
            if name in METHOD_KINDS and (settings := getattr(self, name)) is not None
        }

    @property
    def by_reward_model(self) -> list[str]:
        """Those that need the seed's reward model."""
        found = [name for name in self.trained if METHOD_KINDS[name].by_reward_model]
        return found if self.best_of_n is None else [*found, "best_of_n"]


class StudyConfig(Section):
    """A study: one model, one data set, SFT, a grid of DPO settings, rivals, seeds."""

    out: Folder = Field(description="The study's folder; runs go to out/runs.")
    model: Annotated[ModelConfig, BeforeValidator(shorthand)] = Field(
        description="What SFT starts from."
    )
    data: Annotated[DataConfig, BeforeValidator(shorthand)] = DataConfig()
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="Each has runs of its own.")
    processes: Count | None = Field(
        None,
        description="Runs at the same time, each a process with one thread, so that its memory can "
        "be told; none: one after the other in this process.",
    )
    sft: dict[str, Any] = Field(default={}, description="Settings of dpo sft.")
    dpo: dict[str, Any] = Field(default={}, description="Settings of dpo train.")
    grid: Annotated[dict[str, Values], BeforeValidator(dotted)] = Field(
        default={"loss.beta": [0.3, 0.7, 1.0]},
        min_length=1,
        description="Dotted keys of dpo train, each with its values; every combination is a cell.",
    )
    reward_model: Dotted | None = Field(
        None, description="Settings of dpo reward, for the rivals that need a reward model."
    )
    rivals: RivalsConfig = RivalsConfig()
    evaluation: dict[str, Any] = Field(default={}, description="Settings of dpo evaluate.")

    @model_validator(mode="after")
    def _no_run_twice(self) -> StudyConfig:
        lists = {"seeds": self.seeds} | {f"grid.{key}": v for key, v in self.grid.items()}
        for key, values in lists.items():
            if any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f"{key}: expected different ones, got {values}")
        return self

    @model_validator(mode="after")
    def _reward_model_where_it_is_used(self) -> StudyConfig:
        needed_by = self.rivals.by_reward_model
        if needed_by and self.reward_model is None:
            raise ValueError(
                f"reward_model: rivals.{needed_by[0]} needs one; give settings of dpo reward"
            )
        if self.reward_model is not None and not needed_by:
            raise ValueError("reward_model: has no effect, no rival needs one")
        return self


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run of the study."""

    name: str
    """What its files are called: "ppo_rm seed 0"."""
    label: str
    """What the tables call the method: "SFT", "DPO beta 0.3", "PPO, reward model"."""
    seed: int
    config: RunConfig
    by_reward_model: bool = False
    """Whether it needs the seed's reward model."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a study will run, validated before anything runs."""

    sft: tuple[Cell, ...]
    reward_models: tuple[Cell, ...]
    dpo: tuple[Cell, ...]
    rivals: tuple[Cell, ...]
    evaluation: EvaluateConfig
    labels: dict[str, tuple[str, int]]
    """Name in the evaluation: the cell's label and seed."""
    best_of: int | None
    """n of best-of-n, where it is a rival."""

    @property
    def policies(self) -> tuple[Cell, ...]:
        """The runs that leave a language model, in the order of the tables."""
        return (*self.sft, *self.dpo, *self.rivals)

    @property
    def stages(self) -> list[tuple[Cell, ...]]:
        """All runs; what a run starts from is in a stage before its own."""
        return [self.sft, self.reward_models, (*self.dpo, *self.rivals)]


def plan(config: StudyConfig) -> Plan:
    """All runs of a study with their configurations.

    Raises:
        InputError: a setting of any of them is wrong, or the study sets what it must not.
    """
    refuse_own(config.sft, OWN_SETTINGS, where="sft")
    refuse_own(config.dpo, (*OWN_SETTINGS, "reference"), where="dpo")
    refuse_own(config.reward_model or {}, OWN_SETTINGS, where=REWARD_MODEL)
    refuse_own(config.evaluation, ("models", "data", "out"), where="evaluation")
    sft = tuple(_sft_cell(config, seed) for seed in config.seeds)
    reward_models = tuple(
        _reward_model_cell(config, seed) for seed in config.seeds if config.reward_model is not None
    )
    dpo = tuple(
        _dpo_cell(config, settings, label, seed)
        for settings, label in combinations(config.grid)
        for seed in config.seeds
    )
    rivals = tuple(
        _rival_cell(config, method, settings, seed, like=dpo[0].config)
        for method, settings in config.rivals.trained.items()
        for seed in config.seeds
    )
    cells = (*sft, *dpo, *rivals)
    models = {cell.name: cell.config.out for cell in cells}
    labels = {cell.name: (cell.label, cell.seed) for cell in cells}
    if config.model.path is not None:
        models = {BASE: config.model.path, **models}
        labels = {BASE: (BASE, config.seeds[0]), **labels}
    evaluation = _evaluation(config, models)
    _check_backend(evaluation, cells)
    _check_room(config, evaluation, rivals)
    best_of = config.rivals.best_of_n
    n = None if best_of is None else best_of.n
    return Plan(sft, reward_models, dpo, rivals, evaluation, labels, n)


def best_of_label(n: int) -> str:
    """What the tables call it."""
    return BEST_OF_RM.replace("-n,", f"-{n},")


def _given(section: Section) -> dict[str, Any]:
    """What was set of a section, so that it passes validation again as it did."""
    return section.model_dump(exclude_unset=True)


def _prompts_only(data: DataConfig) -> dict[str, Any]:
    """The data for those who take its prompts and no responses."""
    return {k: v for k, v in _given(data).items() if k not in ("max_length", "max_dropped")}


def combinations(grid: dict[str, list[Any]]) -> list[tuple[dict[str, Any], str]]:
    """Every combination of the grid's values, with its label.

    >>> combinations({"loss.beta": [0.3, 1]})
    [({'loss.beta': 0.3}, 'beta 0.3'), ({'loss.beta': 1}, 'beta 1')]
    """
    found = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        label = " ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())
        found.append((settings, label))
    return found


# -- runs ----------------------------------------------------------------------------------------


def _folder(config: StudyConfig, name: str, seed: int) -> str:
    return str(Path(config.out) / "runs" / f"{name}-seed{seed}")


def _of_seed(config: StudyConfig, name: str, seed: int) -> dict[str, Any]:
    """What the study decides for a run that starts from the seed's SFT model."""
    return {
        "model": _folder(config, "sft", seed),
        "data": _given(config.data),
        "out": _folder(config, name, seed),
        "seed": seed,
    }


def _sft_cell(config: StudyConfig, seed: int) -> Cell:
    values = {**config.sft, **_of_seed(config, "sft", seed), "model": _given(config.model)}
    return Cell(f"{SFT} seed {seed}", SFT, seed, validate(SFTConfig, values, where="sft"))


def _reward_model_cell(config: StudyConfig, seed: int) -> Cell:
    values = nested(_of_seed(config, "reward", seed), config.reward_model or {})
    checked = validate(RewardConfig, values, where=REWARD_MODEL)
    return Cell(f"{REWARD_MODEL} seed {seed}", "reward model", seed, checked)


def _dpo_cell(config: StudyConfig, settings: dict[str, Any], label: str, seed: int) -> Cell:
    name = f"dpo-{label.replace(' ', '-')}"
    values = nested({**config.dpo, **_of_seed(config, name, seed)}, settings)
    checked = validate(PreferenceConfig, values, where=f"dpo, {label}")
    return Cell(f"{DPO} {label} seed {seed}", f"{DPO} {label}", seed, checked)


def _rival_cell(
    config: StudyConfig, method: str, settings: dict[str, Any], seed: int, *, like: RunConfig
) -> Cell:
    """A rival's run; its KL is measured as that of `like`, a run of DPO, unless it says more."""
    kind, where = METHOD_KINDS[method], f"rivals.{method}"
    refuse_own(settings, (*OWN_SETTINGS, "reference", *kind.settings), where=where)
    assert isinstance(like, PreferenceConfig)
    measured = like.evaluation
    values = _of_seed(config, method, seed)
    if kind.schema is PPOConfig:
        values["data"] = _prompts_only(config.data)
        values["reward"] = _folder(config, "reward", seed)
        values["evaluation"] = {"max_new_tokens": measured.max_new_tokens}
        if measured.kl_prompts > 0:
            values["evaluation"]["max_rows"] = measured.kl_prompts
    else:
        not_shared = ["loss", "moving_reference"]
        if settings.keys() & {"epochs", "max_steps"}:
            not_shared += ["epochs", "max_steps"]  # one replaces the other
        shared = {key: value for key, value in config.dpo.items() if key not in not_shared}
        values = nested({**shared, **values}, {"evaluation.kl_prompts": measured.kl_prompts})
    makes_it = {key: value for key, value in kind.settings.items() if key != "reward"}
    checked = validate(kind.schema, nested(nested(values, settings), makes_it), where=where)
    return Cell(f"{method} seed {seed}", kind.title, seed, checked, kind.by_reward_model)


# -- the evaluation ------------------------------------------------------------------------------


def _evaluation(config: StudyConfig, models: dict[str, str]) -> EvaluateConfig:
    values = {
        **config.evaluation,
        "models": models,
        "data": _prompts_only(config.data),
        "out": str(Path(config.out) / "evaluation"),
    }
    return validate(EvaluateConfig, values, where="evaluation")


def _check_backend(evaluation: EvaluateConfig, cells: Sequence[Cell]) -> None:
    """Refuse a backend that could not sample from what the runs leave."""
    check_backend(evaluation)
    adapted = [cell.name for cell in cells if getattr(cell.config, "adapter", None) is not None]
    if evaluation.backend == "vllm" and adapted:
        raise InputError(
            f"evaluation.backend: {adapted[0]} leaves an adapter, and vLLM is given whole models; "
            "leave evaluation.backend out."
        )


def _check_room(config: StudyConfig, evaluation: EvaluateConfig, rivals: Sequence[Cell]) -> None:
    """Refuse responses so long that a fresh model has no room for a prompt."""
    fresh = config.model.fresh
    if fresh is None:
        return
    longest = {"evaluation": evaluation.max_new_tokens}
    for cell in rivals:
        if isinstance(cell.config, PPOConfig):
            longest["rivals.ppo_rm.sampling"] = cell.config.sampling.max_new_tokens
    for section, tokens in longest.items():
        if tokens >= fresh.positions:
            raise InputError(
                f"{section}.max_new_tokens: {tokens} leaves no room for a prompt; "
                f"model.fresh.positions is {fresh.positions}."
            )
