"""A run directory: what was asked for, what it was made of, what came out, one process at a
time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dpo.atomic import (
    clean_up,
    jsonable,
    lock_folder,
    replace_file,
    storage_errors,
    write_json,
    write_text,
)
from dpo.data.split import Digests
from dpo.errors import InputError
from dpo.train import ranks
from dpo.train.checkpoint import Origin
from dpo.train.trackers import Tracker, open_trackers

LIBRARIES = (
    "direct-preference-optimization",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "peft",
)
TRAIN_PROMPTS = "train_prompts.safetensors"
PACKAGE = Path(__file__).parents[1]

log = logging.getLogger("dpo")


@dataclass
class Run:
    """An open run directory. Metrics go to `metrics.jsonl`, to TensorBoard, and to `trackers`."""

    folder: Path
    lock: TextIOWrapper | None
    """None on a rank that is not the first: it reads, and drops what it is told to write."""
    origin: Origin
    """What its checkpoints are made of."""
    trackers: list[Tracker] = field(default_factory=list)
    _tensorboard: Any = field(default=None)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes here."""
        return self.lock is not None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end; then there is nothing to do."""
        return read_manifest(self.folder).get("status") == "finished"

    def report_to(self, names: Iterable[str], settings: Mapping[str, Any]) -> None:
        """From now on, tell these services the metrics as well; a run that goes on is the same run
        to them.

        Raises:
            InputError: one of them cannot be begun.
        """
        if not self.writes:
            return
        known = read_manifest(self.folder).get("reported_to", {})
        self.trackers = open_trackers(names, self.folder, settings, known)
        ids = {tracker.name: tracker.service.id for tracker in self.trackers}
        if ids.items() - known.items():
            self.update_manifest(reported_to=known | ids)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line of metrics, whole or not at all; numbers go to TensorBoard and the
        trackers as well.
        """
        if not self.writes:
            return
        line = json.dumps(jsonable(dict(row))) + "\n"
        with storage_errors(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as f:
            f.write(line)
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._tensorboard.add_scalar(name, value, int(row["step"]))
        for tracker in self.trackers:
            tracker.log(row)

    def sync_metrics(self) -> None:
        """Make the metrics so far survive a loss of power."""
        with storage_errors(self.metrics_file), self.metrics_file.open("rb") as stream:
            os.fsync(stream.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics so far."""
        return read_metrics(self.folder)

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps after `step`: they are about to be trained again."""
        if not self.writes:
            return
        kept = [row for row in self.metrics() if int(row["step"]) <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_text(self.metrics_file, text)

    def update_manifest(self, **fields: Any) -> None:
        """Set fields of `manifest.json`."""
        if self.writes:
            write_json(self.folder / "manifest.json", read_manifest(self.folder) | fields)

    def close(self) -> None:
        """Flush what is open and give the lock back."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        for tracker in self.trackers:
            tracker.finish()
        if self.lock is not None:
            self.lock.close()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run directory, empty where there is none."""
    return _read_json(folder / "manifest.json") or {}


def read_identity(folder: Path) -> dict[str, Any]:
    """What a run directory is the run of (config.json), empty where it is none."""
    found = _read_json(folder / "config.json") or {}
    return found if "command" in found else {}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run directory; a torn last line, left by a kill, is not one."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def open_run(folder: Path, identity: Mapping[str, Any]) -> Run:
    """Create a run directory, or go on in one that was made by the same configuration. Of several
    ranks the first does, and the others have it open to read.

    Args:
        folder: the run directory.
        identity: everything that decides the result: the resolved configuration, the data's digest,
            the digests of the models.

    Raises:
        InputError: the directory belongs to another run (with the difference, key by key), is in
            use by another process, or holds something that is no run.
        StorageError: it cannot be made.
    """
    if not ranks.is_first():
        return Run(folder, None, _origin(identity))
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    try:
        _claim(folder, identity)
        with storage_errors(folder):
            clean_up(folder)
        run = Run(folder, lock, _origin(identity))
        if not (folder / "manifest.json").exists():
            run.update_manifest(status="started", **environment())
        elif not run.finished:
            _note_changes(run)
    except BaseException:
        lock.close()
        raise
    return run


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write `config.json` into an empty folder, or compare with the one that is there."""
    file = folder / "config.json"
    known = read_identity(folder)
    if not known:  # a model's folder has a config.json as well
        others = foreign_files(folder)
        if others:
            raise InputError(
                f"out: {folder} is not empty and holds no run ({', '.join(others[:3])}); "
                "name a new folder."
            )
        write_json(file, identity)
        return
    difference = list(_differences(known, json.loads(json.dumps(jsonable(dict(identity))))))
    if difference:
        lines = "\n".join(f"  {line}" for line in difference)
        raise InputError(
            f"out: {folder} holds a run with other settings; name a new folder, or set them "
            f"back:\n{lines}"
        )


def foreign_files(folder: Path) -> list[str]:
    """The names in a folder beside what a run leaves that was refused before it began."""
    torn = {*folder.glob(".config.json.*.tmp"), folder / ".lock"}
    return sorted(file.name for file in folder.iterdir() if file not in torn)


def _origin(identity: Mapping[str, Any]) -> Origin:
    """The digests that the run's checkpoints carry."""
    canonical = json.dumps(jsonable(dict(identity)), sort_keys=True)
    resolved = identity.get("resolved", {})
    named = {name: resolved.get(f"{name}_sha256") for name in ("data", "tokenizer")}
    return Origin(
        config=hashlib.sha256(canonical.encode()).hexdigest(),
        parts={name: digest for name, digest in named.items() if digest is not None},
        code=code_digest(),
    )


def _note_changes(run: Run) -> None:
    """Say, and write into the manifest, where a run that goes on computes otherwise than before."""
    manifest, now = read_manifest(run.folder), jsonable(arithmetic())
    before = {name: manifest[name] for name in now if name in manifest}
    differences = list(_differences(before, {name: now[name] for name in before}))
    if differences:
        log.warning(
            "This run was begun elsewhere; it goes on, but need not end bit for bit as it would "
            "have there (%s).",
            "; ".join(differences),
        )
        known = manifest.get("changes", [])
        run.update_manifest(changes=list(dict.fromkeys([*known, *differences])))


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected a JSON file written by dpo; it is damaged.") from error
    return value if isinstance(value, dict) else None


def _differences(old: Any, new: Any, key: str = "") -> Iterable[str]:
    """One line for each dotted key whose value differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else name
            yield from _differences(old.get(name), new.get(name), inner)
    elif old != new:
        yield f"{key}: {_short(old)} there, {_short(new)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def environment() -> dict[str, Any]:
    """What a result depends on beside its configuration: versions, commit, hardware, threads."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "commit": _commit(),
        "code_sha256": code_digest(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        **arithmetic(),
    }


def arithmetic() -> dict[str, Any]:
    """What two runs of one configuration and one code must share to be equal bit for bit: a sum in
    another order, in another library or on another processor is rounded otherwise.
    """
    return {
        "versions": {name: _version(name) for name in LIBRARIES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "num_ranks": ranks.size(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


@cache
def code_digest() -> str:
    """SHA-256 of the package's own sources, installed or not, and of the libraries' versions."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE).as_posix()} ".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    digest.update(json.dumps({name: _version(name) for name in LIBRARIES}).encode())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The commit of the code, where it runs from a checkout; "+" marks uncommitted changes."""
    here = Path(__file__).parent
    try:
        top = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "."],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return top.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def save_train_prompts(folder: Path, digests: Iterable[int] | Digests) -> None:
    """Remember which prompts a model was trained on, as 64-bit digests."""
    given = digests if isinstance(digests, np.ndarray) else np.fromiter(digests, np.uint64)
    with replace_file(folder / TRAIN_PROMPTS) as temporary:
        save_file({"digests": np.unique(given)}, temporary)


def load_train_prompts(folder: Path) -> set[int] | None:
    """The digests of `train_prompts` as a set."""
    digests = train_prompts(folder)
    return None if digests is None else set(digests.tolist())


def train_prompts(folder: Path) -> Digests | None:
    """The digests of the prompts that a model was trained on, in order, or None where it is not
    known: 8 bytes for each.

    Args:
        folder: a run directory, or its `model` or `best`.

    Raises:
        InputError: the file that holds them is damaged.
    """
    file = next(
        (f for f in (folder / TRAIN_PROMPTS, folder.parent / TRAIN_PROMPTS) if f.is_file()), None
    )
    if file is None:
        return None
    try:
        return np.unique(load_file(file)["digests"])
    except (SafetensorError, KeyError) as error:
        raise InputError(
            f"{file}: expected the digests of training prompts; it is damaged."
        ) from error
