"""Preference rows as tokens: pairs, rankings and judged responses, and the tensors of a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.data.pack import packed_tokens
from dpo.data.pairs import EncodedPair as EncodedPair  # "as": for others to import from here
from dpo.data.pairs import Losses, encode_each
from dpo.data.rows import PreferenceRow, RankedRow, UnpairedRow
from dpo.data.stored_pairs import StoredPairs, stored_pairs
from dpo.data.stored_rows import StoredRows
from dpo.data.tokenize import Encoder, TokenSequence
from dpo.models.load import tokenizer_digest
from dpo.progress import counting
from dpo.train.prepare import check_dropped, report_cuts, report_losses

log = logging.getLogger("dpo")

TIE_NATS = 1e-4
"""Log-ratios that differ by less are equal: sums of float32 log-probabilities carry such errors."""


@dataclass(frozen=True, slots=True)
class EncodedRanking:
    """Responses after the same prompt tokens, best first; equal ranks are ties."""

    sequences: tuple[TokenSequence, ...]
    ranks: tuple[int, ...]
    source: str
    scores: tuple[float, ...] | None = None
    subset: str = ""


@dataclass(frozen=True, slots=True)
class EncodedJudgement:
    """One response, judged; and the response of another row after this row's prompt."""

    sequence: TokenSequence
    mismatched: TokenSequence
    desirable: bool
    source: str
    subset: str = ""

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        return (self.sequence,)


Encoded = EncodedPair | EncodedRanking | EncodedJudgement


def num_tokens(row: Encoded) -> int:
    """Tokens that a row sends through the policy."""
    return packed_tokens(row.sequences)


def encode_pairs(
    encoder: Encoder, rows: Sequence[PreferenceRow], *, max_dropped: float, what: str
) -> Sequence[EncodedPair]:
    """Pairs as tokens; those whose two responses are the same tokens teach nothing and are dropped.
    Rows that are in a store become pairs in a store.

    Raises:
        InputError: more than the share `max_dropped` would be dropped.
    """
    pairs: Sequence[EncodedPair]
    if isinstance(rows, StoredRows):
        digest = tokenizer_digest(encoder.tokenizer)
        with counting(f"Tokenising {what}", len(rows)) as advance:
            pairs, losses, found = stored_pairs(
                encoder, rows, tokenizer_sha256=digest, progress=advance
            )
        log.info("%s: tokens %s the store.", what, "read from" if found else "written to")
    else:
        losses = Losses()
        pairs = list(encode_each(encoder, rows, losses))
    report_losses(losses, what=what)
    check_dropped(
        losses.num_dropped,
        len(rows),
        reason=f"{what}: chosen and rejected are the same tokens",
        allowed=max_dropped,
    )
    return pairs


def encode_rankings(
    encoder: Encoder, rows: Sequence[RankedRow], *, max_dropped: float, what: str
) -> list[EncodedRanking]:
    """Rankings as tokens; equal scores are ties. A ranking in which all are tied is dropped.

    Raises:
        InputError: more than the share `max_dropped` would be dropped.
    """
    encoded = [encoder.encode(row.prompt, row.responses) for row in rows]
    report_cuts(encoded, what=what)
    rankings = [
        EncodedRanking(tokens.sequences, _ranks(row), row.source, row.scores, row.subset)
        for tokens, row in zip(encoded, rows, strict=True)
    ]
    kept = [ranking for ranking in rankings if len(set(ranking.ranks)) > 1]
    check_dropped(
        len(rows) - len(kept),
        len(rows),
        reason=f"{what}: all responses of the ranking are tied",
        allowed=max_dropped,
    )
    return kept


def _ranks(row: RankedRow) -> tuple[int, ...]:
    """0 for the best; responses of equal score share a rank."""
    if row.scores is None:
        return tuple(range(len(row.responses)))
    distinct = sorted(set(row.scores), reverse=True)
    return tuple(distinct.index(score) for score in row.scores)


