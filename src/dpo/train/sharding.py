"""A policy in parts, one on each rank (FSDP2), and what reads or writes such a policy.

Each transformer block's parameters are gathered when it runs and let go after it; gradients are
summed and scattered; the optimizer sees the rank's part only. So every rank must run the model the
same number of times, in the same order.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.errors import CheckpointError, InputError, StorageError
from dpo.models.plan import scoring_plan
from dpo.train import ranks

SHARDS = "shard-*.safetensors"
"""The files of a checkpoint in parts, one of each rank that wrote it."""


def shard(policy: nn.Module) -> None:
    """Leave each rank its part of every parameter, block by block.

    Raises:
        InputError: there is no launcher, or the model is none that can be run the same number of
            times everywhere.
    """
    if not dist.is_initialized():
        raise InputError(
            "distributed.kind: fsdp shares the model out among the processes of a launcher; start "
            "it with torchrun --nproc-per-node N -m dpo.cli ..."
        )
    name = type(policy).__name__
    if policy.get_output_embeddings() is None:  # type: ignore[operator]
        raise InputError(f"distributed.kind: {name} is no language model; use ddp.")
    if not scoring_plan(policy).packed:  # padded rows are run in as many pieces as they need
        raise InputError(f"distributed.kind: {name} is run on padded rows; use ddp.")
    mesh = init_device_mesh(next(policy.parameters()).device.type, (ranks.size(),))
    blocks = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in (*blocks, policy):
        fully_shard(module, mesh=mesh)
    for part in _parts(policy):  # the loop divides by the batch's own weight: gradients are summed
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds a part of the model only."""
    return isinstance(model, FSDPModule)


def _parts(policy: nn.Module) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def settle(policy: nn.Module) -> None:
    """Let go of parameters that an evaluation has gathered: afterwards `parameters()` gives the
    rank's own part. Nothing to do for a whole policy.
    """
    for part in _parts(policy):
        part.reshard()


def tokens_at_once(policy: nn.Module, max_tokens: int) -> int:
    """The budget of one pass: a sharded policy takes what it is given in one, for every rank must
    run it equally often.
    """
    return sys.maxsize if is_sharded(policy) else max_tokens


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_copy(policy: nn.Module) -> nn.Module | None:
    """The policy in one piece, on the CPU of the first rank; None on the others."""
    settle(policy)
    _, own_class = type(policy).__bases__  # (FSDPModule, what the class was before)
    targets: dict[str, Tensor] = {}
    copy: nn.Module | None = None
    if ranks.is_first():
        with torch.device("meta"):
            copy = own_class(policy.config)
        copy.to_empty(device="cpu").tie_weights()  # type: ignore[operator]
        targets = dict(copy.named_parameters()) | dict(copy.named_buffers())
    for name, tensor in (*policy.named_parameters(), *policy.named_buffers()):
        full = whole(tensor)
        if name in targets:
            targets[name].copy_(full)
    return copy


# -- checkpoints ---------------------------------------------------------------------------------


def write_shards(folder: Path, policy: nn.Module, optimizer: Optimizer) -> None:
    """Each rank writes its part of weights and optimizer, as safetensors; all have when this
    returns.

    Raises:
        StorageError: a rank could not.
    """
    settle(policy)
    tensors = weights(policy)
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


def read_shards(folder: Path, policy: nn.Module, optimizer: Optimizer) -> None:
    """Put weights and optimizer back, whole or in parts, from a checkpoint that any number of
    ranks wrote, whole or in parts.

    Raises:
        CheckpointError: the tensors are not those of this model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    saved: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    targets = weights(policy)
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, parameter in policy.named_parameters():
        for key in saved:
            of, _, entry = key.rpartition("/")
            if of == name:
                scalar = entry == "step"
                value = torch.zeros(saved[key].size) if scalar else torch.zeros_like(parameter)
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


def _reasons(error: CheckpointException) -> str:
    """What each rank that failed says."""
    failures = error.failures.items()
    return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in failures)
