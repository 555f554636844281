"""Taking turns: training loops that are not ours, run one step at a time."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

_M_ARENA_MAX = -8  # malloc.h of the GNU C library

Pause = Callable[[float], None]
"""A loop calls it at the end of each step with the step's result, and waits in it for its turn."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one contestant."""

    seconds: float
    """From the moment it got its turn to the end of the step, all that the loop does included."""
    cpu_seconds: float
    """Processor time within it, of all threads: less than `seconds` where the machine was busy."""
    result: float
    """Of training, the loss; of generation, the tokens that were generated."""


class Stepwise:
    """A loop in a thread of its own that moves only when it is told to.

    A trainer's `train()` cannot be asked for one step. So each contestant runs in a thread and
    hands a baton back at the end of every step: only one of them ever runs. The clock is read by
    the loop's own thread, when the baton comes and when it goes, so handing over costs nothing.
    """

    def __init__(self, loop: Callable[[Pause], None], *, threads: int) -> None:
        self._loop = loop
        self._num_threads = threads
        self._turn = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._step: Step | None = None
        self._error: BaseException | None = None
        self._started = 0.0
        self._cpu_started = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> Step:
        """Let the loop make one step.

        Raises:
            RuntimeError: the loop ended, or failed.
        """
        self._step = None
        self._turn.release()
        self._done.acquire()
        if self._step is None:
            raise RuntimeError("The loop ended before this step.") from self._error
        return self._step

    def finish(self) -> None:
        """Let the loop run to its end."""
        self._turn.release()
        self._thread.join()
        if self._error is not None:
            raise RuntimeError("The loop failed after its last step.") from self._error

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # OpenMP counts the threads of each thread
        self._wait()
        try:
            self._loop(self._pause)
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()

    def _pause(self, result: float) -> None:
        seconds = time.perf_counter() - self._started
        self._step = Step(seconds, time.process_time() - self._cpu_started, result)
        self._done.release()
        self._wait()

    def _wait(self) -> None:
        self._turn.acquire()
        self._cpu_started = time.process_time()
        self._started = time.perf_counter()


def use_one_arena() -> None:
    """Threads shall allocate as the main thread does, where the C library is GNU's.

    By default each thread gets a heap of its own that gives memory back to the system sooner,
    which costs those who allocate much. To be called before there is a thread.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def interleave(
    contestants: Mapping[str, Stepwise],
    num_steps: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[Step]]:
    """Step i of every contestant before step i + 1 of any; who begins rotates."""
    names = list(contestants)
    steps: dict[str, list[Step]] = {name: [] for name in names}
    for number in range(num_steps):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            steps[name].append(contestants[name].step())
            progress(1)
    for contestant in contestants.values():
        contestant.finish()
    return steps
