"""`dpo experiment exact`: DPO, PPO and their rivals where the optimum is known.

All methods start from one reference a seed, in the world of `exact_world`, and every policy on the
way is measured exactly. A finished half of a seed is a file, and is not repeated.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from dpo.atomic import write_json
from dpo.experiment.exact_config import ExactStudyConfig
from dpo.experiment.exact_costs import costs
from dpo.experiment.exact_trials import PARTS, Part, run_part
from dpo.progress import counting
from dpo.report.exact_page import write_exact_study
from dpo.report.exact_study import ExactStudy, SeedResult, merged, read_seed, write_seed
from dpo.train.run import environment, open_run

log = logging.getLogger("dpo")


def run_exact(config: ExactStudyConfig) -> ExactStudy:
    """Run what is not finished, then write table, figures and page.

    Raises:
        InputError: `out` holds a study with other settings, or something else. More seeds, or other
            processes, are no other settings.
    """
    settings = config.model_dump(mode="json")
    decisive = {k: v for k, v in settings.items() if k not in ("out", "seeds", "processes")}
    run = open_run(Path(config.out), {"command": "experiment exact", **decisive})
    try:
        study = ExactStudy(run.folder, run_parts(config), costs(config), settings)
        write_json(run.folder / "study.json", {"config": settings, "environment": environment()})
        write_exact_study(study)
        run.update_manifest(status="finished")
    finally:
        run.close()
    return study


def run_parts(config: ExactStudyConfig) -> list[SeedResult]:
    """All seeds; parts of them whose file is there are read, the others are run."""
    parts = [(seed, part) for seed in config.seeds for part in PARTS]
    missing = [(seed, part) for seed, part in parts if not part_file(config, seed, part).is_file()]
    workers = min(config.processes, len(missing))
    if workers <= 1:
        for seed, part in missing:
            _finish(config, seed, part)
    else:
        # "spawn": a forked child would wait for threads that it does not have.
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(workers, context, _begin_worker, (log.level,)) as pool,
            counting("Half seeds", len(missing)) as advance,
        ):
            jobs = [pool.submit(_finish, config, seed, part) for seed, part in missing]
            for job in as_completed(jobs):
                job.result()
                advance(1)
    return [
        merged([read_seed(part_file(config, seed, part)) for part in PARTS])
        for seed in config.seeds
    ]


def part_file(config: ExactStudyConfig, seed: int, part: Part) -> Path:
    """Where the numbers of a finished half of a seed are."""
    return Path(config.out) / f"seed-{seed}-{part}.json"


def _begin_worker(level: int) -> None:
    log.addHandler(logging.StreamHandler())
    log.setLevel(level)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose study was killed must not go on: the next one starts the same half again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _finish(config: ExactStudyConfig, seed: int, part: Part) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same numbers, and times that can be compared, on any machine
    try:
        write_seed(run_part(config, seed, part), part_file(config, seed, part))
    finally:
        torch.set_num_threads(threads)
