"""Checkpoints: written whole, verified by digest, without pickle, enough to go on bit for bit."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dpo.atomic import replace_folder, write_json
from dpo.errors import CheckpointError

MANIFEST = "MANIFEST.json"
COMPANION = "companion.safetensors"
METHOD = "method.safetensors"
NUM_KEPT = 2

log = logging.getLogger("dpo")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that verified: its folder and the small state beside the tensors."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save(
    root: Path,
    policy: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    *,
    companion: nn.Module | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Write `root/step-N` with weights, optimizer and state, and drop all but the newest two.

    The random state needs no saving: order, dropout and samples are functions of seed and step.

    Args:
        root: the run's `checkpoints` folder.
        policy: its parameters are saved by name, tied ones once.
        optimizer: AdamW over the policy's parameters.
        state: JSON; must hold `step`, the number of optimizer steps taken.
        companion: another model that changes while training: a moving reference.
        tensors: what the method carries from step to step: samples that it still trains on.
    """
    folder = root / f"step-{int(state['step']):08d}"
    with replace_folder(folder) as temporary:
        save_file(_weights(policy), temporary / "model.safetensors")
        save_file(_optimizer_tensors(policy, optimizer), temporary / "optimizer.safetensors")
        if companion is not None:
            save_file(_weights(companion), temporary / COMPANION)
        if tensors:
            save_file(tensors, temporary / METHOD)
        write_json(temporary / "state.json", state)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)}
            for file in sorted(temporary.iterdir())
        }
        write_json(temporary / MANIFEST, {"files": files})
    # What is newer than this step did not verify when the run was resumed, and comes again.
    until_now = sorted(old for old in root.glob("step-*") if old.name <= folder.name)
    for old in root.glob("step-*"):
        if old not in until_now[-NUM_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where none was ever written.

    Raises:
        CheckpointError: there are checkpoints and none can be trusted.
    """
    folders = sorted(root.glob("step-*"), reverse=True)
    problems: list[str] = []
    for folder in folders:
        problem = verify(folder)
        if problem is None:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(folder, state)
        problems.append(f"{folder.name}: {problem}")
        log.warning("Checkpoint %s is damaged (%s); trying the one before.", folder, problem)
    if problems:
        raise CheckpointError(
            f"{root}: no checkpoint can be trusted ({'; '.join(problems)}). "
            "Restore one, or remove the folder to start again."
        )
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: sizes and SHA-256 against its manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): dict(entry) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    for required in ("model.safetensors", "optimizer.safetensors", "state.json"):
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
    return None


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
    _put_back(policy, checkpoint.folder / "model.safetensors")
    if companion is not None:
        _put_back(companion, checkpoint.folder / COMPANION)
    saved = load_file(checkpoint.folder / "optimizer.safetensors")
    for name, parameter in policy.named_parameters():
        keys = [key for key in saved if key.rpartition("/")[0] == name]
        if keys:
            optimizer.state[parameter] = {
                key.rpartition("/")[2]: saved[key].to(parameter.device) for key in keys
            }


def method_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What the method carried, empty where it carried nothing."""
    file = checkpoint.folder / METHOD
    return load_file(file) if file.is_file() else {}


def _put_back(model: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: {file.name} is missing; it is of another run.")
    weights, own = load_file(file), _weights(model)
    if weights.keys() != own.keys() or any(weights[n].shape != own[n].shape for n in own):
        raise CheckpointError(f"{file.parent}: its weights are those of another model.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _weights(policy: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    tensors = dict(policy.named_parameters()) | dict(policy.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _optimizer_tensors(policy: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/entry`."""
    return {
        f"{name}/{entry}": tensor
        for name, parameter in policy.named_parameters()
        for entry, tensor in optimizer.state.get(parameter, {}).items()
    }


def _digest(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
