"""What is in the data, before any of it is trained on: counts, overlaps, lengths, and a preview.

`audit` counts, `render` and `preview` show. What they show of the data is never markup, and its
control characters are written out, so that no row can drive the terminal.
"""

from __future__ import annotations

import json
import math
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dpo.data.rows import (
    DemonstrationRow,
    PreferenceRow,
    Prompt,
    PromptRow,
    RankedRow,
    Row,
    UnpairedRow,
)
from dpo.data.shapes import kind_of_row
from dpo.data.split import digest64, prompt_digest, prompt_digests, prompt_key
from dpo.data.tokenize import EncodedRow, TokenSequence

R = TypeVar("R", bound=Row)

Encode = Callable[[Prompt, Sequence[str]], EncodedRow]
"""Tokenises a prompt with its responses: `Encoder.encode`."""

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
"""Which lengths are shown; 0 is the shortest and 100 the longest."""

_SCORED, _GIVEN, _BOUNDARY = "bold green", "dim", "blue"


# -- counting ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of one part of the rows (`prompt`, `chosen`), at `PERCENTILES`.

    By nearest rank: each is the length of an actual part, the shortest that at least that percent
    of the parts do not exceed.
    """

    part: str
    unit: str
    num_parts: int
    at_percentiles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """What `audit` counts. None means that it could not be counted with what was given.

    `num_duplicate_rows` counts the rows that equal an earlier one; `num_unique_prompts` takes
    prompts as they stand, `num_distinct_prompts` up to case and white space; `num_desirable`, the
    labels of unpaired rows that are true; `num_repeated_prompts`, the responses that begin with
    their own prompt. A sequence is a prompt with one of its responses.
    """

    num_rows: int
    num_rows_by_kind: dict[str, int]
    num_unique_prompts: int
    num_distinct_prompts: int
    num_duplicate_rows: int
    num_identical_pairs: int
    num_desirable: int | None
    num_responses: int
    num_empty_responses: int
    num_repeated_prompts: int
    num_overlapping_prompts: int | None
    lengths: tuple[Lengths, ...]
    max_length: int | None
    num_too_long: int | None
    num_merged_boundaries: int | None


def responses_of(row: Row) -> tuple[tuple[str, str], ...]:
    """The responses of a row, each with the name of its field."""
    if isinstance(row, PreferenceRow):
        return (("chosen", row.chosen), ("rejected", row.rejected))
    if isinstance(row, RankedRow):
        return tuple(("response", response) for response in row.responses)
    if isinstance(row, UnpairedRow):
        return (("completion", row.completion),)
    return () if isinstance(row, PromptRow) else (("response", row.response),)


def audit(
    rows: Sequence[Row],
    *,
    encode: Encode | None = None,
    merges: Callable[[Prompt, str], bool] | None = None,
    test_rows: Sequence[Row] | None = None,
    max_length: int | None = None,
) -> Audit:
    """Count what may be wrong with the rows, and measure them.

    Args:
        rows: Any rows.
        encode: Tokenises whole, so that lengths are those before anything is cut.
        merges: Whether one tokenisation would join characters of prompt and response in a token:
            `Encoder.merges_across_boundary`.
        test_rows: Rows that should share no prompt with `rows`.
        max_length: Sequences of more tokens will be cut; counted where `encode` is given.
    """
    tally = _Tally(encode, merges, max_length)
    for row in rows:
        tally.add(row)
    shared = None if test_rows is None else _num_shared(tally.prompts, test_rows)
    return Audit(
        num_rows=len(rows),
        num_rows_by_kind=dict(tally.kinds),
        num_unique_prompts=_num_distinct(tally.exact_prompts),
        num_distinct_prompts=_num_distinct(tally.prompts),
        num_duplicate_rows=len(rows) - _num_distinct(tally.rows),
        num_identical_pairs=tally.num_identical,
        num_desirable=tally.num_desirable if "unpaired" in tally.kinds else None,
        num_responses=tally.num_responses,
        num_empty_responses=tally.num_empty,
        num_repeated_prompts=tally.num_repeated,
        num_overlapping_prompts=shared,
        lengths=(*_lengths("characters", tally.characters), *_lengths("tokens", tally.tokens)),
        max_length=max_length,
        num_too_long=None if encode is None or max_length is None else tally.num_too_long,
        num_merged_boundaries=None if merges is None else tally.num_merged,
    )


class _Tally:
    """Counts of rows as they pass. Of each row it keeps a few numbers of 8 bytes: digests, by which
    different rows and prompts are told apart, and lengths.
    """

    def __init__(
        self,
        encode: Encode | None,
        merges: Callable[[Prompt, str], bool] | None,
        max_length: int | None,
    ) -> None:
        self.encode, self.merges = encode, merges
        self.longest = math.inf if max_length is None else max_length
        self.kinds: Counter[str] = Counter()
        self.rows, self.exact_prompts, self.prompts = array("Q"), array("Q"), array("Q")
        self.characters: dict[str, array[int]] = {}
        self.tokens: dict[str, array[int]] = {}
        self.num_identical = self.num_desirable = 0
        self.num_responses = self.num_empty = self.num_repeated = 0
        self.num_too_long = self.num_merged = 0

    def add(self, row: Row) -> None:
        responses = responses_of(row)
        texts = [text for _, text in responses]
        kind = kind_of_row(row)
        self.kinds[kind] += 1
        key = prompt_key(row.prompt)
        self.exact_prompts.append(digest64(key.encode()))
        self.prompts.append(prompt_digest(row.prompt))
        content = json.dumps([kind, key, texts, _judgement(row)])
        self.rows.append(digest64(content.encode()))
        self.num_identical += _is_identical(row)
        self.num_desirable += isinstance(row, UnpairedRow) and row.label
        self.num_responses += len(texts)
        self.num_empty += sum(not text.strip() for text in texts)
        self.num_repeated += sum(_repeats(row.prompt, text) for text in texts)
        _append(self.characters, "prompt", _num_characters(row.prompt))
        for part, text in responses:
            _append(self.characters, part, len(text))
        if self.merges is not None:
            self.num_merged += sum(self.merges(row.prompt, text) for text in texts)
        if self.encode is not None:
            sequences = self.encode(row.prompt, texts or [""]).sequences
            _append(self.tokens, "prompt", sequences[0].prompt_length)
            for (part, _), sequence in zip(responses, sequences, strict=bool(texts)):
                _append(self.tokens, part, sequence.num_scored)
                self.num_too_long += len(sequence) > self.longest


def _append(measured: dict[str, array[int]], part: str, length: int) -> None:
    measured.setdefault(part, array("i")).append(length)


def _judgement(row: Row) -> object:
    """What tells rows of equal texts apart: a label, or scores; 0.0 and -0.0 are equal."""
    if isinstance(row, UnpairedRow):
        return row.label
    if isinstance(row, DemonstrationRow | PromptRow) or row.scores is None:
        return None
    return [score + 0.0 for score in row.scores]


def _num_distinct(digests: array[int]) -> int:
    return len(np.unique(np.frombuffer(digests, np.uint64)))


def _num_shared(prompts: array[int], test_rows: Iterable[Row]) -> int:
    """How many different prompts of the test rows are among those, given by their digests."""
    of_test = prompt_digests(row.prompt for row in test_rows)
    return int(np.isin(of_test, np.frombuffer(prompts, np.uint64)).sum())


def drop_identical(rows: Sequence[R]) -> tuple[tuple[R, ...], int]:
    """The rows without the pairs whose chosen equals their rejected, and how many those are.

    Such a pair has margin 0 and gradient 0 whatever the policy does; it only dilutes the batch.
    """
    kept = tuple(row for row in rows if not _is_identical(row))
    return kept, len(rows) - len(kept)


def _is_identical(row: Row) -> bool:
    return isinstance(row, PreferenceRow) and row.chosen == row.rejected


def _repeats(prompt: Prompt, response: str) -> bool:
    """Whether a response begins with the prompt that it follows, which a model would read twice."""
    return isinstance(prompt, str) and response.lstrip().startswith(prompt.strip())


def _num_characters(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(message.content) for message in prompt)


def _lengths(unit: str, measured: Mapping[str, array[int]]) -> Iterator[Lengths]:
    for part, values in measured.items():
        ordered = np.sort(np.frombuffer(values, np.int32))
        ranks = [max(1, -(-percent * len(ordered) // 100)) for percent in PERCENTILES]
        at_percentiles = tuple(int(ordered[rank - 1]) for rank in ranks)
        yield Lengths(part, unit, len(ordered), at_percentiles)


# -- showing -----------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Text that cannot drive a terminal: controls, and marks that reorder text, are written out.

    >>> visible("a\\tb\\x1b[31m")
    'a\\\\tb\\\\x1b[31m'
    """
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in hidden else c for c in text)


