"""What a study of frontiers reads of its finished runs, and what it measures besides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo.atomic import write_json
from dpo.config import DataConfig, RewardSourceConfig, RunConfig
from dpo.config_files import flat, validate
from dpo.core.frontier import Point
from dpo.data.synthetic import World
from dpo.evaluate.frontier import (
    best_of_n,
    curve_stderr,
    efficiency,
    optimum_curve,
    within_prompt_correlation,
    world_of_samples,
)
from dpo.experiment.embedded import MAX_NEW_TOKENS, data_settings, open_model
from dpo.experiment.frontier_config import (
    DIVERGED,
    SAMPLES,
    FrontierConfig,
    FrontierRun,
    SeedFolder,
    kind_of,
    left_out,
    reward_model_config,
    seed_folder,
)
from dpo.experiment.methods import METHOD_KINDS
from dpo.experiment.ratings import label_accuracy
from dpo.models.load import weights_digest
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.report.exact_study import (
    BEST_OF_RM,
    BEST_OF_TRUE,
    DPO,
    FIXED_KLS,
    IPO,
    ONLINE_DPO,
    PPO_RM,
    PPO_TRUE,
    PREFERRED_FT,
    UNLIKELIHOOD,
)
from dpo.report.frontier_study import (
    Cost,
    FrontierStudy,
    Measurement,
    RewardModelFit,
    RunResult,
    SeedResult,
    ShiftResult,
)
from dpo.train.on_policy import OnPolicyEvaluation
from dpo.train.prepare import load_preferences
from dpo.train.reward_source import open_reward
from dpo.train.run import read_manifest, read_metrics

MODELS = {
    DPO: ["policy", "reference"],
    IPO: ["policy", "reference"],
    PREFERRED_FT: ["policy"],
    UNLIKELIHOOD: ["policy"],
    PPO_RM: ["policy", "critic", "reference", "reward model"],
    PPO_TRUE: ["policy", "critic", "reference"],
    ONLINE_DPO: ["policy", "reference", "reward model"],
    BEST_OF_TRUE: ["reference"],
    BEST_OF_RM: ["reference", "reward model"],
}
"""What a method needs in memory; KL is measured against the reference in every run, besides."""


def collect(config: FrontierConfig, runs: Sequence[FrontierRun]) -> FrontierStudy:
    """All numbers of the finished study, from the run directories alone."""
    seeds = [
        _seed_result(config, seed, [r for r in runs if r.seed == seed]) for seed in config.seeds
    ]
    return FrontierStudy(
        folder=Path(config.out),
        seeds=seeds,
        models=MODELS,
        num_questions=len(read_questions(seed_folder(config, config.seeds[0]))),
        config=config.model_dump(mode="json"),
    )


def read_questions(folder: SeedFolder) -> list[str]:
    """The held-out questions."""
    questions: list[str] = json.loads((folder.samples / "questions.json").read_text("utf-8"))
    return questions


def _seed_result(config: FrontierConfig, seed: int, runs: Sequence[FrontierRun]) -> SeedResult:
    folder = seed_folder(config, seed)
    tables = load_file(folder.samples / SAMPLES)
    rewards, scores = tables["rewards"], tables["scores"]
    num_pairs = _num_pairs(folder)
    reward_model = _reward_model_cost(config, seed)
    return SeedResult(
        seed=seed,
        reference_reward=rewards.mean().item(),
        curve=optimum_curve(world_of_samples(rewards)),
        curve_stderr=curve_stderr(rewards, FIXED_KLS),
        best_of={
            BEST_OF_TRUE: best_of_n(rewards, config.best_of),
            BEST_OF_RM: best_of_n(rewards, config.best_of, scores=scores),
        },
        reward_model=_reward_model_fit(config, folder, rewards, scores),
        runs=[run_result(run, num_pairs, reward_model) for run in runs if not run.without],
        shift=[
            found for run in runs if run.without for found in _shift_results(config, run, rewards)
        ],
    )


# -- runs ----------------------------------------------------------------------------------------


def run_result(run: FrontierRun, num_pairs: int, reward_model: Cost) -> RunResult:
    """What a run measured on its way, and what it took; `reward_model` is the cost of the one that
    some methods need.
    """
    folder, kind = Path(run.config.out), METHOD_KINDS[run.method]
    trail = [
        Measurement(
            step=int(row["step"]),
            kl=float(row["eval/kl"]),
            kl_stderr=float(row["eval/kl_stderr"]),
            reward=float(row["eval/reward"]),
            reward_stderr=float(row["eval/reward_stderr"]),
        )
        for row in read_metrics(folder)
        if "eval/reward" in row and "eval/kl" in row and row["step"] > 0
    ]
    file = folder / DIVERGED
    diverged = json.loads(file.read_text("utf-8"))["sentence"] if file.is_file() else ""
    cost = None if diverged else _cost(run, num_pairs, reward_model)
    return RunResult(run.seed, kind.title, run.strength, trail, cost, diverged)


def _cost(run: FrontierRun, num_pairs: int, reward_model: Cost) -> Cost:
    """Of one run, and of the reward model that it needs."""
    own = own_cost(run.config, num_pairs)
    if METHOD_KINDS[run.method].by_reward_model:
        return with_reward_model(own, reward_model)
    return own


def with_reward_model(own: Cost, reward_model: Cost) -> Cost:
    """The cost of a run together with that of its reward model."""
    return Cost(
        seconds=own.seconds,
        reward_model_seconds=reward_model.seconds,
        peak_memory_bytes=max(own.peak_memory_bytes, reward_model.peak_memory_bytes),
        steps=own.steps,
        responses=own.responses,
        reward_model_responses=reward_model.responses,
        keys=own.keys + reward_model.keys,
    )


def own_cost(config: RunConfig, num_pairs: int) -> Cost:
    """What a finished run took by itself."""
    folder = Path(config.out)
    manifest = read_manifest(folder)
    peaks = [int(row.get("peak_memory_bytes", 0)) for row in read_metrics(folder)]
    return Cost(
        seconds=float(manifest["seconds_training"]),
        reward_model_seconds=0.0,
        peak_memory_bytes=max(peaks),
        steps=int(manifest["steps"]),
        responses=responses_drawn(config, num_pairs),
        reward_model_responses=0,
        keys=len(named_keys(config)),
    )


def responses_drawn(config: RunConfig, num_pairs: int) -> int:
    """Answers that somebody samples for a run: two for each pair, or those of all its rounds."""
    if isinstance(config, PPOConfig):
        return config.rounds * config.responses_per_round
    if isinstance(config, OnlineConfig):
        assert config.prompts_per_round is not None
        return config.rounds * config.prompts_per_round * config.samples_per_prompt
    return 2 * num_pairs


SHARED_KEYS = ("model", "data", "out", "seed", "evaluation", "save_every")


def named_keys(config: RunConfig) -> list[str]:
    """The dotted keys that a configuration sets, but for those of every run."""
    values = config.model_dump(mode="json", exclude_unset=True, exclude={*SHARED_KEYS})
    return sorted(key for key, _ in flat(values))


def _num_pairs(folder: SeedFolder) -> int:
    """Training pairs."""
    return len(load_preferences(_data(folder.pairs())).train)


def _data(pairs: Path) -> DataConfig:
    return validate(DataConfig, data_settings(str(pairs)))


# -- the reward model ----------------------------------------------------------------------------


def _reward_model_cost(config: FrontierConfig, seed: int) -> Cost:
    model = reward_model_config(config, seed, without=False)
    return own_cost(model, _num_pairs(seed_folder(config, seed)))


def _reward_model_fit(
    config: FrontierConfig, folder: SeedFolder, rewards: Tensor, scores: Tensor
) -> RewardModelFit:
    metrics = [row for row in read_metrics(folder.reward_model()) if "eval/loss" in row][-1]
    held_out = load_preferences(_data(folder.pairs())).test
    return RewardModelFit(
        accuracy=float(metrics["eval/rewards/accuracy"]),
        label_accuracy=label_accuracy(World(config.num_facts), held_out),
        correlation=within_prompt_correlation(rewards, scores),
    )


# -- distribution shift --------------------------------------------------------------------------

SHIFT = "shift.json"


def measure_shift(config: FrontierConfig, run: FrontierRun) -> None:
    """Reward and KL of a run without a kind, and of its twin that has it, on held-out questions of
    that kind and of the others: into a file in the run's folder, for which models it says.
    """
    folder = seed_folder(config, run.seed)
    without, twin = (folder.run(run.method, run.strength, without=w) for w in (True, False))
    if any((one / DIVERGED).is_file() for one in (without, twin)):
        return
    encoder, reference = open_model(folder.sft)
    models = {True: open_model(without)[1], False: open_model(twin)[1]}
    about = {
        "models": [weights_digest(models[True]), weights_digest(models[False])],
        "samples_per_question": config.samples_per_question,
    }
    file = without / SHIFT
    if file.is_file() and json.loads(file.read_text("utf-8"))["about"] == about:
        return
    questions = read_questions(folder)
    found = []
    for on_kind in (True, False):
        own = [q for q in questions if (kind_of(q) == left_out(run.seed)) == on_kind]
        measure = OnPolicyEvaluation(
            prompts=own,
            ids=[encoder.prompt_ids(question) for question in own],
            encoder=encoder,
            reference=reference,
            reward=open_reward(RewardSourceConfig(function="synthetic")),
            samples_per_prompt=config.samples_per_question * (4 if on_kind else 1),
            max_new_tokens=MAX_NEW_TOKENS,
            max_tokens=16_384,
            precision="fp32",
            seed=run.seed,
        )
        for has_left_out, model in models.items():
            with torch.no_grad():
                numbers = measure(model)
            found.append({"without": has_left_out, "on_kind": on_kind, **numbers})
    write_json(file, {"about": about, "measured": found})


def _shift_results(config: FrontierConfig, run: FrontierRun, rewards: Tensor) -> list[ShiftResult]:
    """What was measured, with the share of the optimum's gain on the same questions."""
    folder = seed_folder(config, run.seed)
    file = Path(run.config.out) / SHIFT
    if not file.is_file():
        return []
    of_kind = torch.tensor([kind_of(q) == left_out(run.seed) for q in read_questions(folder)])
    curves = {on: optimum_curve(world_of_samples(rewards[of_kind == on])) for on in (True, False)}
    return [
        ShiftResult(
            seed=run.seed,
            kind=left_out(run.seed),
            method=METHOD_KINDS[run.method].title,
            strength=run.strength,
            without=row["without"],
            on_kind=row["on_kind"],
            kl=row["eval/kl"],
            reward=row["eval/reward"],
            efficiency=efficiency(
                Point(row["eval/kl"], row["eval/reward"]), curves[row["on_kind"]]
            ),
        )
        for row in json.loads(file.read_text("utf-8"))["measured"]
    ]
