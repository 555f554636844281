"""`dpo experiment losses`: every loss of the family on the embedded language, whose true reward is
known, from one SFT model a seed, on the same rated answers, with the same number of responses.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from dpo.atomic import jsonable, write_json
from dpo.config import PreferenceConfig
from dpo.config_files import nested, validate
from dpo.data.sources import write_jsonl
from dpo.data.synthetic import World
from dpo.errors import DivergedError, InputError
from dpo.experiment.embedded import (
    MAX_NEW_TOKENS,
    data_settings,
    make_base,
    open_model,
    sample_answers,
    train_demonstrator,
)
from dpo.experiment.loss_results import SFT, Contestant, SeedData, collect
from dpo.experiment.methods import dotted_for_each, refuse_own
from dpo.experiment.ratings import LIST_SIZE, rated_rows
from dpo.loss_config import LOSS_CONFIGS, Kind, describe_unknown_loss
from dpo.models.load import weights_digest
from dpo.report.loss_study import LossStudy, write_loss_study
from dpo.sections import Count, Folder, Positive, Section, Seed
from dpo.train.jobs import train_preference
from dpo.train.run import environment, open_run

log = logging.getLogger("dpo")

RESPONSES: dict[Kind, int] = {"pair": 2, "list": LIST_SIZE, "unpaired": 1}
"""Responses in a row."""

OWN_SETTINGS = ("model", "data", "out", "seed", "reference", "moving_reference", "loss.name")
"""What the study decides for each run."""


class LossStudyConfig(Section):
    """Which losses, from which start, for how long."""

    out: Folder = Field(description="The study's folder.")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="Each has runs of its own.")
    names: list[str] | None = Field(None, min_length=1, description="Losses; all by default.")
    steps: Count = Field(100, description="Optimizer steps of each loss.")
    responses_per_step: Annotated[int, Field(ge=LIST_SIZE, multiple_of=LIST_SIZE)] = Field(
        128, description="64 pairs, 32 rankings of four, or 128 judged responses."
    )
    learning_rate: Positive = Field(2e-4, description="Of every loss that sets no other.")
    losses: Annotated[dict[str, dict[str, Any]], BeforeValidator(dotted_for_each)] = Field(
        default={}, description="Settings of dpo train for single losses: {sppo: {loss.beta: 1}}."
    )
    sft_steps: Count = Field(700, description="Optimizer steps of SFT.")
    num_facts: Count = Field(80, le=80, description="Facts; each is asked in four phrasings.")
    rankings_per_question: Count = Field(
        6, description="Rankings of four sampled answers; each gives two pairs as well."
    )
    samples_per_question: Count = Field(
        4, description="Answers of each trained model to each held-out question."
    )
    sentence_model: str = Field("offline", description="The Sentence-BERT model that judges.")


@dataclass(frozen=True, slots=True)
class LossRun:
    """One loss from one seed's SFT model."""

    name: str
    kind: Kind
    seed: int
    config: PreferenceConfig


def plan(config: LossStudyConfig) -> list[LossRun]:
    """Every run, seed after seed, validated before anything runs.

    Raises:
        InputError: a loss does not exist or is named twice, or a setting is wrong.
    """
    names = list(LOSS_CONFIGS) if config.names is None else config.names
    for name in [*names, *config.losses]:
        if name not in LOSS_CONFIGS:
            key = "names" if name in names else "losses"
            raise InputError(f"{key}: {describe_unknown_loss(name)}.")
    for name, settings in config.losses.items():
        if name not in names:
            raise InputError(f"losses.{name}: has no effect, for names does not have {name}.")
        refuse_own(settings, OWN_SETTINGS, where=f"losses.{name}")
    for key, values in (("names", names), ("seeds", config.seeds)):
        if len({*values}) < len(values):
            raise InputError(f"{key}: expected different ones, got {values}.")
    return [_run(config, name, seed) for seed in config.seeds for name in names]


