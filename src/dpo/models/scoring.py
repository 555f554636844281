"""Log-probabilities of responses under any causal language model.

Everything that scores text goes through `response_logps`: training, reference scoring and
evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpo.core.logps import at_least_float32, sum_per_sequence, token_logps
from dpo.data.order import group_by_length
from dpo.data.tokenize import TokenSequence


def precision_context(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The forward pass in float32, or with its matrix products in bfloat16 (weights stay
    float32).
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def _scored_positions_only(model: nn.Module, row: Tensor, column: Tensor) -> Iterator[None]:
    """Inside, the model's output head sees only the hidden states at (row, column).

    The head is by far the largest matrix, and prompt positions predict nothing that is scored.
    Taking the rows just before the head leaves whatever the model does after it (scaling, soft
    cap) in place, so it is exact for every architecture. The head works in float32 whatever the
    precision of the trunk.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    forward, replaced = head.forward, vars(head).get("forward")  # accelerate replaces it, say

    def selected(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = forward(at_least_float32(hidden[row, column])).unsqueeze(0)
            return logits

    head.forward = selected
    try:
        yield
    finally:
        del head.forward
        if replaced is not None:
            head.forward = replaced


def scored_logits(
    model: nn.Module, sequences: Sequence[TokenSequence], *, precision: str = "fp32"
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that predict each scored token of the sequences, run as one padded batch.

    Padding is on the right: a causal model never looks at it, so no mask is needed and no id is
    special.

    Returns:
        logits (N, V) in at least float32; targets (N,); the sequence of each token (N,).
    """
    device = next(model.parameters()).device
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[*s.ids, *[0] * (width - len(s))] for s in sequences], device=device)
    row, column = _scored_index(sequences, device)
    with precision_context(precision, device), _scored_positions_only(model, row, column - 1):
        logits = model(input_ids=ids, use_cache=False).logits.squeeze(0)
    return at_least_float32(logits), ids[row, column], row


def _scored_index(
    sequences: Sequence[TokenSequence], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and column of every scored token in the padded batch, (N,) each."""
    counts = torch.tensor([s.num_scored for s in sequences])
    row = torch.repeat_interleave(torch.arange(len(sequences)), counts)
    column = torch.cat([torch.arange(s.prompt_length, len(s)) for s in sequences])
    return row.to(device), column.to(device)


def response_logps(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int = 16_384,
    precision: str = "fp32",
) -> Tensor:
    """`log pi(response | prompt)` of each sequence, (S,), summed over scored tokens, float64, in
    nats.

    A sequence's value does not depend on what else is in the list. Gradients flow to the model.

    Args:
        model: a causal language model of transformers, in evaluation mode unless dropout is wanted.
        sequences: each with at least one prompt token and one scored token.
        max_tokens: positions, padding included, that go through the model at once.
        precision: "fp32" or "bf16" for the trunk; logits are float32 and sums float64 either way.
    """
    groups = group_by_length([len(s) for s in sequences], max_tokens=max_tokens)
    sums: list[Tensor] = []
    for group in groups:
        members = [sequences[i] for i in group]
        logits, targets, row = scored_logits(model, members, precision=precision)
        sums.append(sum_per_sequence(token_logps(logits, targets), row, len(members)))
    order = torch.tensor([i for group in groups for i in group], device=sums[0].device)
    return torch.cat(sums)[order.argsort()]