def encode_judgements(
    encoder: Encoder, rows: Sequence[UnpairedRow], *, max_dropped: float, what: str
) -> list[EncodedJudgement]:
    """Judged responses as tokens. Each is also given the completion of the next row that has
    another prompt (its own where there is none): what KTO estimates its reference point from.
    """
    partners = [_partner(rows, i) for i in range(len(rows))]
    encoded = [
        encoder.encode(row.prompt, [row.completion, partner.completion])
        for row, partner in zip(rows, partners, strict=True)
    ]
    report_cuts(encoded, what=what)
    return [
        EncodedJudgement(
            tokens.sequences[0], tokens.sequences[1], row.label, row.source, row.subset
        )
        for tokens, row in zip(encoded, rows, strict=True)
    ]


def _partner(rows: Sequence[UnpairedRow], i: int) -> UnpairedRow:
    following = (rows[(i + step) % len(rows)] for step in range(1, len(rows)))
    return next((row for row in following if row.prompt != rows[i].prompt), rows[i])


@dataclass(frozen=True, slots=True)
class Kind:
    """How rows of one kind become the named tensors that its losses take."""

    encode: Callable[..., Sequence[Any]]
    sequences: Callable[[Sequence[Any]], Sequence[TokenSequence]]
    """The sequences of some rows that carry the gradient, (S,)."""
    places: Callable[[Sequence[Any], Sequence[int]], list[int]]
    """Where the sequences of the rows with these numbers stand among those of all rows."""
    tensors: Callable[[Sequence[Any], str, Tensor], dict[str, Tensor]]
    """Log-probabilities (S,) of the model called `policy` or `reference`, by name."""
    facts: Callable[[Sequence[Any], torch.device], dict[str, Tensor]]
    """What the rows themselves say: lengths, scores, ranks, labels."""
    metrics: Callable[[dict[str, Tensor], float], dict[str, Tensor]]
    """What is logged of each row, (B,)."""


# -- pairs ---------------------------------------------------------------------------------------


def sequences_of(pairs: Sequence[EncodedPair]) -> Sequence[TokenSequence]:
    """All chosen, then all rejected responses, (2B,)."""
    if isinstance(pairs, StoredPairs):
        return pairs.sequences
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def _pair_places(pairs: Sequence[EncodedPair], rows: Sequence[int]) -> list[int]:
    return [*rows, *(len(pairs) + row for row in rows)]


def _pair_tensors(pairs: Sequence[EncodedPair], model: str, logps: Tensor) -> dict[str, Tensor]:
    chosen, rejected = logps.chunk(2)
    return {f"{model}_chosen_logps": chosen, f"{model}_rejected_logps": rejected}


def _pair_facts(pairs: Sequence[EncodedPair], device: torch.device) -> dict[str, Tensor]:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    found = {
        "chosen_lengths": column([pair.chosen.num_scored for pair in pairs]),
        "rejected_lengths": column([pair.rejected.num_scored for pair in pairs]),
    }
    scores = [pair.scores for pair in pairs if pair.scores is not None]
    if len(scores) == len(pairs):
        found["chosen_scores"] = column([chosen for chosen, _ in scores])
        found["rejected_scores"] = column([rejected for _, rejected in scores])
    return found


