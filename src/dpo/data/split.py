"""Train and test by prompt, never by row: what a model is tested on, it has not seen.

Two rows of one prompt on two sides are a leak. So the split is decided per prompt, from the set of
prompts and the seed alone; how the rows are ordered, and how many a prompt has, does not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from dpo.data.rows import Prompt, Row
from dpo.errors import InputError

R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True)
class Split(Generic[R]):
    """Rows to train on and rows to test on, each in the order that they had."""

    train: tuple[R, ...]
    test: tuple[R, ...]


def prompt_key(prompt: Prompt) -> str:
    """Canonical ASCII text of a prompt: no two prompts share one, and no text is a conversation's.

    >>> from dpo.data.rows import Message
    >>> prompt_key("Why?"), prompt_key((Message("user", "Why?"),))
    ('"Why?"', '[["user", "Why?"]]')
    """
    return _key(prompt, lambda text: text)


def near_key(prompt: Prompt) -> str:
    """The key of a prompt up to case and white space: near duplicates share it.

    >>> near_key(" What  is DPO?\\n")
    '"what is dpo?"'
    """
    return _key(prompt, lambda text: " ".join(text.casefold().split()))


def _key(prompt: Prompt, canonical: Callable[[str], str]) -> str:
    if isinstance(prompt, str):
        return json.dumps(canonical(prompt))
    return json.dumps([[message.role, canonical(message.content)] for message in prompt])


def prompt_digest(prompt: Prompt) -> int:
    """The first 8 bytes of the SHA-256 of the prompt's near key, an unsigned 64-bit integer."""
    return int.from_bytes(hashlib.sha256(near_key(prompt).encode()).digest()[:8], "big")


def split_by_prompt(rows: Sequence[R], *, test_fraction: float, seed: int) -> Split[R]:
    """Hold out about that fraction of the prompts (at least one, never all) with all their rows.

    Prompts that differ only in case or white space count as one. Each has a rank in [0, 1), the
    SHA-256 of seed and key, and is held out where it is below the fraction. So the side of a prompt
    does not depend on the other prompts: a demonstration set and a preference set that share
    prompts are split alike, and what DPO is tested on, SFT has not seen.

    Raises:
        InputError: The fraction is not between 0 and 1, or there are fewer than two prompts.
    """
    if not 0 < test_fraction < 1:  # NaN too
        raise InputError(f"test_fraction: expected between 0 and 1, got {test_fraction}.")
    keys = [near_key(row.prompt) for row in rows]
    ranks = {key: _rank(seed, key) for key in keys}
    if len(ranks) < 2:
        raise InputError(
            f"Expected at least 2 different prompts, one for each side of the split, "
            f"got {len(ranks)}."
        )
    ordered = sorted(ranks, key=lambda key: (ranks[key], key))
    num_test = sum(rank < test_fraction for rank in ranks.values())
    held_out = set(ordered[: min(max(1, num_test), len(ordered) - 1)])
    return Split(
        train=tuple(row for row, key in zip(rows, keys, strict=True) if key not in held_out),
        test=tuple(row for row, key in zip(rows, keys, strict=True) if key in held_out),
    )


def _rank(seed: int, key: str) -> float:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def overlap(train: Iterable[Row], test: Iterable[Row]) -> tuple[Prompt, ...]:
    """The prompts of `test` that `train` has too, up to case and white space, each once."""
    trained_on = {near_key(row.prompt) for row in train}
    shared: dict[str, Prompt] = {}
    for row in test:
        key = near_key(row.prompt)
        if key in trained_on:
            shared.setdefault(key, row.prompt)
    return tuple(shared.values())
