"""Where the runs of a study are made: in processes of this machine, or as tasks of a Ray cluster.

Either way a run has a process and a directory of its own, which is locked, checkpointed and passed
over when finished; so a run may be begun again anywhere at any time.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from dpo.errors import InputError, RankLost, Stopped
from dpo.progress import counting

log = logging.getLogger("dpo")

RETRIES = 3
"""How often a task is begun again whose worker was lost: more often it is no accident."""
OBJECT_STORE = 100 * 2**20
"""Bytes, near Ray's minimum: what our tasks make is in their directories."""

# -- processes of this machine -------------------------------------------------------------------


def in_processes(
    processes: int,
    function: Callable[..., None],
    tasks: Sequence[tuple[Any, ...]],
    what: str,
) -> None:
    """Call a function for each tuple of arguments, each in a process of its own, so many at a time.

    The processes are forked from one that has the libraries and nothing else: they start at once,
    and their memory is their own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    workers = min(processes, len(tasks))
    if not tasks:
        return
    with (
        context.Pool(workers, _begin_worker, (log.level,), maxtasksperchild=1) as pool,
        counting(what, len(tasks)) as advance,
    ):
        calls = [pool.apply_async(function, task) for task in tasks]
        for number, call in enumerate(calls, 1):
            call.get()
            log.info("%s: %d of %d.", what, number, len(tasks))
            advance(1)


def _begin_worker(level: int) -> None:
    torch.set_num_threads(1)
    log.addHandler(logging.StreamHandler())
    log.setLevel(max(level, logging.WARNING))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


# -- tasks of a Ray cluster ----------------------------------------------------------------------


@contextmanager
def open_ray(processes: int | None) -> Iterator[ModuleType]:
    """The cluster that RAY_ADDRESS names; without it, one on this machine that ends with the block.

    Args:
        processes: tasks at the same time on this machine, None for one a core; a cluster named by
            RAY_ADDRESS has its own number.

    Raises:
        InputError: Ray is not installed, or there is no cluster at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers by default
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise InputError(
            "--engine ray: Ray is not installed; pip install 'direct-preference-optimization[ray]'."
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    here = {
        "address": "local",
        "num_cpus": processes,
        "object_store_memory": OBJECT_STORE,
        "include_dashboard": False,
    }
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts its own in this place
    try:
        ray.init(logging_level=logging.ERROR, **({} if address else here))
    except ConnectionError as error:
        raise InputError(f"RAY_ADDRESS: no Ray cluster answers at {address}.") from error
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield ray
    finally:
        ray.shutdown()


def on_ray(
    ray: ModuleType,
    function: Callable[..., None],
    tasks: Sequence[tuple[Any, ...]],
    what: str,
) -> None:
    """Call a function for each tuple of arguments, each in a process of its own on the cluster.

    A task takes one core and, where the cluster has any, one GPU. One whose worker is lost, or told
    to stop, is begun again, perhaps on another machine.

    Raises:
        RankLost: a task's worker was lost over and over.
        Exception: what the first task to fail raised; the others end with the cluster or our
            connection to it.
    """
    remote = ray.remote(
        max_calls=1,  # a worker a task, whose memory is the task's own
        max_retries=RETRIES,
        retry_exceptions=[Stopped],
        num_cpus=1,
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )(_work)
    level, folder = log.level, os.getcwd()
    waiting = [remote.remote(level, folder, function, arguments) for arguments in tasks]
    with counting(what, len(tasks)) as advance:
        for number in range(1, len(tasks) + 1):
            [done], waiting = ray.wait(waiting)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise RankLost(
                    f"A worker of the Ray cluster was lost {RETRIES + 1} times in the same task; "
                    "the same command goes on from its last checkpoint."
                ) from error
            log.info("%s: %d of %d.", what, number, len(tasks))
            advance(1)


def _work(
    level: int, folder: str, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """One task, in its worker: relative paths mean what they mean where the command was given."""
    _begin_worker(level)
    try:
        os.chdir(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: not there on {platform.node()}; give the command in a folder that all "
            "machines of the Ray cluster share."
        ) from error
    function(*arguments)
