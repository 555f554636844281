"""Training a policy in parts (`dpo.models.parts`): the budget of a pass, and checkpoints."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from dpo.errors import CheckpointError, StorageError
from dpo.models.parts import is_sharded, settle

SHARDS = "shard-*.safetensors"
"""The files of a checkpoint in parts, one of each rank that wrote it."""

OF_COMPANION = "companion:"
"""What stands before the names of a companion's tensors: a checkpoint in parts is one set of names.
"""


def tokens_at_once(policy: nn.Module, max_tokens: int) -> int:
    """The budget of one pass: a sharded policy takes what it is given in one, for every rank must
    run it equally often.
    """
    return sys.maxsize if is_sharded(policy) else max_tokens


def write_shards(
    folder: Path, policy: nn.Module, optimizer: Optimizer, companion: nn.Module | None = None
) -> None:
    """Each rank writes its part of weights, optimizer and companion, as safetensors; all have when
    this returns.

    Raises:
        StorageError: a rank could not.
    """
    settle(policy)
    tensors = weights(policy) | weights_of_companion(companion)
    for name, parameter in policy.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            # A count is kept as a vector of one: torch's reader takes no scalars.
            tensors[f"{name}/{entry}"] = value.reshape(1) if value.dim() == 0 else value
    try:
        save(
            dict(sorted(tensors.items())),  # of equal states each rank writes the same
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        )
    except CheckpointException as error:
        raise StorageError(f"{folder} cannot be written: {_reasons(error)}.") from error


def read_shards(
    folder: Path, policy: nn.Module, optimizer: Optimizer, companion: nn.Module | None = None
) -> None:
    """Put weights, optimizer and companion back, whole or in parts, from a checkpoint that any
    number of ranks wrote, whole or in parts.

    Raises:
        CheckpointError: the tensors are not those of this model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    saved: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    targets = weights(policy) | weights_of_companion(companion)
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, parameter in policy.named_parameters():
        for key in saved:
            of, _, entry = key.rpartition("/")
            if of == name:
                if entry == "step":
                    value = torch.zeros(saved[key].size)
                else:
                    value = torch.zeros_like(parameter, dtype=saved[key].properties.dtype)
                targets[key] = value.detach()
                state.setdefault(parameter, {})[entry] = targets[key]
    if targets.keys() != saved.keys() or any(targets[k].shape != saved[k].size for k in saved):
        raise CheckpointError(f"{folder}: its weights are those of another model.")
    try:
        with warnings.catch_warnings():  # that a process is alone is no news to it
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
            load(targets, storage_reader=reader)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be read: {_reasons(error)}.") from error
    for parameter, entries in state.items():
        device = parameter.device
        optimizer.state[parameter] = {
            entry: value.reshape(()).to(device) if entry == "step" else value
            for entry, value in entries.items()
        }


def weights(policy: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters by name, tied ones once, frozen ones not; and buffers."""
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    tensors = trained | dict(policy.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors.items()}


def weights_of_companion(companion: nn.Module | None) -> dict[str, Tensor]:
    """The same of a model that a checkpoint holds beside the policy, under names of its own."""
    if companion is None:
        return {}
    settle(companion)
    return {f"{OF_COMPANION}{name}": tensor for name, tensor in weights(companion).items()}


def _reasons(error: CheckpointException) -> str:
    """What each rank that failed says."""
    failures = error.failures.items()
    return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in failures)
