"""Runs of seconds: a fresh GPT-2 of one layer on the embedded data, trained once a session."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

from dpo.cli import main
from dpo.config import PreferenceConfig, SFTConfig
from dpo.config_files import validate
from dpo.evaluation_config import EvaluateConfig
from dpo.train.run import read_metrics

FRESH = {"width": 16, "layers": 1, "heads": 2, "positions": 128, "vocab_size": 300}
DATA = {"test_fraction": 0.25, "synthetic": {"num_rows": 96}}
EVALUATION = {"every": 3, "max_rows": 16, "num_samples": 2, "max_new_tokens": 8}
COMMON = {
    "data": DATA,
    "max_steps": 6,
    "save_every": 2,
    "batch": {"size": 8},
    "evaluation": EVALUATION,
}
CANARY = "canary-in-the-environment"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN")
"""Variables that hold the canary while a command runs; no command may print it."""
SAVE = {"save/seconds", "save/bytes", "save/blocked_seconds"}
TIMINGS = SAVE | {
    *("seconds", "tokens_per_second", "rows_per_second", "peak_memory_bytes", "eval/seconds")
}
"""Metrics that differ between two equal runs."""


@dataclass(frozen=True)
class Said:
    """What a command printed, white space joined (a terminal's width breaks lines anywhere)."""

    code: int
    out: str
    err: str
    out_lines: list[str]
    err_lines: list[str]
    """As they were printed."""

    @property
    def all(self) -> str:
        return f"{self.out} {self.err}"

    @property
    def raw(self) -> str:
        return "\n".join([*self.out_lines, *self.err_lines])


def dpo(*words: object) -> Said:
    """`dpo WORDS` in this process; the state that the command line sets up is put back."""
    log = logging.getLogger("dpo")
    before = log.handlers, log.level, log.propagate
    out, err = io.StringIO(), io.StringIO()
    argv = ["dpo", *map(str, words)]
    environment = {"COLUMNS": "200", **dict.fromkeys(SECRETS, CANARY)}
    code: object = 0
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.dict(os.environ, environment),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as leaving:
        code = leaving.code
    finally:
        log.handlers, log.level, log.propagate = before
    texts = [stream.getvalue() for stream in (out, err)]
    assert not any(CANARY in text for text in texts)
    joined, lines = [" ".join(t.split()) for t in texts], [t.splitlines() for t in texts]
    return Said(int(code or 0), *joined, *lines)


def merged(values: dict, changes: dict) -> dict:
    """Nested values with dotted changes on top."""
    result = json.loads(json.dumps(values))
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return result


def sft_config(out: Path, changes: dict | None = None) -> SFTConfig:
    start = {"model": {"fresh": FRESH}, "out": str(out), "optimizer": {"learning_rate": 0.01}}
    return validate(SFTConfig, merged(COMMON | start, changes or {}))


def dpo_config(out: Path, changes: dict | None = None) -> PreferenceConfig:
    start = {
        "model": {"path": str(sft_run())},
        "out": str(out),
        "optimizer": {"learning_rate": 0.003},
        "evaluation": EVALUATION | {"kl_prompts": 3},
    }
    return validate(PreferenceConfig, merged(COMMON | start, changes or {}))


def evaluate_config(out: Path, changes: dict | None = None) -> EvaluateConfig:
    start = {
        "models": {"sft": str(sft_run()), "dpo": str(dpo_run())},
        "data": DATA,
        "out": str(out),
        "temperatures": [0.5, 1.0],
        "max_prompts": 12,
        "max_new_tokens": 8,
        "sentence_model": "offline",
    }
    return validate(EvaluateConfig, merged(start, changes or {}))


def words_of(config: SFTConfig | PreferenceConfig | EvaluateConfig) -> list[str]:
    """The configuration as `key=value` words, as a user would give them."""
    given = config.model_dump(mode="json", exclude_unset=True)
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


@cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dpo-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def sft_run() -> Path:
    """A finished run of `dpo sft`; nobody writes to it."""
    folder = scratch() / "sft"
    said = dpo("sft", *words_of(sft_config(folder)))
    assert said.code == 0, said.all
    return folder


@cache
def dpo_run() -> Path:
    """A finished run of `dpo train` from `sft_run()`; nobody writes to it."""
    folder = scratch() / "dpo"
    said = dpo("train", *words_of(dpo_config(folder)))
    assert said.code == 0, said.all
    return folder


@cache
def evaluation() -> Path:
    """A finished `dpo evaluate` of both."""
    folder = scratch() / "evaluation"
    said = dpo("evaluate", *words_of(evaluate_config(folder)))
    assert said.code == 0, said.all
    return folder


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def metrics_of(folder: Path) -> list[dict]:
    """What was logged, without timings. A save's line holds nothing else, and where it stands
    depends on when the disk was ready.
    """
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(folder)]
    return [row for row in rows if row.keys() != {"step"}]


def outcome(folder: Path) -> dict[str, object]:
    """All that a finished run computed: equal outcomes are equal bit for bit."""
    newest = max((folder / "checkpoints").glob("step-*"))
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    del state["seconds"]
    files = [
        *newest.glob("*.safetensors"),
        *folder.glob("best/*model.safetensors"),  # adapter_model.safetensors too
        *folder.glob("model/*model.safetensors"),
        *folder.glob("samples/*.jsonl"),
        *folder.glob("held_out.csv"),
    ]
    found = {str(file.relative_to(folder)): _content(file) for file in sorted(files)}
    return {**found, "state": state, "metrics": metrics_of(folder)}


def _content(file: Path) -> str:
    """A digest of what a file holds. Those of a checkpoint in parts have a header whose order is
    random, so it is that of their tensors.
    """
    if not file.name.startswith("shard-"):
        return sha256(file)
    tensors = sorted(load_file(file).items())
    digest = hashlib.sha256()
    for name, values in tensors:
        digest.update(f"{name} {tuple(values.shape)} {values.dtype};".encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def forked(work: Callable[[], object]) -> int:
    """Do it in a process of its own; its exit code, or minus the signal that ended it."""
    _, status = os.waitpid(fork(work), 0)
    return os.waitstatus_to_exitcode(status)


def fork(work: Callable[[], object]) -> int:
    """Begin it in a process of its own, which has this number and must be waited for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads exist
        child = os.fork()
    if child == 0:
        code = 0
        signal.alarm(300)  # a child that hangs fails its test, not the suite
        try:
            work()
        except BaseException as error:
            code = getattr(error, "exit_code", 99)
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def kill_at(name: str, *, occurrence: int = 1, after: bool = False) -> None:
    """SIGKILL this process before (or after) a file of that name gets it: "" is any name."""
    seen = 0

    def deadly(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def call(source: Path, target: Path) -> None:
            nonlocal seen
            seen += name in ("", Path(target).name)
            here = seen == occurrence and name in ("", Path(target).name)
            if here and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    os.rename, os.replace = deadly(os.rename), deadly(os.replace)
