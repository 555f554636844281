"""`dpo experiment run`: SFT, then DPO over a grid and its rivals, over seeds, evaluated together.

Every run starts from the same SFT model of its seed, with that model as the reference, so runs of
DPO differ in nothing but the settings of the grid, and rivals in nothing but the method. Runs that
are finished are not repeated.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dpo.atomic import write_json
from dpo.config import PreferenceConfig, RewardConfig, RewardSourceConfig, RunConfig, SFTConfig
from dpo.core.best_of_n import best_of_n_kl_bound
from dpo.data.rows import PreferenceRow
from dpo.evaluate.best_of_n import best_of_each
from dpo.evaluate.jobs import Evaluation, generate_with, judge, open_evaluation
from dpo.evaluate.records import Generation
from dpo.evaluation_config import EvaluateConfig
from dpo.experiment.engines import in_processes, on_ray, open_ray
from dpo.experiment.frontier_results import MODELS, own_cost, with_reward_model
from dpo.experiment.study_config import Cell, Plan, best_of_label
from dpo.experiment.study_config import StudyConfig as StudyConfig  # "as": for others to import
from dpo.experiment.study_config import plan as plan
from dpo.loss_config import takes_reference
from dpo.online_config import PPOConfig
from dpo.progress import counting
from dpo.report.diagnostics_figures import leave_diagnosis
from dpo.report.exact_study import BEST_OF_RM, DPO, PPO_RM
from dpo.report.frontier_study import Cost
from dpo.report.study import write_study
from dpo.report.study_results import BestOf, CellResult, Study
from dpo.train.jobs import train_preference, train_sft
from dpo.train.ppo import train_ppo
from dpo.train.prepare import SplitData
from dpo.train.reward import train_reward
from dpo.train.reward_source import open_reward
from dpo.train.run import environment, read_metrics
from dpo.train.stopping import stop_here

log = logging.getLogger("dpo")

JOBS: dict[type[RunConfig], Callable[..., Path]] = {
    SFTConfig: train_sft,
    RewardConfig: train_reward,
    PreferenceConfig: train_preference,
    PPOConfig: train_ppo,
}


def run_study(
    config: StudyConfig, *, trust_remote_code: bool = False, use_ray: bool = False
) -> Study:
    """Run what is not finished, evaluate all together, write table, figures, samples and
    diagnostics.

    Args:
        use_ray: train on a Ray cluster; all else is done here.

    Raises:
        InputError: a configuration is wrong (before anything runs), or data or model cannot be had.
    """
    todo = plan(config)
    train_all(config, todo, trust_remote_code, use_ray=use_ray)
    evaluation = evaluate_together(todo, trust_remote_code=trust_remote_code)
    study = collect(config, todo, evaluation)
    write_json(
        study.folder / "study.json",
        {
            "config": config.model_dump(mode="json"),
            "environment": environment(),
            "runs": [asdict(result) for result in study.results],
            "reward_models": [asdict(result) for result in study.reward_models],
            "best_of": None if study.best_of is None else asdict(study.best_of),
            "evaluation": study.judged,
        },
    )
    write_study(study)
    for cell in (*todo.dpo, *todo.rivals):
        leave_diagnosis(Path(cell.config.out))
    leave_diagnosis(evaluation.folder)
    return study


# -- training ------------------------------------------------------------------------------------


def train_all(
    config: StudyConfig, todo: Plan, trust_remote_code: bool, *, use_ray: bool = False
) -> None:
    """Every run of the study, what another one starts from before it."""
    stages = [[(cell.config, trust_remote_code) for cell in stage] for stage in todo.stages]
    if use_ray:
        with open_ray(config.processes) as ray, stop_here():
            for tasks in stages:
                on_ray(ray, train, tasks, "Training")
        return
    if config.processes is not None:
        with stop_here():
            for tasks in stages:
                in_processes(config.processes, train, tasks, "Training")
        return
    cells = [cell for stage in todo.stages for cell in stage]
    for number, cell in enumerate(cells, 1):
        log.info("Run %d of %d: %s, seed %d.", number, len(cells), cell.label, cell.seed)
        train(cell.config, trust_remote_code)


def train(config: RunConfig, trust_remote_code: bool) -> None:
    """One run, by its command."""
    JOBS[type(config)](config, trust_remote_code=trust_remote_code)


# -- evaluation ----------------------------------------------------------------------------------


def evaluate_together(todo: Plan, *, trust_remote_code: bool) -> Evaluation:
    """Every run's responses to the same held-out prompts; the seeds of a cell count as its samples.

    A prompt's responses from several seeds stay together in the intervals, whose unit is the
    prompt. Killed at any moment, the same call goes on with what was generated and embedded.
    """
    config = todo.evaluation
    seeds = sorted({seed for _, seed in todo.labels.values()})
    records: list[Generation] = []

    def add(made: list[Generation], label: str, seed: int) -> None:
        first = seeds.index(seed) * config.samples_per_prompt
        records.extend(replace(r, model=label, sample=first + r.sample) for r in made)

    with open_evaluation(config, trust_remote_code=trust_remote_code) as opened:
        drawn = len(config.models) + (todo.best_of or 0) * len(todo.reward_models)
        total = len(opened.rows) * config.samples_per_prompt * len(config.temperatures) * drawn
        with counting("Generating", total) as advance:
            for name, path in config.models.items():
                made = generate_with(
                    name,
                    path,
                    opened.data,
                    opened.rows,
                    config,
                    advance,
                    trust_remote_code=trust_remote_code,
                )
                add(made, *todo.labels[name])
            if todo.best_of is not None:
                for sft, model in zip(todo.sft, todo.reward_models, strict=True):
                    made = best_of_samples(
                        todo.best_of,
                        sft,
                        model,
                        opened.data,
                        opened.rows,
                        config,
                        advance,
                        trust_remote_code=trust_remote_code,
                    )
                    add(made, best_of_label(todo.best_of), sft.seed)
        return judge(records, opened, config)


def best_of_samples(
    n: int,
    sft: Cell,
    reward_model: Cell,
    data: SplitData[PreferenceRow],
    rows: Sequence[PreferenceRow],
    config: EvaluateConfig,
    progress: Callable[[int], None],
    *,
    trust_remote_code: bool,
) -> list[Generation]:
    """Of every n samples of a seed's SFT model, the one that its reward model scores highest."""
    several = config.model_copy(update={"samples_per_prompt": n * config.samples_per_prompt})
    drawn = generate_with(
        f"best of {n} seed {sft.seed}",
        sft.config.out,
        data,
        rows,
        several,
        progress,
        trust_remote_code=trust_remote_code,
    )
    reward = open_reward(
        RewardSourceConfig(model=reward_model.config.out),
        precision=config.precision,
        trust_remote_code=trust_remote_code,
    )
    return best_of_each(drawn, rows, reward, n=n)


