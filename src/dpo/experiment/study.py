"""`dpo experiment run`: SFT, then DPO over a grid, over seeds, evaluated together.

Every cell of the grid starts from the same SFT model of its seed, with that model as the
reference, so cells differ in nothing but the settings of the grid. Runs that are finished are not
repeated.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from dpo.atomic import write_json
from dpo.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PreferenceConfig,
    SFTConfig,
    nested,
    shorthand,
    validate,
)
from dpo.errors import InputError
from dpo.evaluate.jobs import (
    Evaluation,
    check_held_out,
    generate_with,
    held_out_rows,
    judge,
)
from dpo.evaluate.records import Generation
from dpo.evaluate.sbert import load_sentence_model
from dpo.progress import counting
from dpo.report.study import CellResult, Study, write_study
from dpo.sections import Folder, Section, Seed
from dpo.train.jobs import train_preference, train_sft
from dpo.train.prepare import load_preferences
from dpo.train.run import environment, read_manifest, read_metrics

log = logging.getLogger("dpo")

SFT = "SFT"
BASE = "base"


def dotted(values: Any) -> Any:
    """Nested sections as dotted keys, so that `grid.loss.beta=[1]` replaces the key `loss.beta`.

    >>> dotted({"loss.beta": [0.3], "loss": {"beta": [1]}})
    {'loss.beta': [1]}
    """
    if not isinstance(values, dict):
        return values
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": v for inner, v in dotted(value).items()}
        else:
            found[str(key)] = value
    return found


Values = Annotated[list[Any], Field(min_length=1)]


class StudyConfig(Section):
    """A study: one model, one data set, SFT, a grid of DPO settings, seeds."""

    out: Folder = Field(description="The study's folder; runs go to out/runs.")
    model: Annotated[ModelConfig, BeforeValidator(shorthand)] = Field(
        description="What SFT starts from."
    )
    data: Annotated[DataConfig, BeforeValidator(shorthand)] = DataConfig()
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    sft: dict[str, Any] = Field(default={}, description="Settings of dpo sft.")
    dpo: dict[str, Any] = Field(default={}, description="Settings of dpo train.")
    grid: Annotated[dict[str, Values], BeforeValidator(dotted)] = Field(
        default={"loss.beta": [0.3, 0.7, 1.0]},
        min_length=1,
        description="Dotted keys of dpo train, each with its values; every combination is a cell.",
    )
    evaluation: dict[str, Any] = Field(default={}, description="Settings of dpo evaluate.")

    @model_validator(mode="after")
    def _no_run_twice(self) -> StudyConfig:
        lists = {"seeds": self.seeds} | {f"grid.{key}": v for key, v in self.grid.items()}
        for key, values in lists.items():
            if any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f"{key}: expected different ones, got {values}")
        return self


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run of the study."""

    label: str
    """What the tables call it: "SFT", "DPO beta 0.3"."""
    seed: int
    config: SFTConfig | PreferenceConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a study will run, validated before anything runs."""

    sft: tuple[Cell, ...]
    dpo: tuple[Cell, ...]
    evaluation: EvaluateConfig
    labels: dict[str, tuple[str, int]]
    """Name in the evaluation: the cell's label and seed."""


def plan(config: StudyConfig) -> Plan:
    """All runs of a study with their configurations.

    Raises:
        InputError: a setting of any of them is wrong, or the study sets what it must not.
    """
    _refuse(config.sft, ("model", "data", "out", "seed"), "sft")
    _refuse(config.dpo, ("model", "data", "out", "seed", "reference"), "dpo")
    _refuse(config.evaluation, ("models", "data", "out"), "evaluation")
    runs = Path(config.out) / "runs"
    model = _given(config.model)
    data = _given(config.data)
    sft = tuple(
        Cell(
            SFT,
            seed,
            validate(
                SFTConfig,
                {
                    **config.sft,
                    "model": model,
                    "data": data,
                    "out": str(runs / f"sft-seed{seed}"),
                    "seed": seed,
                },
                where="sft",
            ),
        )
        for seed in config.seeds
    )
    dpo = tuple(
        Cell(f"DPO {label}", seed, _dpo_config(config, settings, label, seed, runs))
        for settings, label in combinations(config.grid)
        for seed in config.seeds
    )
    names = {f"{cell.label} seed {cell.seed}": cell for cell in (*sft, *dpo)}
    models = {name: cell.config.out for name, cell in names.items()}
    labels = {name: (cell.label, cell.seed) for name, cell in names.items()}
    if config.model.path is not None:
        models = {BASE: config.model.path, **models}
        labels = {BASE: (BASE, config.seeds[0]), **labels}
    values = {
        **config.evaluation,
        "models": models,
        "data": {k: v for k, v in data.items() if k not in ("max_length", "max_dropped")},
        "out": str(Path(config.out) / "evaluation"),
    }
    evaluation = validate(EvaluateConfig, values, where="evaluation")
    fresh = config.model.fresh
    if fresh is not None and evaluation.max_new_tokens >= fresh.positions:
        raise InputError(
            f"evaluation.max_new_tokens: {evaluation.max_new_tokens} leaves no room for a prompt; "
            f"model.fresh.positions is {fresh.positions}."
        )
    return Plan(sft, dpo, evaluation, labels)


