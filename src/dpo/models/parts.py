"""A model in parts, one on each rank (FSDP2): cutting, filling, gathering.

A model is cut before it has weights. It is made with its parameters on the meta device, where they
take no memory; then, block by block, every rank gets memory for its own rows of each parameter; and
these are read from wherever the weights are, a tensor at a time.

Each transformer block's parameters are gathered when it runs and let go after it; gradients are
summed and scattered. So every rank must run the model the same number of times, in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

Make = Callable[[], nn.Module]
"""Makes a model whose parameters are on the meta device, but for those that are no one's to read.
"""

Rows = slice | EllipsisType
"""Of a tensor; of one without dimensions all there is."""

Read = Callable[[str, Tensor, Rows], Tensor | None]
"""Rows of a tensor, by its name; None: the model keeps what it has. Fewer rows than asked for: the
rest is 0. The second argument has the type and the shape of the whole tensor. All ranks ask for the
same tensors in the same order.
"""


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a model was made and cut."""

    make: Make
    device: torch.device
    offload: bool


_cuts: WeakKeyDictionary[nn.Module, _Cut] = WeakKeyDictionary()


# -- looking -------------------------------------------------------------------------------------


def parts_of(model: nn.Module) -> list[FSDPModule]:
    """What of a model is gathered together, and let go together; nothing of a whole model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds a part of the model only."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def settle(model: nn.Module) -> None:
    """Let go of parameters that an evaluation has gathered: afterwards `parameters()` gives the
    rank's own part. Nothing to do for a whole model.
    """
    for part in parts_of(model):
        part.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> slice:
    """The rows of a tensor that this rank holds: as equal as whole rows allow, the last ranks may
    have fewer or none.
    """
    held = local(tensor).shape[0]
    if not isinstance(tensor, DTensor):
        return slice(0, held)
    start = min(tensor.shape[0], dist.get_rank() * -(-tensor.shape[0] // dist.get_world_size()))
    return slice(start, start + held)


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; parts that are offloaded are not there."""
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == "cpu":
        return parameter.device
    return torch.device("cuda", torch.cuda.current_device())


def class_name(model: nn.Module) -> str:
    """What the model's class is called, whole or in parts."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if isinstance(model, FSDPModule) else name


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once, and the buffers that a file of weights holds."""
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    buffers = {name: b for name, b in model.named_buffers() if id(b) in saved}
    return dict(model.named_parameters()) | buffers


# -- making --------------------------------------------------------------------------------------


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, a model that is made has its parameters on the meta device; its buffers are real.

    Ties are lost, and come back by `tie_weights`.
    """
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        yield


def emptied(model: nn.Module) -> nn.Module:
    """The model without its weights, in place: its parameters are on the meta device."""
    _replace(model, lambda p: p.detach().to("meta"))
    return model


@contextmanager
def weights_stood_in(model: nn.Module) -> Iterator[None]:
    """Inside, parameters on the meta device are zeros on the CPU that take no memory, for code that
    asks where a weight is.
    """
    made = _replace(
        model, lambda p: torch.zeros((), dtype=p.dtype).expand(p.shape) if p.is_meta else None
    )
    stood_in = {new for old, new in made.items() if old.is_meta}
    try:
        yield
    finally:
        _replace(model, lambda p: p.detach().to("meta") if p in stood_in else None)


def _replace(
    model: nn.Module, new: Callable[[nn.Parameter], Tensor | None]
) -> dict[nn.Parameter, nn.Parameter]:
    """Put other parameters in the places of those for which `new` gives a tensor; what was tied
    stays tied. What stood there, and what stands there now.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if old not in made:
                data = new(old)
                made[old] = old if data is None else nn.Parameter(data, old.requires_grad)
            module._parameters[name] = made[old]
    return made


# -- cutting -------------------------------------------------------------------------------------


