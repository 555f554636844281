"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dpo.errors import DPOError
from dpo.train import checkpoint
from dpo.train.checkpoint import Snapshot, Written
from dpo.train.run import Run

log = logging.getLogger("dpo")


@dataclass
class _Save:
    """A save on its way to the disk."""

    step: int
    copy_seconds: float
    written: Future[Written]


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time.

    Training waits for the copy of what is saved, and for the save before where that is still being
    written; so the thread sees nothing that changes, and at most one copy is in memory. A failure
    in the thread (a full disk) is raised where training next asks: before the next step.

    Leaving the context waits for the disk, whatever the reason for leaving.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None

    def start(self, taken: Snapshot, *, copy_seconds: float) -> None:
        """Begin to write a checkpoint; the one before must be finished.

        Args:
            copy_seconds: how long training has waited for the copy, for the record.
        """
        assert self._save is None
        written = self._thread.submit(self._write, taken)
        self._save = _Save(int(taken.state["step"]), copy_seconds, written)

    def _write(self, taken: Snapshot) -> Written:
        """In the thread. The metrics that lead to a checkpoint are on the disk before it is."""
        self._run.sync_metrics()
        return checkpoint.write(self._run.checkpoints, taken, self._run.origin)

    def write_shards(
        self,
        policy: nn.Module,
        optimizer: Optimizer,
        state: dict[str, Any],
        *,
        companion: nn.Module | None,
    ) -> None:
        """Write a checkpoint of a sharded policy now: all ranks write together, none in a thread.

        Raises:
            StorageError: it could not be written; older checkpoints are as they were.
        """
        if self._run.writes:
            self._run.sync_metrics()
        written = checkpoint.write_shards(
            self._run.checkpoints,
            policy,
            optimizer,
            state,
            self._run.origin,
            companion=companion,
        )
        if written is not None:
            self._log(int(state["step"]), written, blocked=written.seconds)

    def poll(self) -> None:
        """Log the save, if it has ended, or raise what it failed with; never waits."""
        if self._save is not None and self._save.written.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the save is on the disk, and log it.

        Raises:
            StorageError: it could not be written; older checkpoints are as they were.
        """
        if self._save is None:
            return
        save, self._save = self._save, None
        started = time.perf_counter()
        written = save.written.result()
        blocked = save.copy_seconds + time.perf_counter() - started
        self._log(save.step, written, blocked=blocked)

    def _log(self, step: int, written: Written, *, blocked: float) -> None:
        self._run.log(
            {
                "step": step,
                "save/seconds": round(written.seconds, 4),
                "save/bytes": written.num_bytes,
                "save/blocked_seconds": round(blocked, 4),
            }
        )

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        except DPOError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the first failure is the one that is raised
        finally:
            self._thread.shutdown()