def _pair_metrics(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Rewards, margin and accuracy. A margin within rounding of 0 is a tie, no hit. Without a
    reference the reward is `beta log pi`.
    """
    policy = [tensors["policy_chosen_logps"], tensors["policy_rejected_logps"]]
    found = {"logps/chosen": policy[0], "logps/rejected": policy[1]}
    change = policy
    if "reference_chosen_logps" in tensors:
        reference = tensors["reference_chosen_logps"], tensors["reference_rejected_logps"]
        change = [own - other for own, other in zip(policy, reference, strict=True)]
        found |= {"logps/chosen_change": change[0], "logps/rejected_change": change[1]}
    margin = scale * (change[0] - change[1])
    tie = margin.abs() <= scale * TIE_NATS
    return {
        "rewards/chosen": scale * change[0],
        "rewards/rejected": scale * change[1],
        "rewards/margin": margin,
        "rewards/accuracy": ((margin > 0) & ~tie).double(),
        "rewards/ties": tie.double(),
        **found,
    }


# -- rankings ------------------------------------------------------------------------------------


def _ranking_sequences(rankings: Sequence[EncodedRanking]) -> list[TokenSequence]:
    """Ranking after ranking."""
    return [sequence for ranking in rankings for sequence in ranking.sequences]


def _ranking_places(rankings: Sequence[EncodedRanking], rows: Sequence[int]) -> list[int]:
    starts = np.cumsum([0, *(len(ranking.sequences) for ranking in rankings)])
    return [int(place) for row in rows for place in range(starts[row], starts[row + 1])]


def _padded(values: Sequence[Tensor], fill: float = 0.0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)


def _ranking_tensors(
    rankings: Sequence[EncodedRanking], model: str, logps: Tensor
) -> dict[str, Tensor]:
    sizes = [len(ranking.sequences) for ranking in rankings]
    return {f"{model}_logps": _padded(logps.split(sizes))}


def _ranking_facts(rankings: Sequence[EncodedRanking], device: torch.device) -> dict[str, Tensor]:
    ranks = _padded([torch.tensor(ranking.ranks, device=device) for ranking in rankings])
    sizes = torch.tensor([len(ranking.ranks) for ranking in rankings], device=device)
    found = {
        "ranks": ranks,
        "mask": torch.arange(ranks.shape[1], device=device) < sizes[:, None],
    }
    scores = [ranking.scores for ranking in rankings if ranking.scores is not None]
    if len(scores) == len(rankings):
        rows = [torch.tensor(row, dtype=torch.float64, device=device) for row in scores]
        found["scores"] = _padded(rows)
    return found


def _ranking_metrics(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Accuracy: the share of a list's strictly ordered pairs that the rewards order alike. Margin:
    the mean difference of those pairs' rewards.
    """
    change = tensors["policy_logps"] - tensors["reference_logps"]
    ranks, mask = tensors["ranks"], tensors["mask"]
    better = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    margin = scale * (change[:, :, None] - change[:, None, :])
    tie = margin.abs() <= scale * TIE_NATS
    counts = better.sum((1, 2))

    def share(values: Tensor) -> Tensor:
        return (values * better).sum((1, 2)) / counts

    return {
        "rewards/margin": share(margin),
        "rewards/accuracy": share(((margin > 0) & ~tie).double()),
        "rewards/ties": share(tie.double()),
        "logps/best_change": _mean_where(change, mask & (ranks == 0)),
        "logps/others_change": _mean_where(change, mask & (ranks > 0)),
    }


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of each row's values at the places given, (B,)."""
    return (values * where).sum(1) / where.sum(1)


# -- judged responses ----------------------------------------------------------------------------


def _judged_sequences(rows: Sequence[EncodedJudgement]) -> list[TokenSequence]:
    return [row.sequence for row in rows]


def _judged_places(judged: Sequence[EncodedJudgement], rows: Sequence[int]) -> list[int]:
    return list(rows)


def _judged_tensors(
    rows: Sequence[EncodedJudgement], model: str, logps: Tensor
) -> dict[str, Tensor]:
    return {f"{model}_logps": logps}


def _judged_facts(rows: Sequence[EncodedJudgement], device: torch.device) -> dict[str, Tensor]:
    return {"desirable": torch.tensor([row.desirable for row in rows], device=device)}


def _judged_metrics(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Rewards of desirable and undesirable responses, as shares of all rows, so that batches add
    up: the mean of the desirable ones is `rewards/desirable / share_desirable`.
    """
    reward = scale * (tensors["policy_logps"] - tensors["reference_logps"])
    desirable = tensors["desirable"].double()
    return {
        "rewards/desirable": reward * desirable,
        "rewards/undesirable": reward * (1 - desirable),
        "share_desirable": desirable,
        "logps/change": tensors["policy_logps"] - tensors["reference_logps"],
    }


KINDS = {
    "pair": Kind(
        encode_pairs, sequences_of, _pair_places, _pair_tensors, _pair_facts, _pair_metrics
    ),
    "list": Kind(
        encode_rankings,
        _ranking_sequences,
        _ranking_places,
        _ranking_tensors,
        _ranking_facts,
        _ranking_metrics,
    ),
    "unpaired": Kind(
        encode_judgements,
        _judged_sequences,
        _judged_places,
        _judged_tensors,
        _judged_facts,
        _judged_metrics,
    ),
}
"""By the kind of the loss."""
