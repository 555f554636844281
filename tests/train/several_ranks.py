"""Several real processes that train one model together, over gloo."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dpo.config import PreferenceConfig, RunConfig, SFTConfig
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train import ranks
from dpo.train.jobs import train_preference, train_sft
from dpo.train.online import train_online
from dpo.train.ppo import train_ppo
from dpo.train.run import Run
from train.small_runs import fork, metrics_of


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(size: int, work: Callable[[int], object], *, said: Path | None = None) -> list[int]:
    """Begin `work(rank)` in `size` processes that find one another as a launcher's do; their
    process numbers. What they print goes to `said/rank-N.txt`.
    """
    port = free_port()

    def as_rank(rank: int) -> None:
        os.environ |= {
            "WORLD_SIZE": str(size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if said is not None:
            os.dup2(os.open(said / f"rank-{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 -- until the process ends
        work(rank)

    return [fork(lambda rank=rank: as_rank(rank)) for rank in range(size)]


def wait(processes: list[int], *, seconds: float) -> list[int | None]:
    """Their exit codes, or minus signals; None for one that does not end in time."""
    codes: list[int | None] = [None] * len(processes)
    end = time.monotonic() + seconds
    while None in codes and time.monotonic() < end:
        for i, process in enumerate(processes):
            if codes[i] is None:
                found, status = os.waitpid(process, os.WNOHANG)
                codes[i] = os.waitstatus_to_exitcode(status) if found else None
        time.sleep(0.02)
    return codes


def on_ranks(size: int, work: Callable[[int], object], **options: Path) -> list[int | None]:
    """Do `work(rank)` in `size` processes; their exit codes.

    Each joins a group once at most: the second time it may find the first group's store, as long as
    another process still holds it.
    """
    return wait(start(size, work, **options), seconds=290)  # before small_runs.fork ends them


JOBS: dict[type[RunConfig], Callable[..., Path]] = {
    SFTConfig: train_sft,
    PreferenceConfig: train_preference,
    OnlineConfig: train_online,
    PPOConfig: train_ppo,
}


def train(config: RunConfig) -> None:
    """The run of this configuration, as one of the ranks or alone."""
    with ranks.joined(config.distributed):
        JOBS[type(config)](config)


def signal_at(step: int, number: int) -> None:
    """From now on, this process gets the signal when that step is logged, or would be."""
    log = Run.log

    def logged(run: Run, row: Mapping[str, Any]) -> None:
        log(run, row)
        if row["step"] == step and "loss" in row:
            os.kill(os.getpid(), number)

    Run.log = logged  # type: ignore[method-assign]


def numbers_of(folder: Path) -> list[dict]:
    """Metrics but for memory and for what counts passes, which ranks make fewer of."""
    rows = metrics_of(folder)
    return [
        {k: v for k, v in row.items() if k not in ("num_passes", "gradient_norm")} for row in rows
    ]


def check_equal(found: Path, expected: Path) -> None:
    """Two runs log the same, but for rounding."""
    for ours, theirs in zip(numbers_of(found), numbers_of(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        for loss in theirs.keys() & {"loss", "eval/loss"}:
            assert ours[loss] == pytest.approx(theirs[loss], abs=1e-6)