def _given(section: Section) -> dict[str, Any]:
    """What was set of a section, so that it passes validation again as it did."""
    return section.model_dump(exclude_unset=True)


def _refuse(values: dict[str, Any], keys: Sequence[str], section: str) -> None:
    """The study itself decides some settings of its runs."""
    for key in keys:
        if key in values:
            raise InputError(
                f"{section}.{key}: a study sets this itself; remove it from {section}."
            )


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


def _dpo_config(
    config: StudyConfig, settings: dict[str, Any], label: str, seed: int, runs: Path
) -> PreferenceConfig:
    values = nested(
        {
            **config.dpo,
            "model": str(runs / f"sft-seed{seed}"),
            "data": _given(config.data),
            "out": str(runs / f"dpo-{label.replace(' ', '-')}-seed{seed}"),
            "seed": seed,
        },
        settings,
    )
    return validate(PreferenceConfig, values, where=f"dpo, {label}")


def run_study(config: StudyConfig, *, trust_remote_code: bool = False) -> Study:
    """Run what is not finished, evaluate all together, write table, figures and samples.

    Raises:
        InputError: a configuration is wrong (before anything runs), or data or model cannot be had.
    """
    todo = plan(config)
    cells = (*todo.sft, *todo.dpo)
    for number, cell in enumerate(cells, 1):
        log.info("Run %d of %d: %s, seed %d.", number, len(cells), cell.label, cell.seed)
        if isinstance(cell.config, SFTConfig):
            train_sft(cell.config, trust_remote_code=trust_remote_code)
        else:
            train_preference(cell.config, trust_remote_code=trust_remote_code)
    evaluation = evaluate_together(todo, trust_remote_code=trust_remote_code)
    results = [_result(cell) for cell in cells]
    study = Study(Path(config.out), results, evaluation)
    write_json(
        study.folder / "study.json",
        {
            "config": config.model_dump(mode="json"),
            "environment": environment(),
            "runs": [asdict(result) for result in results],
        },
    )
    write_study(study)
    return study


def evaluate_together(todo: Plan, *, trust_remote_code: bool) -> Evaluation:
    """Every run's responses to the same held-out prompts; the seeds of a cell count as its samples.

    A prompt's responses from several seeds stay together in the intervals, whose unit is the
    prompt.
    """
    config = todo.evaluation
    data = load_preferences(config.data)
    rows = held_out_rows(data, config.max_prompts, config.seed)
    for name, path in config.models.items():
        check_held_out(name, path, rows, allow=config.allow_overlap)
    embed = load_sentence_model(config.sentence_model.path)
    seeds = sorted({seed for _, seed in todo.labels.values()})
    records: list[Generation] = []
    total = len(rows) * config.samples_per_prompt * len(config.temperatures) * len(config.models)
    with counting("Generating", total) as advance:
        for name, path in config.models.items():
            label, seed = todo.labels[name]
            made = generate_with(
                name, path, data, rows, config, advance, trust_remote_code=trust_remote_code
            )
            first = seeds.index(seed) * config.samples_per_prompt
            records += [replace(r, model=label, sample=first + r.sample) for r in made]
    meta = {**config.model_dump(mode="json", exclude={"out"}), "data_sha256": data.sha256}
    return judge(records, rows, embed, Path(config.out), world=None, meta=meta)


def _result(cell: Cell) -> CellResult:
    """What a finished run measured on held-out rows."""
    folder = Path(cell.config.out)
    held_out = [row for row in read_metrics(folder) if "eval/loss" in row]
    return CellResult(
        label=cell.label,
        seed=cell.seed,
        folder=folder.name,
        epochs=[float(row["epoch"]) for row in held_out],
        loss=[float(row["eval/loss"]) for row in held_out],
        accuracy=[float(row.get("eval/rewards/accuracy", "nan")) for row in held_out],
        chosen_change=[float(row.get("eval/logps/chosen_change", "nan")) for row in held_out],
        kl=[float(row.get("eval/kl", "nan")) for row in held_out],
        kl_stderr=[float(row.get("eval/kl_stderr", "nan")) for row in held_out],
        seconds=float(read_manifest(folder)["seconds_training"]),
    )
