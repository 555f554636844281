"""Adapters of peft: a few trained matrices beside frozen weights.

    LoRA     W' = W + (alpha / r) B A                          Hu et al. 2021 (arXiv:2106.09685)
    rsLoRA   W' = W + (alpha / sqrt r) B A                     Kalajdzievski 2023 (arXiv:2312.03732)
    DoRA     W' = m (W + (alpha / r) B A) / |W + (alpha / r) B A|, for each output
                                                               Liu et al. 2024 (arXiv:2402.09353)

A (r, in) is random, B (out, r) is 0 and m is |W| at first, so that a model starts as what it was.

The layers are put into the model itself, which stays a model of transformers: packing, the fused
head and sampling need not know of them. Files are peft's own.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from dpo.errors import InputError
from dpo.models.load import (
    ADAPTER_CONFIG,
    ModelSource,
    explain,
    find_model,
    holds_adapter,
    load_model,
    weights_digest,
)
from dpo.models.parts import is_sharded, local, rows_of, weights_stood_in, whole
from dpo.models.plan import as_evaluated, rounded, scoring_plan, share_plan

log = logging.getLogger("dpo")

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "adapter_base.json"
"""Beside them: the digest of the weights that the adapter was trained on."""

NAME = "default"
"""What peft calls an adapter where nobody names it."""
PREFIX = "base_model.model."
"""What peft's files put before the name of a weight."""
MAGNITUDE, WEIGHT = "lora_magnitude_vector", ".weight"
"""DoRA's m. peft writes the first without the second and reads both; transformers 5.23 reads only
the whole name, and leaves m as it was without it.
"""

RANK, ALPHA = 16, 32.0


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What a user may ask of an adapter. None: the default, or what the adapter has that is
    continued.
    """

    kind: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    """Of the adapter's input, while training."""
    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of linear layers; all of them by default."""
    quantize: str | None = None
    """4bit or 8bit: how the frozen weights are held, on a GPU."""


# -- opening -------------------------------------------------------------------------------------


class Holder(Protocol):
    """How a process holds a model: whole, or a part of it."""

    def load(self, source: ModelSource, *, quantize: str | None = None) -> nn.Module:
        """The model of a folder or a hub id; where the folder holds an adapter, merged with its
        base.
        """
        ...

    def make(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The model that a function makes."""
        ...

    def change(self, model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The model after a change that may be made in place. It is scored as it was."""
        ...


class Whole:
    """Every process holds the whole model."""

    def load(self, source: ModelSource, *, quantize: str | None = None) -> nn.Module:
        if holds_adapter(source):
            return merge(_with_saved_adapter(source, self))
        return load_model(source, quantize=quantize)

    def make(self, make: Callable[[], nn.Module]) -> nn.Module:
        return make()

    def change(self, model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
        return change(model)


WHOLE = Whole()


def open_model(
    source: ModelSource,
    *,
    adapter: AdapterSettings | None = None,
    seed: int = 0,
    pure_bf16: bool = False,
    held: Holder = WHOLE,
) -> nn.Module:
    """A causal language model in evaluation mode, whole or with an adapter to train.

    Where the folder holds an adapter, its base is read too. Without `adapter` the two are merged
    into one model, as good as any; with it the folder's adapter is trained further. Otherwise a
    new one is put on.

    Args:
        seed: decides the random part of a new adapter.
        pure_bf16: the weights are bfloat16; those of an adapter that is trained stay float32.

    Raises:
        InputError: no such model or base, an adapter that does not fit it or is of a kind that we
            do not know, settings that do not go with the model, or peft is not installed.
    """
    if adapter is None:
        return typed(held.load(source), pure_bf16, held)
    _peft()
    if holds_adapter(source):
        model = _with_saved_adapter(source, held, continued=adapter, pure_bf16=pure_bf16)
        _check_continued(model, adapter, source)
        _tell(model)
        return model.eval()
    model = held.load(source, quantize=adapter.quantize)
    digest = None if adapter.quantize else weights_digest(model)
    model = add_adapter(typed(model, pure_bf16, held), adapter, source=source, seed=seed, held=held)
    if digest is not None:
        _bases[model] = digest
    return model


def typed(model: nn.Module, pure_bf16: bool, held: Holder = WHOLE) -> nn.Module:
    """The model with weights of the type that training wants.

    How it is scored is found out before: afterwards rounding would hide what the trial looks for.
    """
    if not pure_bf16:
        return model
    scoring_plan(model)
    return held.change(model, rounded)


def add_adapter(
    model: nn.Module,
    settings: AdapterSettings,
    *,
    source: ModelSource,
    seed: int,
    held: Holder = WHOLE,
) -> nn.Module:
    """Freeze the model and put a new adapter on its linear layers, in place, and say so.

    Raises:
        InputError: a target is no linear layer between embedding and head.
    """
    model = held.change(model, partial(put_adapter, settings=settings, source=source, seed=seed))
    if is_sharded(model):
        _measure_magnitudes(model)
    _tell(model)
    return model


def put_adapter(
    model: nn.Module, settings: AdapterSettings, *, source: ModelSource, seed: int
) -> nn.Module:
    """The same without a word."""
    peft = _peft()
    layers = linear_layers(model)
    targets = sorted(layers) if settings.target_modules is None else [*settings.target_modules]
    for name in targets:
        if name not in layers:
            raise InputError(
                f"adapter.target_modules: {name} is no linear layer between the embedding and the "
                f"head of {type(model).__name__}, which stay as they are (there are: "
                f"{', '.join(sorted(layers))})."
            )
    config = peft.LoraConfig(
        r=settings.rank or RANK,
        lora_alpha=settings.alpha or ALPHA,
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_dora=settings.kind == "dora",
        use_rslora=settings.kind == "rslora",
        fan_in_fan_out=any(layers[name] is Conv1D for name in targets),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(source.path).resolve()) if source.local else source.path,
        revision=source.revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, config)
    return model.eval()


def _inject(model: nn.Module, config: Any) -> None:
    """Freeze the model and give its layers the adapter, in float32 on whatever weights."""
    with weights_stood_in(model):
        _peft().inject_adapter_in_model(config, model, NAME)
    for name, parameter in model.named_parameters():
        if _of_adapter(name):
            parameter.data = parameter.data.float()


_bases: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Digests of the weights under the adapters of models, as their folders hold them."""


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(
            'adapter: needs peft; pip install "direct-preference-optimization[adapters]".'
        ) from error
    return peft


def linear_layers(model: nn.Module) -> dict[str, type]:
    """The last part of the name of every linear layer but the head, and its type.

    Head and embedding are left alone: where they are one matrix, an adapter on one of them would
    make two of it.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name.rpartition(".")[2]: type(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _tell(model: nn.Module) -> None:
    counts = parameter_counts(model)
    log.info(
        "Adapter: %s of %s parameters are trained (%.2f%%).",
        f"{counts['trained_parameters']:,}",
        f"{counts['parameters']:,}",
        100 * counts["trained_parameters"] / counts["parameters"],
    )


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """How many numbers the model holds, and how many of them training changes."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
    }