def render(audit: Audit) -> Group:
    """The audit for the terminal: a line per count, and a table of lengths."""
    return Group(*(Text(line) for line in _count_lines(audit)), _length_table(audit))


def _count_lines(audit: Audit) -> list[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in audit.num_rows_by_kind.items())
    lines = [
        f"{audit.num_rows:,} rows ({kinds})",
        f"{audit.num_unique_prompts:,} different prompts, {audit.num_distinct_prompts:,} "
        "up to case and white space",
        f"{audit.num_duplicate_rows:,} rows equal an earlier one",
    ]
    if "preference" in audit.num_rows_by_kind:
        lines.append(
            f"{audit.num_identical_pairs:,} pairs have chosen equal to rejected; no gradient"
        )
    if audit.num_desirable is not None:
        lines.append(f"{audit.num_desirable:,} of {audit.num_responses:,} responses are desirable")
    if audit.num_responses:
        empty = f"{audit.num_empty_responses:,} of {audit.num_responses:,} responses"
        lines.append(f"{empty} are empty")
    if audit.num_repeated_prompts:
        lines.append(
            f"{audit.num_repeated_prompts:,} of {audit.num_responses:,} responses begin with their "
            "prompt, which comes before them anyway; leave it out of them"
        )
    if audit.num_overlapping_prompts is not None:
        lines.append(f"{audit.num_overlapping_prompts:,} test prompts are among these rows")
    if audit.num_too_long is not None and audit.num_responses:
        lines.append(
            f"{audit.num_too_long:,} of {audit.num_responses:,} sequences exceed "
            f"{audit.max_length:,} tokens and will be cut"
        )
    if audit.num_merged_boundaries is not None and audit.num_responses:
        lines.append(
            f"{audit.num_merged_boundaries:,} of {audit.num_responses:,} sequences have a boundary "
            "that one tokenisation would merge (they are tokenised apart)"
        )
    return lines


