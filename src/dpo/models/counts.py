"""What a model is and keeps, found without its weights: its architecture is built on the meta
device, where tensors have shapes and no memory, and run on a batch of such tensors.

What a forward pass keeps for the backward pass is asked of autograd itself, so that it holds for
every architecture, precision and adapter, on batches as training packs them.
"""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from dpo.core.cost import ModelSize, PassSize
from dpo.data.pack import Batch
from dpo.errors import InputError
from dpo.models.adapters import AdapterSettings, put_adapter
from dpo.models.forward import head_inputs
from dpo.models.load import (
    ADAPTER_CONFIG,
    ModelSource,
    explain,
    find_model,
    fuse_activations,
    holds_adapter,
)
from dpo.models.plan import assume_plan, in_bfloat16


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to build a model, and which part of it is trained."""

    config: Any
    source: ModelSource
    adapter: AdapterSettings | None = None
    pure_bf16: bool = False

    def build(self, *, layers: int | None = None) -> nn.Module:
        """The model, of all its layers or of fewer, on the meta device.

        Raises:
            InputError: an adapter's target is none of its layers.
        """
        config = self.config if layers is None else _with_layers(self.config, layers)
        remote = {"trust_remote_code": self.source.trust_remote_code}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **remote)
            model = fuse_activations(model.eval())
            assume_plan(model)
            if self.pure_bf16:
                in_bfloat16(model)
            if self.adapter is not None:
                put_adapter(model, self.adapter, source=self.source, seed=0)
        return model


def _with_layers(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def read_architecture(
    source: ModelSource, *, adapter: AdapterSettings | None, pure_bf16: bool
) -> Architecture:
    """The architecture of a model folder or hub model, by its configuration alone. Of a folder with
    an adapter, that of its base; an adapter that is trained further has the rank it has.

    Raises:
        InputError: there is no such model.
    """
    if holds_adapter(source):
        found = _read_adapter(source)
        base = find_model(found["base_model_name_or_path"], revision=found.get("revision"))
        if adapter is not None:
            kind = "dora" if found.get("use_dora") else "lora"
            targets = tuple(found["target_modules"])
            adapter = AdapterSettings(kind, rank=found["r"], target_modules=targets)
        return read_architecture(base, adapter=adapter, pure_bf16=pure_bf16)
    try:
        config = AutoConfig.from_pretrained(source.path, **source.arguments())
    except Exception as error:  # transformers raises its own types
        raise explain(error, "model", source) from error
    return Architecture(config, source, adapter, pure_bf16)


def _read_adapter(source: ModelSource) -> dict[str, Any]:
    file = Path(source.path) / ADAPTER_CONFIG
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = found["base_model_name_or_path"], found["r"], found["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected the configuration of a LoRA adapter.") from error
    return found


def fresh_architecture(
    *, width: int, layers: int, heads: int, positions: int, vocab_size: int, pure_bf16: bool
) -> Architecture:
    """That of `model.fresh` with a tokenizer of `vocab_size` entries."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Architecture(config, ModelSource("", local=True), None, pure_bf16)


