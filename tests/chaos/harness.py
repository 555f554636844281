"""Kill training processes at random moments, resume them, and compare with what nobody disturbed.

The killed processes are forks of a parent that has everything imported, so that a run is a second
and not ten. What a process is doing is written to memory shared with the parent, which reads there
what the kill hit.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.variants import VARIANTS
from dpo.train import checkpoint, jobs, loop, reference
from dpo.train.run import read_manifest
from train.small_runs import kill_at, outcome, sft_run

FORK = multiprocessing.get_context("fork")
PHASES = ("reference", "sampling", "step", "accumulation", "evaluation", "save", "other")
"""What training is doing: `sampling` is choosing a step's rows, which online methods draw from the
policy; `accumulation` is a step of several passes, from the first to the update; `save` is waiting
for a checkpoint or copying one; `other` is opening, logging, the last model, the samples.
"""
PATIENCE_SECONDS = 120.0
"""A run that takes longer hangs."""


@dataclass(frozen=True)
class Moment:
    """When a process is to be killed: some time after its start, or at one of its renames."""

    seconds: float = PATIENCE_SECONDS
    rename: int = 0
    """Counted from 1; 0 is none."""
    after: bool = False
    """Whether the rename is made before the process dies."""

    def __str__(self) -> str:
        if self.rename:
            return f"{'after' if self.after else 'before'} rename {self.rename}"
        return f"after {self.seconds:.4f} s"


NEVER = Moment()


@dataclass(frozen=True)
class Kill:
    """One SIGKILL and what it hit."""

    moment: str
    phase: str
    writing: bool
    """Whether a checkpoint was being written, beside training or while that waited."""


@dataclass
class Trial:
    """One run that was killed again and again until it came to its end."""

    variant: str
    kills: list[Kill] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    """What is not as in the undisturbed run; empty if all is well."""


class Trace:
    """What a process is doing, in memory that its parent reads after its death."""

    def __init__(self) -> None:
        self._shared = FORK.RawArray("i", [PHASES.index("other"), 0, 0])

    @property
    def phase(self) -> str:
        return PHASES[self._shared[0]]

    @property
    def writing(self) -> bool:
        return bool(self._shared[1])

    @property
    def num_renames(self) -> int:
        return int(self._shared[2])

    def install(self) -> None:
        """From now on, this process says what it does."""
        jobs.reference_logps = self._during("reference", jobs.reference_logps)
        loop._evaluate = self._during("evaluation", loop._evaluate)
        loop._save = self._during("save", loop._save)
        loop.training_step = self._during("sampling", loop.training_step)
        loop.split_by_tokens = self._stepping(loop.split_by_tokens)
        checkpoint.write = self._writing(checkpoint.write)
        os.rename, os.replace = self._counting(os.rename), self._counting(os.replace)

    def _during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            before, self._shared[0] = self._shared[0], PHASES.index(phase)
            try:
                return function(*arguments, **options)
            finally:
                self._shared[0] = before

        return call

    def _stepping(self, split: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            """A step knows its rows now; the phase lasts until it returns."""
            passes = split(*arguments, **options)
            self._shared[0] = PHASES.index("accumulation" if len(passes) > 1 else "step")
            return passes

        return call

    def _writing(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._shared[1] = 1
            try:
                return write(*arguments)
            finally:
                self._shared[1] = 0

        return call

    def _counting(self, rename: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._shared[2] += 1
            return rename(*arguments)

        return call


@dataclass
class Undisturbed:
    """A variant's run that nobody killed: what it computed and what it took."""

    outcome: dict[str, Any]
    seconds: float
    num_renames: int


@dataclass
class Chaos:
    """Trials below one folder; those that went well leave nothing there."""

    folder: Path
    seed: int
    _num_runs: int = 0
    _undisturbed: dict[str, Undisturbed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sft_run()  # what the others start from: before any fork, so that children share it

    def undisturbed(self, variant: str) -> Undisturbed:
        """The run to compare with, made twice: to begin with it must be equal to itself."""
        if variant not in self._undisturbed:
            first, second = (self._run_undisturbed(variant) for _ in range(2))
            assert first.outcome == second.outcome, f"{variant} is not deterministic"
            self._undisturbed[variant] = second
        return self._undisturbed[variant]

    def _run_undisturbed(self, variant: str) -> Undisturbed:
        folder, trace = self._new_folder(), Trace()
        started = time.monotonic()
        code = _run(variant, folder, NEVER, trace)
        seconds = time.monotonic() - started
        assert code == 0, f"{variant} ends with {code}; see {folder / 'output.txt'}"
        found = Undisturbed(outcome(folder / "run"), seconds, trace.num_renames)
        shutil.rmtree(folder)
        return found

    def trial(self, variant: str, *, by_time: bool, most_kills: int) -> Trial:
        """Kill a new run, and what goes on with it, at random moments until it ends by itself.

        Moments are drawn uniformly over the undisturbed run's time, or its renames, for each
        process anew; so a run that has little left is likely to come to its end.
        """
        expected, folder, trial = self.undisturbed(variant), self._new_folder(), Trial(variant)
        draws = random.Random(f"{self.seed} {self._num_runs}")
        while True:
            moment, trace = NEVER, Trace()
            if len(trial.kills) < most_kills:
                moment = _draw(draws, expected, by_time=by_time)
            code = _run(variant, folder, moment, trace)
            if code != -signal.SIGKILL or moment is NEVER:
                break
            trial.kills.append(Kill(str(moment), trace.phase, trace.writing))
        if code == 0:
            trial.differences = _differences(folder / "run", expected.outcome)
        else:
            trial.differences = [f"ended with exit code {code}"]
        if not trial.differences:
            shutil.rmtree(folder)
        return trial

    def _new_folder(self) -> Path:
        self._num_runs += 1
        folder = self.folder / f"run-{self._num_runs:04d}"
        folder.mkdir(parents=True)
        return folder


def _draw(draws: random.Random, expected: Undisturbed, *, by_time: bool) -> Moment:
    if by_time:
        return Moment(seconds=draws.uniform(0, expected.seconds))
    return Moment(rename=draws.randint(1, expected.num_renames), after=draws.random() < 0.5)


def _run(variant: str, folder: Path, moment: Moment, trace: Trace) -> int:
    """Run a variant in a process of its own; its exit code, or minus the signal that ended it."""

    def work() -> None:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["DPO_CACHE"] = str(folder / "cache")
        reference.CHUNK, reference.KEEP_SECONDS = 16, 0.0  # some is kept when the kill comes
        trace.install()
        if moment.rename:
            kill_at("", occurrence=moment.rename, after=moment.after)
        VARIANTS[variant](folder / "run")

    process = FORK.Process(target=work, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads exist
        process.start()
    process.join(moment.seconds)
    process.kill()  # of no effect where it has ended
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _differences(folder: Path, expected: dict[str, Any]) -> list[str]:
    """What a finished run has otherwise than the undisturbed one, and what should not be there."""
    found = outcome(folder)
    differing = [key for key in expected | found if expected.get(key) != found.get(key)]
    torn = [str(file.relative_to(folder)) for file in folder.rglob(".*") if file.name != ".lock"]
    finished = read_manifest(folder)["status"] == "finished"
    return [*differing, *torn, *([] if finished else ["not finished"])]
