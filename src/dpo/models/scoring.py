"""Log-probabilities of responses under any causal language model.

Everything that scores text goes through here: training, reference scoring and evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo.core.head import head_token_logps
from dpo.core.logps import sum_per_sequence, token_logps
from dpo.data.pack import packed_groups, padded_groups
from dpo.data.tokenize import TokenSequence
from dpo.models.forward import head_inputs, selected_logits
from dpo.models.plan import scoring_plan

MAX_TOKENS = 16_384
MAX_LOGIT_BYTES = 1 << 29


def response_logps(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int = MAX_TOKENS,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
    precision: str = "fp32",
) -> Tensor:
    """`log pi(response | prompt)` of each sequence, (S,), summed over scored tokens, float64, in
    nats.

    A sequence's value does not depend on what else is in the list. Sequences with the same prompt
    share its computation. Gradients flow to the model.

    Args:
        model: a causal language model of transformers, in evaluation mode unless dropout is wanted.
        sequences: each with at least one prompt token and one scored token.
        max_tokens: tokens that go through the model at once.
        max_logit_bytes: most memory for logits; above it they are computed in parts, twice.
        precision: "fp32" or "bf16" for the trunk; logits are float32 and sums float64 either way.
    """
    groups = score_groups(model, sequences, max_tokens=max_tokens)
    sums = []
    for group in groups:
        members = [sequences[i] for i in group]
        logps, sequence = _token_logps(model, members, precision, max_logit_bytes)
        sums.append(sum_per_sequence(logps, sequence, len(members)))
    order = torch.tensor([i for group in groups for i in group], device=sums[0].device)
    return torch.cat(sums)[order.argsort()]


def score_groups(
    model: nn.Module, sequences: Sequence[TokenSequence], *, max_tokens: int
) -> list[list[int]]:
    """The sequences that go through the model together."""
    split = packed_groups if scoring_plan(model).packed else padded_groups
    return split(sequences, max_tokens=max_tokens)


def _token_logps(
    model: nn.Module, sequences: list[TokenSequence], precision: str, max_logit_bytes: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each scored token, (M,), and the sequence it belongs to, (M,)."""
    plan = scoring_plan(model)
    batch = plan.layout(sequences)
    device = next(model.parameters()).device
    source, targets, sequence = (
        torch.from_numpy(x).to(device) for x in (batch.source, batch.targets, batch.sequence)
    )
    head = model.get_output_embeddings()  # type: ignore[operator]
    if plan.form is None or "forward" in vars(head):  # others replaced it: accelerate, say
        logits = selected_logits(model, batch, precision=precision)
        return token_logps(logits[source], targets), sequence
    hidden = head_inputs(model, batch, precision=precision)
    logps = head_token_logps(
        hidden,
        head.weight,
        head.bias,
        source,
        targets,
        form=plan.form,
        max_bytes=max_logit_bytes,
    )
    return logps, sequence


def scored_logits(
    model: nn.Module, sequences: Sequence[TokenSequence], *, precision: str = "fp32"
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that predict each scored token of the sequences, run as one batch.

    Returns:
        logits (M, V) in at least float32; targets (M,); the sequence of each token (M,). Tokens
        stand sequence after sequence, whatever the layout.
    """
    batch = scoring_plan(model).layout(list(sequences))
    logits = selected_logits(model, batch, precision=precision)
    source, targets, sequence = (
        torch.from_numpy(x).to(logits.device) for x in (batch.source, batch.targets, batch.sequence)
    )
    return logits[source], targets, sequence
