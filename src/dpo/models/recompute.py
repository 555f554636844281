"""Gradient checkpointing: activations are not kept but computed again in the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.errors import InputError
from dpo.models.attention import attention_named
from dpo.models.parts import class_name


def enable_recomputation(model: nn.Module) -> None:
    """Keep only each layer's input; costs one more forward pass.

    Raises:
        InputError: the model's layers do not offer it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(
            f"gradient_checkpointing: {class_name(model)} does not support it; leave it out."
        )
    # The name that transformers gives it from 5.x on, and the one before.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": partial(_contexts, model)})


def _contexts(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a layer's forward pass and of its repetition, which comes when the packed forward
    pass is long over: it must find the same attention.
    """
    name: str = model.config._attn_implementation  # type: ignore[union-attr, assignment]
    return nullcontext(), attention_named(model, name)


def recompute_without_dropout(model: nn.Module) -> None:
    """Let the layers recompute although the model is in evaluation mode.

    transformers ties recomputation to a layer's training flag, dropout to that of the modules
    inside it; so the flag of the layer alone is set.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
