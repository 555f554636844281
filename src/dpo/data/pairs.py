"""Preference pairs as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dpo.data.rows import PreferenceRow
from dpo.data.tokenize import EncodedRow, Encoder, TokenSequence


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A chosen and a rejected response after the same prompt tokens."""

    chosen: TokenSequence
    rejected: TokenSequence
    source: str
    scores: tuple[float, float] | None = None
    subset: str = ""

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        return self.chosen, self.rejected


@dataclass
class Losses:
    """What rows lose when they become tokens: how many are encoded, lose a part, or are dropped."""

    num_rows: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    num_dropped: int = 0

    def count(self, row: EncodedRow) -> None:
        self.num_rows += 1
        self.prompts_cut += row.prompt_truncated
        self.responses_cut += row.responses_truncated


def encode_each(
    encoder: Encoder, rows: Iterable[PreferenceRow], losses: Losses
) -> Iterator[EncodedPair]:
    """Pairs as tokens, one by one; those whose two responses are the same tokens teach nothing and
    are dropped. Cuts and drops are added to `losses`.
    """
    for row in rows:
        encoded = encoder.encode(row.prompt, [row.chosen, row.rejected])
        losses.count(encoded)
        chosen, rejected = encoded.sequences
        if chosen == rejected:
            losses.num_dropped += 1
        else:
            yield EncodedPair(chosen, rejected, row.source, row.scores, row.subset)