# -- files ---------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter as peft does, and the digest of its base."""
    config = copy.copy(_config(model))
    config.target_modules = sorted(config.target_modules)  # a set's order is another every time
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {
        PREFIX + (name + WEIGHT if name.endswith(MAGNITUDE) else name): t.cpu().contiguous()
        for name, t in _state(model).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    if model in _bases:
        text = json.dumps({"sha256": _bases[model]}, indent=2)
        (folder / BASE_FILE).write_text(text + "\n", encoding="utf-8")


def _with_saved_adapter(
    source: ModelSource,
    held: Holder,
    *,
    continued: AdapterSettings | None = None,
    pure_bf16: bool = False,
) -> nn.Module:
    """The base that an adapter's folder names, with the adapter on it.

    Args:
        continued: how the adapter is trained further, if it is.
    """
    folder = Path(source.path)
    config = _saved_config(source)
    try:
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except Exception as error:  # safetensors raises its own types
        raise explain(error, "adapter", source) from error
    base = _base_of(source, config)
    quantize = None if continued is None else continued.quantize
    model = held.load(base, quantize=quantize)
    digest = None if quantize else weights_digest(model)
    if digest is not None:
        _check_base(folder, base, digest)
    config.inference_mode = False

    def attached(model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            _inject(model, config)
        own = _state(model)
        given = {
            name.removeprefix(PREFIX).replace(MAGNITUDE + WEIGHT, MAGNITUDE): tensor
            for name, tensor in weights.items()
        }
        if own.keys() != given.keys() or any(own[n].shape != given[n].shape for n in own):
            raise InputError(f"{folder}: its {ADAPTER_WEIGHTS} does not fit the model {base.path}.")
        for name, tensor in own.items():
            tensor.copy_(given[name])
        if continued is not None:
            _set_dropout(model, continued.dropout)
        return model

    model = held.change(typed(model, pure_bf16, held), attached)
    if digest is not None:
        _bases[model] = digest
    return model


def _saved_config(source: ModelSource) -> Any:
    """How the adapter of a folder is made."""
    peft = _peft()
    try:
        config = peft.PeftConfig.from_pretrained(source.path)
    except Exception as error:  # peft raises its own types
        raise explain(error, "adapter", source) from error
    _check_known(config, Path(source.path))
    return config


def _base_of(source: ModelSource, config: Any) -> ModelSource:
    """The model that an adapter's folder names as its base."""
    return find_model(
        config.base_model_name_or_path or "",
        revision=config.revision,
        trust_remote_code=source.trust_remote_code,
        key=f"{source.path}: the base of its adapter",
    )


def model_below(source: ModelSource) -> ModelSource:
    """The whole model that lies below the adapters of a folder; the folder's own where it has none.

    Raises:
        InputError: an adapter that is damaged or of a kind that we do not know, or no such base.
    """
    while holds_adapter(source):
        source = _base_of(source, _saved_config(source))
    return source


def _check_known(config: Any, folder: Path) -> None:
    """Refuse what would be left out or be in the way of tied embeddings."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise InputError(f"{folder}: its adapter is of the kind {kind}; expected LORA.")
    more = ["modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"]
    for name in more:
        if getattr(config, name, None):
            raise InputError(
                f"{folder}: its adapter changes more than linear layers ({name}); merge it with "
                "peft and give the merged model."
            )
    if config.bias != "none":
        raise InputError(
            f"{folder}: its adapter trains biases of the model (bias={config.bias}); merge it with "
            "peft and give the merged model."
        )


def _check_base(folder: Path, base: ModelSource, digest: str) -> None:
    """The base must be the one that the adapter was trained on, where the folder says which."""
    file = folder / BASE_FILE
    if not file.is_file():
        return
    try:
        expected = json.loads(file.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected a digest written by dpo; it is damaged.") from error
    if digest != expected:
        raise InputError(
            f"{folder}: its adapter was trained on other weights than {base.path} holds now; put "
            f"those back, or correct base_model_name_or_path in {ADAPTER_CONFIG}."
        )


def _config(model: nn.Module) -> Any:
    return model.peft_config[NAME]  # type: ignore[index]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under the names of peft's files, without their prefix."""
    state: dict[str, Tensor] = _peft().get_peft_model_state_dict(
        model, adapter_name=NAME, save_embedding_layers=False
    )
    return state


def _check_continued(model: nn.Module, settings: AdapterSettings, source: ModelSource) -> None:
    """An adapter that is trained further keeps its form."""
    config = _config(model)
    kind = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    found = {
        "kind": kind,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "target_modules": tuple(sorted(config.target_modules)),
    }
    given = {name: getattr(settings, name) for name in found}
    if given["target_modules"] is not None:
        given["target_modules"] = tuple(sorted(given["target_modules"]))
    for name, value in found.items():
        if given[name] not in (None, value):
            raise InputError(
                f"adapter.{name}: {source.path} holds an adapter with {value}, which is trained "
                f"further (got {given[name]}); set it so, or merge that one (dpo merge) and begin "
                "another."
            )


# -- the layers ----------------------------------------------------------------------------------


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that carry an adapter, by name; none without one."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@torch.no_grad()
def _measure_magnitudes(model: nn.Module) -> None:
    """Give DoRA's m of a new adapter its value, |W|, where the weights were not there when the
    adapter was put on: a model in parts. peft's own code computes it, layer by layer.
    """
    for _, layer in adapter_layers(model):
        if NAME not in layer.lora_magnitude_vector:
            continue
        magnitude = layer.lora_magnitude_vector[NAME]
        base = nn.Module()
        base.weight = nn.Parameter(whole(layer.get_base_layer().weight))
        a, b = (whole(x[NAME].weight).to(base.weight.dtype) for x in (layer.lora_A, layer.lora_B))
        again = type(magnitude)(magnitude.fan_in_fan_out)
        again.update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=layer.scaling[NAME])
        local(magnitude.weight).copy_(again.weight[rows_of(magnitude.weight)])


def carry_base(model: nn.Module, copy: nn.Module) -> nn.Module:
    """The copy, which stands on the same base as the model."""
    if model in _bases:
        _bases[copy] = _bases[model]
    return copy


def has_adapter(model: nn.Module) -> bool:
    return any(hasattr(module, "lora_A") for module in model.modules())


def train_adapters(model: nn.Module) -> None:
    """Put the adapters alone into training mode: their dropout is drawn, the model's is not."""
    for _, layer in adapter_layers(model):
        layer.training = True
        layer.lora_dropout.train()


def _set_dropout(model: nn.Module, share: float) -> None:
    _config(model).lora_dropout = share
    for _, layer in adapter_layers(model):
        layer.lora_dropout[NAME] = nn.Dropout(share) if share else nn.Identity()


def merge(model: nn.Module) -> nn.Module:
    """Add the adapter to the weights that it stands beside, in place: an ordinary model again."""
    for name, layer in adapter_layers(model):
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise InputError(f"{name}: its adapter holds numbers that are not finite.") from error
        model.set_submodule(name, layer.get_base_layer())
    vars(model).pop("peft_config", None)
    return model.requires_grad_(True)


def merged_copy(model: nn.Module) -> nn.Module:
    """The same of a copy; the model goes on with its adapter."""
    return merge(copy.deepcopy(model))


class PolicyAtStart(nn.Module):
    """A policy with an adapter as it was before its first step, for scoring: the reference.

    It holds no model of its own. A new adapter is switched off, which leaves the weights that it
    was put on. Of one that is trained further, a copy as it was is kept, and lent to the policy's
    layers for the time of a forward pass: the base without it would be the wrong reference.
    """

    def __init__(self, policy: nn.Module, *, continued: bool) -> None:
        """
        Args:
            continued: the adapter is one that was trained before.
        """
        super().__init__()
        self._policy = (policy,)  # in a tuple: no part of this module, which has its own mode
        self.config = policy.config
        self._kept = {
            name: parameter.detach().clone()
            for name, parameter in policy.named_parameters()
            if continued and _of_adapter(name)
        }
        share_plan(self, policy)
        self.eval()

    def forward(self, **inputs: Any) -> Any:
        """The policy's forward pass as it was, without dropout and without a graph."""
        (policy,) = self._policy
        with as_evaluated(policy), self._kept_lent() if self._kept else _switched_off(policy):
            return policy(**inputs)

    @contextmanager
    def _kept_lent(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchange the kept weights with the policy's. Storages change places, no number is copied,
        and a graph that waits for its backward pass finds its own again.

        Of a policy in parts the numbers are copied: that is where they are gathered from, also for
        the backward pass. Its blocks, which hold the adapter, are not gathered between passes.
        """
        (policy,) = self._policy
        for name, parameter in policy.named_parameters():
            if name in self._kept:
                kept = self._kept[name]
                if isinstance(parameter, DTensor):
                    _exchange(local(parameter), local(kept))
                else:
                    parameter.data, self._kept[name] = kept, parameter.data

    def modules(self, *args: Any, **options: Any) -> Iterator[nn.Module]:
        """The policy's: whether they are in parts can be asked of both."""
        yield from self._policy[0].modules(*args, **options)

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, Any]]:
        """Those that decide what it computes, under the names of a model without an adapter: its
        digest is that of the base where the base is what it is.
        """
        (policy,) = self._policy
        for name, parameter in policy.named_parameters(*args, **options):
            if not _of_adapter(name):
                yield name.replace(".base_layer.", "."), parameter
        yield from self._kept.items()

    def get_input_embeddings(self) -> nn.Module:
        (policy,) = self._policy
        found: nn.Module = policy.get_input_embeddings()  # type: ignore[operator]
        return found

    def get_output_embeddings(self) -> nn.Module:
        (policy,) = self._policy
        found: nn.Module = policy.get_output_embeddings()  # type: ignore[operator]
        return found


@torch.no_grad()
def _exchange(a: Tensor, b: Tensor) -> None:
    before = a.clone()
    a.copy_(b)
    b.copy_(before)


def _of_adapter(name: str) -> bool:
    return ".lora_" in name


@contextmanager
def _switched_off(policy: nn.Module) -> Iterator[None]:
    """Inside, the adapter does nothing. peft's own switch would also stop its training."""
    layers = [layer for _, layer in adapter_layers(policy)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