def _run(config: LossStudyConfig, name: str, seed: int) -> LossRun:
    kind = LOSS_CONFIGS[name].kind
    folder = seed_folder(config, seed)
    rows = "rankings" if kind == "list" else "pairs"
    values = {
        "model": str(folder / "sft"),
        "data": data_settings(str(folder / "answers" / f"{rows}.jsonl")),
        "out": str(folder / "losses" / name),
        "seed": seed,
        "loss": {"name": name},
        "max_steps": config.steps,
        "optimizer": {"learning_rate": config.learning_rate},
        "batch": {"size": config.responses_per_step // RESPONSES[kind], "max_tokens": 16_384},
        "save_every": config.steps,
        # What the table shows is measured once, afterwards and for all losses alike.
        "evaluation": {
            "every": config.steps,
            "max_rows": 256,
            "num_samples": 0,
            "kl_prompts": 0,
            "max_new_tokens": MAX_NEW_TOKENS,
        },
    }
    values = nested(values, config.losses.get(name, {}))
    return LossRun(name, kind, seed, validate(PreferenceConfig, values, where=f"losses.{name}"))


def seed_folder(config: LossStudyConfig, seed: int) -> Path:
    """Where the base, the SFT model, its answers and the losses of a seed are."""
    return Path(config.out) / f"seed-{seed}"


def run_losses(config: LossStudyConfig) -> LossStudy:
    """Run what is not finished, measure all models alike, write table, figure and page.

    Raises:
        InputError: a setting is wrong (before anything runs), or `out` holds other runs.
    """
    runs = plan(config)
    data = {seed: prepare_seed(config, seed) for seed in config.seeds}
    failures: dict[tuple[str, int], str] = {}
    for number, run in enumerate(runs, 1):
        log.info("Run %d of %d: %s, seed %d.", number, len(runs), run.name, run.seed)
        failure = train(run)
        if failure is not None:
            failures[run.name, run.seed] = failure
    contestants = [Contestant(SFT, seed, data[seed].sft) for seed in config.seeds]
    contestants += [
        Contestant(run.name, run.seed, Path(run.config.out))
        for run in runs
        if (run.name, run.seed) not in failures
    ]
    kinds = {run.name: run.kind for run in runs}
    results = collect(
        contestants,
        data,
        kinds,
        failures,
        folder=Path(config.out) / "evaluation",
        world=World(config.num_facts),
        samples_per_question=config.samples_per_question,
        sentence_model=config.sentence_model,
    )
    study = LossStudy(
        Path(config.out),
        results.rows,
        label_accuracy=results.label_accuracy,
        num_questions=results.num_questions,
        config=config.model_dump(mode="json"),
    )
    write_json(study.folder / "study.json", {"config": study.config, "environment": environment()})
    write_loss_study(study)
    return study


def prepare_seed(config: LossStudyConfig, seed: int) -> SeedData:
    """Base, SFT model and its rated answers; what is there is taken as it is.

    The answers are a run directory of their own, so that other settings are refused.
    """
    folder = seed_folder(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    base = make_base(folder / "base", seed, num_facts=config.num_facts)
    sft = train_demonstrator(
        folder / "sft", base, seed, steps=config.sft_steps, num_facts=config.num_facts
    )
    identity = {
        "command": "answers",
        "num_facts": config.num_facts,
        "rankings_per_question": config.rankings_per_question,
        "seed": seed,
        "model_sha256": weights_digest(open_model(sft)[1]),
    }
    run = open_run(folder / "answers", identity)
    try:
        if not run.finished:
            _sample_and_rate(config, sft, seed, run.folder)
            run.update_manifest(status="finished")
    finally:
        run.close()
    return SeedData(seed, sft, run.folder / "pairs.jsonl")


def _sample_and_rate(config: LossStudyConfig, sft: Path, seed: int, folder: Path) -> None:
    """The SFT model's answers to all questions as rankings and pairs. Training splits them by
    question as it split the demonstrations.
    """
    world = World(config.num_facts)
    per_question = LIST_SIZE * config.rankings_per_question
    answers = sample_answers(sft, world.prompts, num_per_prompt=per_question, seed=seed)
    rows = rated_rows(world, world.prompts, answers, seed=seed)
    write_jsonl(rows.rankings, folder / "rankings.jsonl")
    write_jsonl(rows.pairs, folder / "pairs.jsonl")
    log.info("Seed %d: %d rankings, %d pairs.", seed, len(rows.rankings), len(rows.pairs))


def train(run: LossRun) -> str | None:
    """Train one loss; the sentence that it ended with where it diverged, which is remembered, so
    that the same run does not diverge again.
    """
    folder = Path(run.config.out)
    file = folder / "diverged.json"
    settings = jsonable(run.config.model_dump(mode="json", exclude={"out"}))
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["config"] == settings:
            log.info("%s diverged before: %s", folder, known["sentence"])
            return str(known["sentence"])
    try:
        train_preference(run.config)
    except DivergedError as error:
        log.warning("%s diverged: %s", folder, error)
        write_json(file, {"sentence": str(error), "config": settings})
        return str(error)
    return None
