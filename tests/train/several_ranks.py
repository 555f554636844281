"""Several real processes that train one model together, over gloo."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from dpo.config import PreferenceConfig, SFTConfig
from dpo.train import ranks
from dpo.train.jobs import train_preference, train_sft
from train.small_runs import fork


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


def train(config: SFTConfig | PreferenceConfig) -> None:
    """The run of this configuration, as one of the ranks or alone."""
    with ranks.joined(config.distributed):
        job = train_sft if isinstance(config, SFTConfig) else train_preference
        job(config)
