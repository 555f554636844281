"""Checkpoints: written whole, verified by digest, without pickle, enough to go on bit for bit."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dpo.atomic import fsync_folder, replace_folder, storage_errors, unfinished, write_json
from dpo.errors import CheckpointError
from dpo.models.parts import is_sharded
from dpo.train import ranks, sharding
from dpo.train.sharding import OF_COMPANION, weights, weights_of_companion

MANIFEST = "MANIFEST.json"
COMPANION = "companion.safetensors"
METHOD = "method.safetensors"
NUM_KEPT = 2

log = logging.getLogger("dpo")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run's checkpoints are made of, by SHA-256. The manifest of each holds it, so that one
    which was copied or left behind from elsewhere does not pass for one of this run.
    """

    config: str
    """Of everything that decides the run's result (`config.json`). With another one, the state
    belongs to another run, and the checkpoint is not used."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Of what `config` covers already, under names ("data", "tokenizer"): they only say what it is
    that differs."""
    code: str = ""
    """Of this package's sources and the versions of what it computes with. With another one the
    run goes on, with a warning: an update in the middle of a run is nobody's mistake, but bit for
    bit equality with an uninterrupted run is promised for the same code only."""

    def as_json(self) -> dict[str, str]:
        return {"config": self.config, **self.parts, "code": self.code}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that verified: its folder and the small state beside the tensors."""

    folder: Path
    state: dict[str, Any]
    code: str = ""
    """The digest of the code that wrote it, empty where its manifest has none."""

    @property
    def step(self) -> int:
        return int(self.state["step"])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copies of all that a checkpoint holds: training may go on while they are written."""

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """By file name, on the CPU."""


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint on the disk, and what it took."""

    folder: Path
    num_bytes: int
    seconds: float


def snapshot(
    policy: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    *,
    companion: nn.Module | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Copy what a checkpoint must hold, exactly, as it is between two steps.

    The random state needs no saving: order, dropout and samples are functions of seed and step.

    Args:
        policy: the parameters that it trains are saved by name, tied ones once.
        optimizer: AdamW over the policy's parameters.
        state: JSON; must hold `step`, the number of optimizer steps taken.
        companion: another model that changes while training: a moving reference.
        tensors: what the method carries from step to step: samples that it still trains on.
    """
    files: dict[str, Mapping[str, Tensor]] = {
        "model.safetensors": weights(policy),
        "optimizer.safetensors": _optimizer_tensors(policy, optimizer),
    }
    if companion is not None:
        files[COMPANION] = weights_of_companion(companion)
    if tensors:
        files[METHOD] = tensors
    copies = {
        file: {name: _copy(tensor) for name, tensor in content.items()}
        for file, content in files.items()
    }
    return Snapshot(copy.deepcopy(state), copies)


def write(root: Path, taken: Snapshot, origin: Origin) -> Written:
    """Write `root/step-N` whole, on the disk when this returns, and drop all but the newest two.

    Raises:
        StorageError: the disk is full, read-only or gone; older checkpoints are as they were.
    """

    def fill(folder: Path) -> None:
        for name, tensors in taken.tensors.items():
            save_file(tensors, folder / name)

    return _write(root, taken.state, origin, fill)


def write_shards(
    root: Path,
    policy: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    origin: Origin,
    *,
    companion: nn.Module | None = None,
) -> Written | None:
    """The same of a sharded policy: every rank writes its part, the first the rest. None on the
    others.

    Raises:
        StorageError: as `write`.
    """

    def fill(folder: Path) -> None:
        with ranks.together():  # the folder is there
            pass
        sharding.write_shards(folder, policy, optimizer, companion)

    if ranks.is_first():
        return _write(root, state, origin, fill)
    fill(unfinished(_folder(root, state)))
    return None


def _folder(root: Path, state: Mapping[str, Any]) -> Path:
    return root / f"step-{int(state['step']):08d}"