def classifier_parameters(source: ModelSource) -> int:
    """How many numbers a sequence classifier has, by its configuration.

    Raises:
        InputError: there is no such model, or it is no classifier.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, **source.arguments())
        remote = {"trust_remote_code": source.trust_remote_code}
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, **remote)
    except Exception as error:  # transformers raises its own types
        raise explain(error, "model", source) from error
    return sum(p.numel() for p in model.parameters())


# -- counts --------------------------------------------------------------------------------------


def measure_model(model: nn.Module) -> ModelSize:
    """A model's counts.

    Raises:
        InputError: it is not made of layers that are known.
    """
    layers = transformer_layers(model)
    if not layers:
        raise InputError(f"model: {type(model).__name__} has no layers that could be counted.")
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    config: Any = model.config
    heads = int(config.num_attention_heads)
    vocab, width = head.weight.shape
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(trained),
        layers=len(layers),
        layer_parameters=_mean(layers, lambda p: True),
        layer_trained=_mean(layers, lambda p: p.requires_grad),
        layer_products=sum(_products(layer) for layer in layers) // len(layers),
        attention_width=heads * int(getattr(config, "head_dim", None) or width // heads),
        width=int(width),
        vocab=int(vocab),
        tied=head.weight is embedding.weight,
        head_trained=bool(head.weight.requires_grad),
        largest=max(trained),
        embedding_trained=embedding.weight.numel() if embedding.weight.requires_grad else 0,
    )


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that recomputation and sharding go by."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _mean(layers: Sequence[nn.Module], counted: Callable[[nn.Parameter], bool]) -> int:
    total = sum(p.numel() for layer in layers for p in layer.parameters() if counted(p))
    return total // len(layers)


def _products(layer: nn.Module) -> int:
    matrices = (m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D))
    return sum(m.weight.numel() for m in matrices)


# -- what a forward pass keeps -------------------------------------------------------------------


def measure_pass(
    architecture: Architecture, batches: Sequence[Batch], *, precision: str
) -> PassSize:
    """What the batches of one pass keep for the backward pass: of one layer the difference between
    a model of two layers and one of one.
    """
    one, two = (
        _kept_by(architecture.build(layers=layers), batches, precision=precision)
        for layers in (1, 2)
    )
    layer = two.total - one.total
    return PassSize(
        tokens=sum(batch.ids.size for batch in batches),
        predicted=sum(len(batch.column) for batch in batches),
        layer_kept=layer,
        layer_copies=two.copies - one.copies,
        outside_kept=max(0, one.total - layer),
        layer_passing=one.passing,
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes that autograd keeps beside parameters and buffers."""

    total: int
    copies: int
    """Of matrices of the shape of a parameter: its bfloat16 copies."""
    passing: int
    """The most that the backward pass through the layers adds."""


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, for as long as they live."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen = WeakIdKeyDictionary({t.untyped_storage(): True for t in known})

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                self._made(tensor.untyped_storage())
        return found

    def _made(self, storage: Any) -> None:
        self._seen[storage] = True
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


def _kept_by(model: nn.Module, batches: Sequence[Batch], *, precision: str) -> _Kept:
    with FakeTensorMode(allow_non_fake_inputs=True):  # a CPU's, by which kernels are chosen
        return _kept_on_cpu(_on_cpu(model), batches, precision=precision)


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model with its tensors said to be on the CPU, in place; shared ones stay shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor not in made:
                    empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
                    trained = tensor.requires_grad
                    made[tensor] = (
                        nn.Parameter(empty, trained) if own is module._parameters else empty
                    )
                if tensor is not None:
                    own[name] = made[tensor]  # type: ignore[assignment]
    return model


def _kept_on_cpu(model: nn.Module, batches: Sequence[Batch], *, precision: str) -> _Kept:
    tensors = (*model.parameters(), *model.buffers())
    own = {_storage(tensor) for tensor in tensors}
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept.setdefault(_storage(tensor), tensor)  # held, so that no other gets its number
        return tensor

    live = _Live(tensors)
    with live:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = [head_inputs(model, batch, precision=precision) for batch in batches]
        sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
        rounded = [
            t for t in kept.values() if t.dtype == torch.bfloat16 and tuple(t.shape) in weights
        ]
        copies = sum(t.untyped_storage().nbytes() for t in rounded) if precision == "bf16" else 0
        kept.clear()
        start = live.most = live.now
        own_gradients = [p for layer in transformer_layers(model) for p in layer.parameters()]
        total = torch.stack([output.sum() for output in outputs]).sum()
        del outputs
        torch.autograd.grad(total, [p for p in own_gradients if p.requires_grad])
    return _Kept(sum(sizes), copies, live.most - start)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
