"""Preference rows in a store, split by prompt: the very rows that the sources give in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo.data.audit import responses_of
from dpo.data.prompts import as_text
from dpo.data.rows import Message, PreferenceRow, Prompt, Row
from dpo.data.sources import Source, StreamedRows, each_pair, no_pair
from dpo.data.split import Sides, overlap
from dpo.data.store import Facts, Mapped, made, store_name, writing
from dpo.errors import InputError

SCHEMA = pa.schema(
    [
        ("prompt", pa.large_string()),
        ("chosen", pa.large_string()),
        ("rejected", pa.large_string()),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
        ("source", pa.string()),
        ("subset", pa.string()),
    ]
)
"""A conversation stands as JSON in `prompt`; scores are null where the data has none."""

TRAIN, TEST = "train.arrow", "test.arrow"


class StoredRows(Mapped[PreferenceRow]):
    """The pairs of one side of the split."""

    def __init__(self, store: Path, file: str, *, conversational: bool) -> None:
        super().__init__(store / file)
        self.cache = store.parent.parent
        """Where what is made of these rows is kept."""
        self.identity = f"{store.name}/{file}"
        """Equal identities are equal rows."""
        self._conversational = conversational

    def _open(self, batch: Any) -> Any:
        return batch.columns

    def _row(self, columns: Any, number: int) -> PreferenceRow:
        values = [column[number].as_py() for column in columns]
        prompt, chosen, rejected, chosen_score, rejected_score, source, subset = values
        return PreferenceRow(
            _conversation(prompt) if self._conversational else prompt,
            chosen,
            rejected,
            source,
            None if chosen_score is None else (chosen_score, rejected_score),
            subset,
        )


def _conversation(text: str) -> Prompt:
    return tuple(Message(*message) for message in json.loads(text))


def _columns(row: PreferenceRow) -> dict[str, Any]:
    chosen_score, rejected_score = row.scores or (None, None)
    return {
        "prompt": row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt),
        "chosen": row.chosen,
        "rejected": row.rejected,
        "chosen_score": chosen_score,
        "rejected_score": rejected_score,
        "source": row.source,
        "subset": row.subset,
    }


@dataclass(frozen=True, slots=True)
class StoredSplit:
    """Both sides of a store."""

    train: StoredRows
    test: StoredRows
    facts: Facts
    found: bool
    """Whether it was there."""


def stored_preferences(
    cache: Path,
    path: Source | Sequence[Source],
    test_path: Source | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    revision: str | None = None,
    test_fraction: float,
    seed: int,
) -> StoredSplit:
    """Pairs to train on and held-out pairs, from a store in the folder `cache`; it is made where it
    is not there. Only some of them are ever in memory.

    Args:
        path: as `load_rows`, with `columns`, `split` and `revision`.
        test_path: held-out pairs that are a source of their own; else the pairs are split by
            prompt, as `split_by_prompt` does with `test_fraction` and `seed`.

    Raises:
        InputError: as `load_rows`, `as_pairs` and `split_by_prompt`; or a held-out prompt is in the
            training data too.
        StorageError: the disk is full, read-only or gone; nothing half-made is left.
    """
    rows = StreamedRows(path, columns=columns, split=split, revision=revision)
    test = None if test_path is None else StreamedRows(test_path, columns=columns)
    sides = [test_fraction, seed] if test is None else test.content
    folder = cache / "rows" / store_name(["rows", rows.content, sides])

    def make(temporary: Path) -> Facts:
        with (
            writing(temporary / TRAIN, SCHEMA) as to_train,
            writing(temporary / TEST, SCHEMA) as to_test,
        ):
            counts = _Counts()
            if test is None:
                prompts = (pair.prompt for pair in _pairs(rows))
                split_of = Sides.of(prompts, test_fraction=test_fraction, seed=seed)
                for pair in counts.each(_pairs(rows)):
                    append = to_test if split_of.held_out(pair.prompt) else to_train
                    append(_columns(pair))
            else:
                shared = overlap(_pairs(rows), _pairs(test))
                if shared:
                    raise prompts_on_both_sides(shared)
                for source, append in ((rows, to_train), (test, to_test)):
                    for pair in counts.each(_pairs(source)):
                        append(_columns(pair))
        return _facts(rows, test, counts)

    facts, found = made(folder, make)
    train, held_out = (
        StoredRows(folder, file, conversational=facts["conversational"]) for file in (TRAIN, TEST)
    )
    return StoredSplit(train, held_out, facts, found)


def _pairs(rows: Iterable[Row]) -> Iterator[PreferenceRow]:
    """The pairs of a source.

    Raises:
        InputError: there are none.
    """
    pair = None
    for pair in each_pair(rows):
        yield pair
    if pair is None:
        raise no_pair()


@dataclass
class _Counts:
    """What is counted of pairs as they pass."""

    num_pairs: list[int] = field(default_factory=list)
    """Of each source."""
    num_empty: int = 0
    conversational: bool = False

    def each(self, pairs: Iterable[PreferenceRow]) -> Iterator[PreferenceRow]:
        """The pairs of a source."""
        self.num_pairs.append(0)
        for pair in pairs:
            self.num_pairs[-1] += 1
            self.num_empty += sum(not text.strip() for _, text in responses_of(pair))
            self.conversational = not isinstance(pair.prompt, str)
            yield pair


def _facts(rows: StreamedRows, test: StreamedRows | None, counts: _Counts) -> Facts:
    """What the log says of a store, and what a run takes from it beside its pairs."""
    digest = rows.sha256
    if test is not None:
        digest = hashlib.sha256(f"{digest}{test.sha256}".encode()).hexdigest()
    return {
        "sources": [str(rows), *([] if test is None else [str(test)])],
        "shape": rows.shape,
        "conversational": counts.conversational,
        "sha256": digest,
        "num_rows": rows.num_rows,
        "num_used": counts.num_pairs[0],
        "num_empty": counts.num_empty,
        "num_responses": 2 * sum(counts.num_pairs),
    }


def prompts_on_both_sides(shared: tuple[Prompt, ...]) -> InputError:
    """What is said where held-out prompts are trained on."""
    return InputError(
        f"data.test: {len(shared)} of its prompts are in the training data too, e.g. "
        f"{as_text(shared[0])!r:.80}; remove them from one side."
    )