# -- what was measured ---------------------------------------------------------------------------


def collect(config: StudyConfig, todo: Plan, evaluation: Evaluation) -> Study:
    """All numbers of the finished study, from the run directories and the evaluation."""
    costs = {cell.seed: own_cost(cell.config, num_pairs=0) for cell in todo.reward_models}
    best_of = None
    if todo.best_of is not None:
        alone = Cost(0.0, 0.0, 0, 0, 0, 0, keys=1)
        best_of = BestOf(
            label=best_of_label(todo.best_of),
            n=todo.best_of,
            kl_bound=best_of_n_kl_bound(todo.best_of),
            models=MODELS[BEST_OF_RM],
            costs=[with_reward_model(alone, cost) for cost in costs.values()],
        )
    judged = json.loads((evaluation.folder / "win_rates.json").read_text(encoding="utf-8"))
    return Study(
        folder=Path(config.out),
        results=[_result(cell, costs.get(cell.seed)) for cell in todo.policies],
        evaluation=evaluation,
        reward_models=[_result(cell, None) for cell in todo.reward_models],
        best_of=best_of,
        judged=judged,
        memory_is_known=config.processes is not None,
    )


def _result(cell: Cell, reward_model: Cost | None) -> CellResult:
    """What a finished run measured on held-out rows, and what it took."""
    folder = Path(cell.config.out)
    held_out = [row for row in read_metrics(folder) if "eval/loss" in row]

    def along(key: str, *, applies: bool = True) -> list[float]:
        return [float(row.get(key, "nan")) if applies else math.nan for row in held_out]

    cost = own_cost(cell.config, num_pairs=0)  # the pairs are given; nobody draws them
    if cell.by_reward_model:
        assert reward_model is not None
        cost = with_reward_model(cost, reward_model)
    is_reward = cell.label.startswith(DPO) or isinstance(cell.config, RewardConfig)
    return CellResult(
        label=cell.label,
        seed=cell.seed,
        folder=folder.name,
        epochs=along("epoch"),
        # PPO's is coefficient KL - reward, of another kind than all others.
        loss=along("eval/loss", applies=not isinstance(cell.config, PPOConfig)),
        accuracy=along("eval/rewards/accuracy", applies=is_reward),
        chosen_change=along("eval/logps/chosen_change"),
        kl=along("eval/kl"),
        kl_stderr=along("eval/kl_stderr"),
        models=models_held(cell.config),
        cost=cost,
    )


def models_held(config: RunConfig) -> list[str]:
    """What a run needs in memory; KL is measured against the reference in every run, besides."""
    if isinstance(config, PPOConfig):
        found = MODELS[PPO_RM]
        return [name for name in found if name != "critic" or config.critic != "shared"]
    if isinstance(config, RewardConfig):
        return ["reward model"]
    if isinstance(config, PreferenceConfig) and takes_reference(config.loss):
        return MODELS[DPO]
    return ["policy"]
