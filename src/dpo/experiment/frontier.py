"""`dpo experiment frontier`: true reward against KL on the embedded language, for DPO, PPO, online
DPO and the other baselines, from one SFT model a seed.

Finished runs are not repeated; a run that was stopped goes on. Every run is a process of its own,
so that its memory can be told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dpo.atomic import jsonable, replace_file, write_json
from dpo.config import PreferenceConfig, RewardConfig, RewardSourceConfig, RunConfig
from dpo.data.rows import PreferenceRow
from dpo.data.sources import write_jsonl
from dpo.data.split import split_by_prompt
from dpo.data.synthetic import World, label_pairs
from dpo.errors import DivergedError
from dpo.experiment.embedded import (
    TEST_FRACTION,
    make_base,
    open_model,
    sample_answers,
    train_demonstrator,
)
from dpo.experiment.engines import in_processes
from dpo.experiment.frontier_config import (
    DIVERGED,
    SAMPLES,
    FrontierConfig,
    kind_of,
    left_out,
    plan,
    quick_form,
    reward_model_config,
    seed_folder,
)
from dpo.experiment.frontier_results import collect, measure_shift
from dpo.models.load import weights_digest
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.report.frontier_page import write_frontier_study
from dpo.report.frontier_study import FrontierStudy
from dpo.train.jobs import train_preference
from dpo.train.online import train_online
from dpo.train.ppo import train_ppo
from dpo.train.reward import train_reward
from dpo.train.reward_source import open_reward
from dpo.train.run import environment, open_run
from dpo.train.stopping import stop_here

log = logging.getLogger("dpo")

JOBS: dict[type[RunConfig], Callable[[Any], Path]] = {
    PreferenceConfig: train_preference,
    OnlineConfig: train_online,
    PPOConfig: train_ppo,
    RewardConfig: train_reward,
}
MEASURED_PAIRS = 8
"""Of a held-out question, at most: accuracy takes no more, and every evaluation goes over them."""

OTHER_DRAWS = 1_000_000
"""Added to a seed: the samples that show what is possible are none of those that became pairs."""


def run_frontier(config: FrontierConfig) -> FrontierStudy:
    """Run what is not finished, measure, write table, figures and page.

    Raises:
        InputError: a setting is wrong (before anything runs), or `out` holds a study with other
            settings. More seeds, or other processes, are no other settings.
        Stopped: SIGTERM or SIGINT came; the same command goes on.
    """
    if config.quick:
        config = quick_form(config)
    runs = plan(config)
    settings = config.model_dump(mode="json")
    decisive = {k: v for k, v in settings.items() if k not in ("out", "seeds", "processes")}
    run = open_run(Path(config.out), {"command": "experiment frontier", **decisive})
    try:
        with stop_here():
            in_processes(
                config.processes, prepare_seed, [(config, s) for s in config.seeds], "Preparing"
            )
            in_processes(config.processes, finish, [(one.config,) for one in runs], "Training")
            shifted = [(config, one) for one in runs if one.without]
            in_processes(config.processes, measure_shift, shifted, "Measuring")
        study = collect(config, runs)
        write_json(run.folder / "study.json", {"config": settings, "environment": environment()})
        write_frontier_study(study)
        run.update_manifest(status="finished")
    finally:
        run.close()
    return study


# -- a seed's data -------------------------------------------------------------------------------


def prepare_seed(config: FrontierConfig, seed: int) -> None:
    """Base, SFT model, labelled pairs, reward models, and rewards of many samples of the SFT model;
    what is there is taken as it is.
    """
    folder = seed_folder(config, seed)
    folder.path.mkdir(parents=True, exist_ok=True)
    base = make_base(folder.base, seed, num_facts=config.num_facts)
    train_demonstrator(folder.sft, base, seed, steps=config.sft_steps, num_facts=config.num_facts)
    make_pairs(config, seed)
    finish(reward_model_config(config, seed, without=False))
    if config.shift:
        finish(reward_model_config(config, seed, without=True))
    sample_reference(config, seed)


def make_pairs(config: FrontierConfig, seed: int) -> None:
    """Pairs of the SFT model's answers to all questions, labelled by Bradley-Terry, and those of
    them that are not on the seed's kind. Training splits them by question.
    """
    folder = seed_folder(config, seed)
    world, number = World(config.num_facts), config.pairs_per_question
    identity = {
        "command": "pairs",
        "num_facts": config.num_facts,
        "pairs_per_question": number,
        "seed": seed,
        "model_sha256": weights_digest(open_model(folder.sft)[1]),
    }
    run = open_run(folder.pairs().parent, identity)
    try:
        if run.finished:
            return
        answers = sample_answers(folder.sft, world.prompts, num_per_prompt=2 * number, seed=seed)
        held_out = {*held_out_questions(world)}
        prompts, first, second = [], [], []
        for prompt, texts in zip(world.prompts, answers, strict=True):
            kept = min(number, MEASURED_PAIRS) if prompt in held_out else number
            prompts += [prompt] * kept
            first += texts[: 2 * kept : 2]
            second += texts[1 : 2 * kept : 2]
        rows = label_pairs(world, prompts, first, second, seed=seed)
        write_jsonl(rows, folder.pairs())
        others = [row for row in rows if kind_of(str(row.prompt)) != left_out(seed)]
        write_jsonl(others, folder.pairs(without=True))
        run.update_manifest(status="finished")
    finally:
        run.close()


def held_out_questions(world: World) -> list[str]:
    """The questions that no training run sees: a question's side depends on itself alone."""
    rows = [PreferenceRow(prompt, "", "") for prompt in world.prompts]
    test = split_by_prompt(rows, test_fraction=TEST_FRACTION, seed=0).test
    return [str(row.prompt) for row in test]