def cut(model: nn.Module, make: Make, device: torch.device, *, offload: bool = False) -> nn.Module:
    """Leave each rank its rows of every parameter, in place. What was on the meta device has memory
    then, and holds nothing yet.

    Args:
        make: makes the model again, for a copy in one piece.
        offload: parts, their gradients and so the optimizer's state are in main memory.
    """
    # What a trunk gives must not be changed in place; nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in (*blocks, *_roots(model)):
        inside = {p for p in module.parameters() if p.is_meta}
        _replace(model, lambda p, own=inside: _room(p, device) if p in own else None)  # type: ignore[misc]
        fully_shard(module, mesh=mesh, offload_policy=policy)
    for part in parts_of(model):  # the loop divides by the batch's own weight: gradients are summed
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    _cuts[model] = _Cut(make, device, offload)
    return model


def _room(like: Tensor, device: torch.device) -> Tensor:
    """Memory that nobody has touched; only a rank's own rows are copied out of it."""
    return torch.empty(like.shape, dtype=like.dtype, device=device)


def _roots(model: nn.Module) -> list[nn.Module]:
    """The modules that are called from outside: the model, or a classifier's trunk and its head."""
    if model.get_output_embeddings() is not None:  # type: ignore[operator]
        return [model]
    return [model.base_model, model.score]  # type: ignore[list-item]


@torch.no_grad()
def fill(model: nn.Module, read: Read) -> None:
    """Give every rank's part its values."""
    for name, tensor in tensors_of(model).items():
        rows: Rows = rows_of(tensor) if tensor.dim() else ...
        found = read(name, tensor, rows)
        if found is not None:
            part = local(tensor)
            if part.dim() and len(found) < len(part):
                part[len(found) :] = 0
                part = part[: len(found)]
            part.copy_(found)


def from_files(file_of: Mapping[str, str]) -> Read:
    """Reads rows of tensors out of safetensors files, and nothing else of them."""
    opened = {file: safe_open(file, framework="pt") for file in set(file_of.values())}

    def read(name: str, like: Tensor, rows: Rows) -> Tensor:
        file: Any = opened[file_of[name]]
        found: Tensor = file.get_slice(name)[rows]
        return found

    return read


def from_first(model: nn.Module | None) -> Read:
    """Takes rows of the tensors of a whole model that only the first rank has, which sends them one
    after the other.
    """
    tensors = {} if model is None else tensors_of(model)

    def read(name: str, like: Tensor, rows: Rows) -> Tensor:
        if model is None:
            sent = torch.empty(like.shape, dtype=like.dtype)
        else:
            sent = tensors[name].detach().to(device="cpu", dtype=like.dtype).contiguous()
        dist.broadcast(sent, src=0)
        return sent[rows]

    return read


def from_parts(model: nn.Module) -> Read:
    """Takes rows of the tensors of another model in parts, which are gathered one after the other.

    A layer that carries an adapter has its weight in a layer of its own; what the other model lacks
    is kept.
    """
    settle(model)
    tensors = tensors_of(model)

    def read(name: str, like: Tensor, rows: Rows) -> Tensor | None:
        found = tensors.get(name, tensors.get(name.replace(".base_layer.", ".")))
        return None if found is None else whole(found)[rows]

    return read


def recut(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """What becomes of a model in parts by a change of what it is made of: an adapter that is put
    on, another type of its weights, another head. The new model is in parts as well; the old one is
    as it was.
    """
    before = _cuts[model]

    def changed() -> nn.Module:
        return change(before.make())

    new = cut(changed(), changed, before.device, offload=before.offload)
    fill(new, from_parts(model))
    return new


@torch.no_grad()
def whole_copy(model: nn.Module) -> nn.Module | None:
    """The model in one piece, on the CPU of the first rank; None on the others."""
    settle(model)
    targets: dict[str, Tensor] = {}
    copy: nn.Module | None = None
    if dist.get_rank() == 0:
        copy = _cuts[model].make()
        _replace(copy, lambda p: _room(p, torch.device("cpu")) if p.is_meta else None)
        targets = dict(copy.named_parameters()) | dict(copy.named_buffers())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        full = whole(tensor)
        if name in targets:
            targets[name].copy_(full)
    return copy
