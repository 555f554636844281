"""What is in the data, before any of it is trained on: counts, overlaps, lengths, and a preview.

`audit` counts, `render` and `preview` show. What they show of the data is never markup, and its
control characters are written out, so that no row can drive the terminal.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dpo.data.rows import PreferenceRow, Prompt, RankedRow, Row, UnpairedRow
from dpo.data.shapes import kind_of_row
from dpo.data.split import near_key, overlap, prompt_key
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
    prompts as they stand, `num_distinct_prompts` up to case and white space. A sequence is a prompt
    with one of its responses.
    """

    num_rows: int
    num_rows_by_kind: dict[str, int]
    num_unique_prompts: int
    num_distinct_prompts: int
    num_duplicate_rows: int
    num_identical_pairs: int
    num_responses: int
    num_empty_responses: int
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
    return (("response", row.response),)


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
    responses = [(row.prompt, text) for row in rows for _, text in responses_of(row)]
    sequence_lengths: list[int] = []
    lengths = _character_lengths(rows)
    if encode is not None:
        token_lengths, sequence_lengths = _token_lengths(rows, encode)
        lengths += token_lengths
    num_too_long = None
    if encode is not None and max_length is not None:
        num_too_long = sum(length > max_length for length in sequence_lengths)
    return Audit(
        num_rows=len(rows),
        num_rows_by_kind=dict(Counter(kind_of_row(row) for row in rows)),
        num_unique_prompts=len({prompt_key(row.prompt) for row in rows}),
        num_distinct_prompts=len({near_key(row.prompt) for row in rows}),
        num_duplicate_rows=len(rows) - len(set(rows)),
        num_identical_pairs=drop_identical(rows)[1],
        num_responses=len(responses),
        num_empty_responses=sum(not text.strip() for _, text in responses),
        num_overlapping_prompts=None if test_rows is None else len(overlap(rows, test_rows)),
        lengths=tuple(lengths),
        max_length=max_length,
        num_too_long=num_too_long,
        num_merged_boundaries=None if merges is None else sum(merges(*pair) for pair in responses),
    )


def drop_identical(rows: Sequence[R]) -> tuple[tuple[R, ...], int]:
    """The rows without the pairs whose chosen equals their rejected, and how many those are.

    Such a pair has margin 0 and gradient 0 whatever the policy does; it only dilutes the batch.
    """
    kept = tuple(
        row for row in rows if not isinstance(row, PreferenceRow) or row.chosen != row.rejected
    )
    return kept, len(rows) - len(kept)


def _character_lengths(rows: Sequence[Row]) -> list[Lengths]:
    measured: dict[str, list[int]] = {}
    for row in rows:
        measured.setdefault("prompt", []).append(_num_characters(row.prompt))
        for part, text in responses_of(row):
            measured.setdefault(part, []).append(len(text))
    return [_lengths(part, "characters", values) for part, values in measured.items()]


def _num_characters(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(message.content) for message in prompt)


def _token_lengths(rows: Sequence[Row], encode: Encode) -> tuple[list[Lengths], list[int]]:
    """Lengths of the parts, and of every sequence (a prompt with one response) as a whole."""
    measured: dict[str, list[int]] = {}
    whole: list[int] = []
    for row in rows:
        responses = responses_of(row)
        sequences = encode(row.prompt, [text for _, text in responses]).sequences
        measured.setdefault("prompt", []).append(sequences[0].prompt_length)
        for (part, _), sequence in zip(responses, sequences, strict=True):
            measured.setdefault(part, []).append(sequence.num_scored)
            whole.append(len(sequence))
    return [_lengths(part, "tokens", values) for part, values in measured.items()], whole


def _lengths(part: str, unit: str, values: Iterable[int]) -> Lengths:
    ordered = sorted(values)
    ranks = [max(1, -(-percent * len(ordered) // 100)) for percent in PERCENTILES]
    return Lengths(part, unit, len(ordered), tuple(ordered[rank - 1] for rank in ranks))


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
        f"{audit.num_identical_pairs:,} pairs have chosen equal to rejected (no gradient)",
        f"{audit.num_empty_responses:,} of {audit.num_responses:,} responses are empty",
    ]
    if audit.num_overlapping_prompts is not None:
        lines.append(f"{audit.num_overlapping_prompts:,} test prompts are among these rows")
    if audit.num_too_long is not None:
        lines.append(
            f"{audit.num_too_long:,} of {audit.num_responses:,} sequences exceed "
            f"{audit.max_length:,} tokens and will be cut"
        )
    if audit.num_merged_boundaries is not None:
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
        sequences = encode(row.prompt, [text for _, text in responses]).sequences
        blocks.append(Text(visible(row.source or f"row {number}"), style="bold"))
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