def sample_reference(config: FrontierConfig, seed: int) -> None:
    """True rewards, and the reward model's, of the SFT model's answers to held-out questions."""
    folder, world = seed_folder(config, seed), World(config.num_facts)
    reward = open_reward(RewardSourceConfig(model=str(folder.reward_model())))
    identity = {
        "command": "samples",
        "seed": seed,
        "per_question": config.optimum_samples,
        "model_sha256": weights_digest(open_model(folder.sft)[1]),
        "reward_sha256": reward.digest,
    }
    run = open_run(folder.samples, identity)
    try:
        if run.finished:
            return
        questions = held_out_questions(world)
        answers = sample_answers(
            folder.sft,
            questions,
            num_per_prompt=config.optimum_samples,
            seed=OTHER_DRAWS + seed,
        )
        tables = _rewards_of(questions, answers, world, reward)
        with replace_file(folder.samples / SAMPLES) as file:
            save_file(tables, file)
        write_json(folder.samples / "questions.json", questions)
        run.update_manifest(status="finished")
    finally:
        run.close()


def _rewards_of(
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    world: World,
    reward: Callable[[Sequence[str], Sequence[str]], Tensor],
) -> dict[str, Tensor]:
    """Both rewards of every answer, (P, N); an answer that comes twice is scored once."""
    asked = [(q, text) for q, own in zip(questions, answers, strict=True) for text in own]
    place = {one: i for i, one in enumerate(dict.fromkeys(asked))}
    where = torch.tensor([place[one] for one in asked]).reshape(len(questions), -1)
    true = torch.tensor([world.reward(q, text) for q, text in place], dtype=torch.float64)
    scores = reward([q for q, _ in place], [text for _, text in place])
    return {"rewards": true[where], "scores": scores[where]}


# -- runs ----------------------------------------------------------------------------------------


def finish(config: RunConfig) -> None:
    """Train, if that is not done. A run that diverges is remembered with its sentence, so that the
    same run does not diverge again.
    """
    file = Path(config.out) / DIVERGED
    settings = jsonable(config.model_dump(mode="json", exclude={"out"}))
    if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["config"] == settings:
        return
    try:
        JOBS[type(config)](config)
    except DivergedError as error:
        log.warning("%s diverged: %s", config.out, error)
        write_json(file, {"sentence": str(error), "config": settings})
