"""How a model is scored: packed or padded, with the fused head or its own. Decided once a model, by
its configuration and by a trial.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpo.core.head import HeadForm
from dpo.data.pack import Batch, pack, pad
from dpo.data.tokenize import TokenSequence
from dpo.models.attention import UnsupportedAttention
from dpo.models.forward import head_inputs, selected_logits
from dpo.models.parts import class_name

log = logging.getLogger("dpo")

TOLERANCE = 1e-4
"""Largest difference between packed and padded outputs, relative to their spread, in the trial."""


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """What is exact for a model."""

    packed: bool
    form: HeadForm | None
    """What follows the head, where log-probabilities can be had from hidden states; else None."""

    @property
    def layout(self) -> Callable[[list[TokenSequence]], Batch]:
        return pack if self.packed else pad


_plans: WeakKeyDictionary[nn.Module, ScoringPlan] = WeakKeyDictionary()


def scoring_plan(model: nn.Module) -> ScoringPlan:
    """The model's plan; the first call tries it out, and says where it falls back and why."""
    plan = _plans.get(model)
    if plan is None:
        plan = _plans[model] = _find_plan(model)
    return plan


def share_plan(model: nn.Module, other: nn.Module) -> None:
    """Score a model as another whose forward pass it has."""
    _plans[model] = scoring_plan(other)


def assume_plan(model: nn.Module) -> ScoringPlan:
    """Score a model as its configuration tells, without the trial: it has no weights to try."""
    if model not in _plans:
        _plans[model] = ScoringPlan(_configured_otherwise(model) is None, HeadForm())
    return _plans[model]


def in_bfloat16(model: nn.Module) -> nn.Module:
    """The model with its parameters in bfloat16, in place.

    How it is scored is found out before: afterwards rounding would hide what the trial looks for.
    Buffers stay as they are: rotary frequencies in bfloat16 would be other positions.
    """
    scoring_plan(model)
    return rounded(model)


def rounded(model: nn.Module) -> nn.Module:
    """The same of a model whose plan is another's (`share_plan`), or that has no weights yet."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _find_plan(model: nn.Module) -> ScoringPlan:
    with as_evaluated(model):
        reason = why_not_packed(model)
        form = head_form(model)
    if reason is not None:
        log.info("%s is run on padded rows, without prefix sharing: %s.", class_name(model), reason)
    if form is None:
        log.info("%s is scored through its own output head.", class_name(model))
    return ScoringPlan(reason is None, form)


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, the model has no dropout and keeps no graph; each module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits before every target, in the order of the targets."""
    return selected_logits(model, batch)[torch.from_numpy(batch.source)]


def why_not_packed(
    model: nn.Module, outputs: Callable[[nn.Module, Batch], Tensor] = _logits
) -> str | None:
    """Why packed trees would not be exact for this model, or None where they are.

    What the configuration tells is believed first: small weights can hide a difference from the
    trial.

    Args:
        outputs: what is compared: one row for each target of the batch, in their order.
    """
    reason = _configured_otherwise(model)
    if reason is not None:
        return reason
    sequences = trial_sequences(model)
    try:
        packed = outputs(model, pack(sequences))
    except UnsupportedAttention as error:
        return str(error)
    padded = outputs(model, pad(sequences))
    difference = float((packed - padded).abs().max() / padded.std().clamp(min=1e-6))
    if not difference <= TOLERANCE:
        return f"packed and padded outputs differ by {difference:.1e} of their spread"
    return None


def _configured_otherwise(model: nn.Module) -> str | None:
    """What the model's configuration says against packing, or None."""
    config: Any = model.config
    if not getattr(model, "_supports_attention_backend", False):
        return "it takes no registered attention function"
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    return f"it has layers of the kind {', '.join(sorted(kinds))}" if kinds else None


def trial_sequences(model: nn.Module) -> list[TokenSequence]:
    """Two prompts with responses of several lengths, one of them empty once packed."""
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = [int(i) for i in torch.randint(size, (24,), generator=torch.Generator().manual_seed(0))]
    first, second = tuple(ids[:5]), tuple(ids[5:7])
    return [
        TokenSequence((*first, *ids[7:12]), 5),
        TokenSequence((*first, *ids[12:15]), 5),
        TokenSequence((*first, ids[15]), 5),
        TokenSequence((*second, *ids[16:18]), 2),
        TokenSequence((*second, *ids[18:24]), 2),
    ]


def head_form(model: nn.Module) -> HeadForm | None:
    """What the model does between its head and its logits, checked against what it gives.

    None where it is something else, or where the head is more than one matrix and a bias.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:
        return None
    batch = pad(trial_sequences(model))
    raw = nn.functional.linear(head_inputs(model, batch), head.weight, head.bias)
    found = selected_logits(model, batch)
    config: Any = model.config
    scales = [1.0, getattr(config, "logit_scale", None)]
    divisor = getattr(config, "logits_scaling", None)
    scales.append(1 / divisor if divisor else None)
    for scale in scales:
        for cap in (None, getattr(config, "final_logit_softcapping", None)):
            if scale is not None:
                form = HeadForm(float(scale), cap)
                if torch.allclose(form(raw.clone()), found, rtol=1e-5, atol=1e-6):
                    # A cap far above the logits of the trial would not show in it.
                    if cap is None and getattr(config, "final_logit_softcapping", None):
                        continue
                    return form
    return None
