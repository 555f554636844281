"""Pairs of token sequences in a store: tokenised once, the very pairs that are made in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo.data.pairs import EncodedPair, Losses, encode_each
from dpo.data.store import Facts, Mapped, View, made, store_name, writing
from dpo.data.stored_rows import StoredRows
from dpo.data.tokenize import Encoder, TokenSequence

SCHEMA = pa.schema(
    [
        ("prompt", pa.large_list(pa.int32())),
        ("chosen", pa.large_list(pa.int32())),
        ("rejected", pa.large_list(pa.int32())),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
        ("source", pa.string()),
        ("subset", pa.string()),
    ]
)
"""The prompt's tokens stand once for both responses."""

PAIRS = "pairs.arrow"


class StoredPairs(Mapped[EncodedPair]):
    """The pairs of one side of the split, as tokens."""

    @property
    def sequences(self) -> StoredSequences:
        """All chosen, then all rejected responses, (2B,)."""
        return StoredSequences(self)

    def _open(self, batch: Any) -> Any:
        lists = [_views(batch.column(name)) for name in ("prompt", "chosen", "rejected")]
        return lists, batch.columns[3:]

    def _row(self, columns: Any, number: int) -> EncodedPair:
        lists, others = columns
        prompt, chosen, rejected = (
            tuple(values[starts[number] : starts[number + 1]].tolist()) for starts, values in lists
        )
        chosen_score, rejected_score, source, subset = (c[number].as_py() for c in others)
        return EncodedPair(
            TokenSequence(prompt + chosen, len(prompt)),
            TokenSequence(prompt + rejected, len(prompt)),
            source,
            None if chosen_score is None else (chosen_score, rejected_score),
            subset,
        )


def _views(lists: Any) -> tuple[Any, Any]:
    """Where the lists start, and the items of all of them, as numpy arrays of the mapped bytes."""
    return lists.offsets.to_numpy(), lists.values.to_numpy()


class StoredSequences(View[TokenSequence]):
    """Token sequences of stored pairs, read when they are asked for."""

    def __init__(self, pairs: StoredPairs) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    def _at(self, place: int) -> TokenSequence:
        side, row = divmod(place, len(self._pairs))
        return self._pairs[row].sequences[side]


class Joined(View[TokenSequence]):
    """Some sequences, and then others; nothing is copied."""

    def __init__(self, first: Sequence[TokenSequence], second: Sequence[TokenSequence]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def _at(self, place: int) -> TokenSequence:
        num_first = len(self._first)
        return self._first[place] if place < num_first else self._second[place - num_first]


def stored_pairs(
    encoder: Encoder,
    rows: StoredRows,
    *,
    tokenizer_sha256: str,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[StoredPairs, Losses, bool]:
    """The rows as tokens, from the store beside theirs, which is made where it is not there; what
    they lost; and whether it was there.

    Raises:
        StorageError: the disk is full, read-only or gone; nothing half-made is left.
    """
    content = {
        "rows": rows.identity,
        "tokenizer": tokenizer_sha256,
        "template": encoder.template.text or encoder.tokenizer.chat_template,
        "max_length": encoder.max_length,
        "libraries": [version("transformers"), version("tokenizers")],
    }
    folder = rows.cache / "tokens" / store_name(["tokens", content])

    def make(temporary: Path) -> Facts:
        losses = Losses()
        with writing(temporary / PAIRS, SCHEMA) as append:
            for pair in encode_each(encoder, rows, losses):
                append(_columns(pair))
                progress(1)
        return asdict(losses)

    facts, found = made(folder, make)
    return StoredPairs(folder / PAIRS), Losses(**facts), found


def _columns(pair: EncodedPair) -> dict[str, Any]:
    start = pair.chosen.prompt_length
    chosen_score, rejected_score = pair.scores or (None, None)
    return {
        "prompt": pair.chosen.ids[:start],
        "chosen": pair.chosen.ids[start:],
        "rejected": pair.rejected.ids[start:],
        "chosen_score": chosen_score,
        "rejected_score": rejected_score,
        "source": pair.source,
        "subset": pair.subset,
    }