def _write(
    root: Path, state: Mapping[str, Any], origin: Origin, fill: Callable[[Path], None]
) -> Written:
    """A checkpoint whose tensors `fill` writes into the folder that it is given."""
    started = time.perf_counter()
    folder = _folder(root, state)
    with storage_errors(root):
        root.mkdir(exist_ok=True)
        fsync_folder(root.parent)
    with replace_folder(folder) as temporary:
        fill(temporary)
        write_json(temporary / "state.json", state)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)}
            for file in sorted(temporary.iterdir())
        }
        write_json(temporary / MANIFEST, {"files": files, "origin": origin.as_json()})
        num_bytes = sum(file.stat().st_size for file in temporary.iterdir())
    # What is newer than this step did not verify when the run was resumed, and comes again.
    until_now = sorted(old for old in root.glob("step-*") if old.name <= folder.name)
    for old in root.glob("step-*"):
        if old not in until_now[-NUM_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    return Written(folder, num_bytes, time.perf_counter() - started)


def newest(root: Path, origin: Origin) -> Checkpoint | None:
    """The newest checkpoint of this run that verifies, or None where none was ever written.

    Raises:
        CheckpointError: there are checkpoints and none can be trusted.
    """
    folders = sorted(root.glob("step-*"), reverse=True)
    problems: list[str] = []
    for folder in folders:
        problem = verify(folder, origin)
        if problem is None:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return Checkpoint(folder, state, str(manifest["origin"].get("code", "")))
        problems.append(f"{folder.name}: {problem}")
        log.warning("Checkpoint %s is not used (%s); trying the one before.", folder, problem)
    if problems:
        raise CheckpointError(
            f"{root}: no checkpoint can be trusted ({'; '.join(problems)}). "
            "Restore one, or remove the folder to start again."
        )
    return None


def verify(folder: Path, origin: Origin) -> str | None:
    """What is wrong with a checkpoint, or None: sizes and SHA-256 of its files against its
    manifest, and the run that it is of against this one.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {str(name): dict(entry) for name, entry in manifest["files"].items()}
        claimed = dict(manifest["origin"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    whole = not any(fnmatch(name, sharding.SHARDS) for name in expected)
    tensors = ("model.safetensors", "optimizer.safetensors") if whole else ()
    for required in (*tensors, "state.json"):
        if required not in expected:
            return f"{MANIFEST} does not list {required}"
    for name, entry in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.get("bytes"):
            return f"{name} has {file.stat().st_size} bytes, not {entry.get('bytes')}"
        if _digest(file) != entry.get("sha256"):
            return f"{name} does not have the digest it was saved with"
    own = {"config": origin.config, **origin.parts}
    other = [name for name, digest in own.items() if claimed.get(name) != digest]
    return f"by its {MANIFEST} it is of a run with another {' and '.join(other)}" if other else None


def restore(
    checkpoint: Checkpoint,
    policy: nn.Module,
    optimizer: Optimizer,
    *,
    companion: nn.Module | None = None,
) -> None:
    """Put weights and optimizer back exactly as they were.

    Raises:
        CheckpointError: the tensors are not those of this model.
    """
    in_parts = any(checkpoint.folder.glob(sharding.SHARDS))
    if in_parts or is_sharded(policy):
        sharding.read_shards(checkpoint.folder, policy, optimizer, companion)
        return
    _put_back(weights(policy), checkpoint.folder / "model.safetensors")
    if companion is not None:
        _put_back(weights(companion), checkpoint.folder / COMPANION)
    saved = load_file(checkpoint.folder / "optimizer.safetensors")
    for name, parameter in policy.named_parameters():
        keys = [key for key in saved if key.rpartition("/")[0] == name]
        if keys:
            optimizer.state[parameter] = {
                key.rpartition("/")[2]: _entry(saved[key], parameter.device) for key in keys
            }


def method_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What the method carried, empty where it carried nothing."""
    file = checkpoint.folder / METHOD
    return load_file(file) if file.is_file() else {}


def _put_back(own: Mapping[str, Tensor], file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: {file.name} is missing; it is of another run.")
    saved = {name.removeprefix(OF_COMPANION): t for name, t in load_file(file).items()}
    if saved.keys() != own.keys() or any(saved[n].shape != own[n].shape for n in own):
        raise CheckpointError(f"{file.parent}: its weights are those of another model.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _optimizer_tensors(policy: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/entry`."""
    return {
        f"{name}/{entry}": torch.as_tensor(value)
        for name, parameter in policy.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def _entry(tensor: Tensor, device: torch.device) -> Tensor | int:
    """An entry of the optimizer's state; bitsandbytes counts steps by an integer."""
    if tensor.dim() == 0 and tensor.dtype == torch.int64:
        return int(tensor)
    return tensor.to(device)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _digest(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
