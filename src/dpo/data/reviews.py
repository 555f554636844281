"""Labelled reviews, and the passages they are cut into: a beginning to go on from, and the rest.

What belongs to one review stays together: a review is in one part only, by a hash of its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo.data.files import Record, printable
from dpo.data.rows import DemonstrationRow
from dpo.data.sources import Source, load_records
from dpo.data.split import prompt_digest
from dpo.errors import InputError

_LINE_BREAK = re.compile(r"<br\s*/?>")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Review:
    """A text, and whether it was labelled positive."""

    text: str
    """Words with one space between them."""
    positive: bool
    source: str = ""


def load_reviews(
    path: Source | Sequence[Source],
    *,
    text: str = "text",
    label: str = "label",
    positive: str = "pos",
    split: str | None = None,
    revision: str | None = None,
) -> tuple[list[Review], str]:
    """Every review of a source, and the source's digest.

    Args:
        text, label: the columns.
        positive: the label of a positive review; the other ones have one other label. Numbers are
            compared as they are written.

    Raises:
        InputError: there is no such source, a row has no text or label, or the labels are not two.
    """
    records, sha256 = load_records(path, split=split, revision=revision)
    texts = [_text(record, text, label) for record in records]
    labels = [str(record.values[label]) for record in records]
    found = sorted({*labels})
    if len(found) != 2 or positive not in found:
        raise InputError(
            f"data.positive: expected {positive!r} and one other label in the column {label!r}, "
            f"found {', '.join(printable(name) for name in found[:5])}."
        )
    reviews = [
        Review(one, name == positive, record.source)
        for one, name, record in zip(texts, labels, records, strict=True)
    ]
    return reviews, sha256


def _text(record: Record, text: str, label: str) -> str:
    for name in (text, label):
        if record.values.get(name) is None:
            columns = ", ".join(printable(column) for column in record.values)
            raise InputError(
                f"{record.source}: {name!r} is missing; every review needs {text} and {label} "
                f"(found: {columns or 'nothing'})."
            )
    value = record.values[text]
    if not isinstance(value, str):
        raise InputError(f"{record.source}: {text!r} is {type(value).__name__}, expected text.")
    return " ".join(_LINE_BREAK.sub(" ", value).split())


# -- parts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReviewParts:
    """Reviews for three purposes, none of them for two."""

    classifier: list[Review]
    """Its labels are learnt from."""
    model: list[Review]
    """The language model and its prompts."""
    held_out: list[Review]
    """Measured on."""


def split_reviews(
    reviews: Iterable[Review], *, classifier_share: float, held_out_share: float
) -> ReviewParts:
    """Three parts of about these shares, the model's the rest. A review's part depends on its own
    text alone, up to case and white space, so that copies stay together.

    Raises:
        InputError: a part is empty that has a share.
    """
    parts = ReviewParts([], [], [])
    for review in reviews:
        rank = prompt_digest(review.text) / 2**64
        if rank < classifier_share:
            parts.classifier.append(review)
        elif rank < 1 - held_out_share:
            parts.model.append(review)
        else:
            parts.held_out.append(review)
    if not (parts.model and parts.held_out) or (classifier_share and not parts.classifier):
        raise InputError(
            f"data: {len(parts.classifier)} reviews for the classifier, {len(parts.model)} for the "
            f"model and {len(parts.held_out)} held out; every part needs some."
        )
    return parts


# -- passages ------------------------------------------------------------------------------------


def passages(text: str, *, min_words: int, max_words: int) -> list[str]:
    """Whole sentences in a row, as many as fit into `max_words`.

    A longer sentence is left out, and so is a passage of fewer than `min_words`.

    >>> passages("One two. Three four five. Six seven eight nine. Ten.", min_words=2, max_words=5)
    ['One two. Three four five.', 'Six seven eight nine. Ten.']
    """
    found: list[list[str]] = [[]]
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        if len(found[-1]) + len(words) > max_words:
            found.append([])
        if len(words) <= max_words:
            found[-1] += words
    return [" ".join(words) for words in found if len(words) >= min_words]


def labelled_passages(
    reviews: Iterable[Review], *, min_words: int, max_words: int, most: int | None
) -> list[tuple[str, bool]]:
    """Passages with the labels of their reviews; of each review the first `most`."""
    return [
        (passage, review.positive)
        for review in reviews
        for passage in passages(review.text, min_words=min_words, max_words=max_words)[:most]
    ]


def beginning_and_rest(passage: str, num_words: int) -> tuple[str, str]:
    """The first words, and what follows them, with the space before it.

    >>> beginning_and_rest("a film that is good", 2)
    ('a film', ' that is good')
    """
    words = passage.split()
    return " ".join(words[:num_words]), "".join(f" {word}" for word in words[num_words:])


def as_demonstrations(
    texts: Iterable[str], *, prefix_words: tuple[int, int], seed: int
) -> list[DemonstrationRow]:
    """Each passage as a prompt, its first words, and a response, the rest.

    Args:
        prefix_words: fewest and most words of a prompt; each number in between is as likely.
    """
    draws = np.random.default_rng(seed)
    fewest, most = prefix_words
    return [
        DemonstrationRow(*beginning_and_rest(text, int(draws.integers(fewest, most + 1))))
        for text in texts
    ]
