"""Log-probabilities of responses under any causal language model.

Everything that scores text goes through here: training, reference scoring and evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dpo.core.head import head_token_logps
from dpo.core.logps import sum_per_sequence, token_logps
from dpo.data.pack import packed_groups, padded_groups
from dpo.data.tokenize import TokenSequence
from dpo.models.forward import float32_weights, head_inputs, selected_logits
from dpo.models.parts import device_of
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
        precision: "bf16" for the trunk's products in bfloat16; logits are float32 and sums float64
            either way.
    """
    groups = score_groups(model, sequences, max_tokens=max_tokens)
    sums = []
    for group in groups:
        members = [sequences[i] for i in group]
        found = token_scores(model, members, precision=precision, max_logit_bytes=max_logit_bytes)
        sums.append(sum_per_sequence(found.logps, found.sequence, len(members)))
    order = torch.tensor([i for group in groups for i in group], device=sums[0].device)
    return torch.cat(sums)[order.argsort()]


def score_groups(
    model: nn.Module, sequences: Sequence[TokenSequence], *, max_tokens: int
) -> list[list[int]]:
    """The sequences that go through the model together."""
    split = packed_groups if scoring_plan(model).packed else padded_groups
    return split(sequences, max_tokens=max_tokens)


def response_token_logps(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int = MAX_TOKENS,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
    precision: str = "fp32",
) -> Tensor:
    """`log pi(y_t | x, y_<t)` of each scored token, (S, T), float64, in nats, 0 after a sequence's
    end. Otherwise as `response_logps`, which gives its sums.
    """
    groups = score_groups(model, sequences, max_tokens=max_tokens)
    found = [
        token_scores(
            model,
            [sequences[i] for i in group],
            precision=precision,
            max_logit_bytes=max_logit_bytes,
        ).logps
        for group in groups
    ]
    return in_rows(found, groups, sequences)


def in_rows(
    values: Sequence[Tensor], groups: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]
) -> Tensor:
    """Token values of each group, (M,), as a row a sequence, (S, T), float64, 0 after its end.

    Args:
        values: of each group, sequence after sequence.
        groups: places in `sequences`, each once.
    """
    rows: list[Tensor] = [torch.empty(0)] * len(sequences)
    for group, of_group in zip(groups, values, strict=True):
        parts = of_group.double().split([sequences[i].num_scored for i in group])
        for i, part in zip(group, parts, strict=True):
            rows[i] = part
    return pad_sequence(rows, batch_first=True)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model gives of each scored token of some sequences, sequence after sequence."""

    logps: Tensor
    """(M,) its log-probability, in nats."""
    sequence: Tensor
    """(M,) the sequence it belongs to."""
    states: Tensor | None
    """(M, D) what the head predicted it from, in at least float32, where asked for."""


def token_scores(
    model: nn.Module,
    sequences: list[TokenSequence],
    *,
    precision: str = "fp32",
    max_logit_bytes: int = MAX_LOGIT_BYTES,
    states: bool = False,
) -> TokenScores:
    """The sequences run as one batch. With `states`, what another head may be put on as well."""
    plan = scoring_plan(model)
    batch = plan.layout(sequences)
    device = device_of(model)
    source, targets, sequence = (
        torch.from_numpy(x).to(device) for x in (batch.source, batch.targets, batch.sequence)
    )
    head = model.get_output_embeddings()  # type: ignore[operator]
    form = None if "forward" in vars(head) else plan.form  # others replaced it: accelerate, say
    hidden = None
    if states or form is not None:
        hidden = head_inputs(model, batch, precision=precision)
    if form is None:
        logits = selected_logits(model, batch, precision=precision)
        logps = token_logps(logits[source], targets)
    else:
        assert hidden is not None
        logps = head_token_logps(
            hidden,
            *float32_weights(head),
            source,
            targets,
            form=form,
            max_bytes=max_logit_bytes,
        )
    return TokenScores(logps, sequence, hidden[source] if states and hidden is not None else None)


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