def _length_table(audit: Audit) -> Table:
    names = {0: "min", 100: "max"}
    table = Table("part", "unit", title="Lengths at percentiles")
    for percent in PERCENTILES:
        table.add_column(names.get(percent, f"{percent}%"), justify="right")
    for lengths in audit.lengths:
        table.add_row(lengths.part, lengths.unit, *(f"{n:,}" for n in lengths.at_percentiles))
    return table


def preview(
    rows: Sequence[Row], num_rows: int, *, encode: Encode, token_text: Callable[[int], str]
) -> Group:
    """The first rows as a model reads them: every token, and which of them are scored.

    Prompt tokens are dim, scored tokens bold green with the end token among them; a blue bar stands
    between tokens. `token_text` gives the text of one id.
    """
    blocks: list[Text] = []
    for number, row in enumerate(rows[:num_rows], 1):
        responses = responses_of(row)
        sequences = encode(row.prompt, [text for _, text in responses] or [""]).sequences
        blocks.append(Text(visible(row.source or f"row {number}"), style="bold"))
        if not responses:
            given = sequences[0].ids[: sequences[0].prompt_length]
            heading = f"prompt: {len(given)} tokens"
            alone = TokenSequence(given, len(given))
            blocks += [Text(heading, style="italic"), _marked(alone, token_text)]
            continue
        for (part, _), sequence in zip(responses, sequences, strict=True):
            num_given = sequence.prompt_length
            heading = f"{part}: {num_given} prompt tokens, {sequence.num_scored} scored"
            blocks += [Text(heading, style="italic"), _marked(sequence, token_text)]
    return Group(*blocks)


def _marked(sequence: TokenSequence, token_text: Callable[[int], str]) -> Text:
    marked = Text()
    for position, token in enumerate(sequence.ids):
        if position:
            marked.append("|", style=_BOUNDARY)
        style = _SCORED if position >= sequence.prompt_length else _GIVEN
        marked.append(visible(token_text(token)), style=style)
    return marked
