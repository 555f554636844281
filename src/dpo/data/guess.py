"""Which of the user's columns may be meant by ours, where no row has a known shape."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dpo.data.shapes import SHAPES, Shape

USUAL_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "context", "post", "problem", "user"),
    "chosen": ("preferred", "accepted", "better", "winner", "win", "positive", "good", "best"),
    "rejected": ("dispreferred", "refused", "worse", "loser", "lose", "negative", "bad", "worst"),
    "chosen_score": ("score_chosen", "chosen_rating", "rating_chosen"),
    "rejected_score": ("score_rejected", "rejected_rating", "rating_rejected"),
    "responses": ("answers", "completions", "candidates", "outputs", "generations"),
    "scores": ("ratings", "rewards", "rating"),
    "response": ("answer", "output", "reply", "target", "assistant", "solution"),
    "completion": ("response", "answer", "output", "reply", "generation"),
    "label": ("desirable", "liked", "is_good", "thumbs_up", "accepted", "good", "feedback"),
    "messages": ("conversation", "conversations", "dialogue", "dialog", "turns", "chat"),
    "subset": ("category", "source", "split", "domain"),
}
"""Names that others give to our columns, the likelier ones first."""


def guess_columns(columns: Sequence[str]) -> dict[str, str]:
    """Our names to the user's, by usual names, for the first shape whose columns can all be found;
    empty where there is none.

    >>> guess_columns(["id", "Question", "better answer", "worse answer"])
    {'prompt': 'Question', 'chosen': 'better answer', 'rejected': 'worse answer'}
    """
    for shape in SHAPES:
        found = _for_shape(shape, columns)
        if found is not None:
            return {ours: theirs for ours, theirs in found.items() if ours != theirs}
    return {}


def _for_shape(shape: Shape, columns: Sequence[str]) -> dict[str, str] | None:
    """A different column for each that the shape needs, or None."""
    found: dict[str, str] = {}
    for ours in shape.required:
        left = [column for column in columns if column not in found.values()]
        theirs = next((column for column in left if column == ours), None) or _usual(ours, left)
        if theirs is None:
            return None
        found[ours] = theirs
    return found


def _usual(ours: str, columns: Sequence[str]) -> str | None:
    """The column that bears one of our column's usual names, whole or as one of its words."""
    names = (ours, *USUAL_NAMES.get(ours, ()))
    plain = {re.sub(r"\W+", "_", column.lower()): column for column in columns}
    for name in names:
        if name in plain:
            return plain[name]
    return next(
        (plain[p] for name in names for p in plain if name in p.split("_")),
        None,
    )
