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

import numpy as np
from numpy.typing import NDArray

from dpo.data.rows import Prompt, Row
from dpo.errors import InputError

R = TypeVar("R", bound=Row)

Digests = NDArray[np.uint64]


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
    """The 64-bit digest of the prompt's near key."""
    return digest64(near_key(prompt).encode())


def digest64(data: bytes) -> int:
    """The first 8 bytes of the SHA-256, an unsigned 64-bit integer."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


Place = tuple[float, str]
"""Where a prompt stands among all: its rank in [0, 1), and its key."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Which prompts are held out: those below the fraction; but at least one, and never all."""

    seed: int
    test_fraction: float
    first: Place
    last: Place

    @classmethod
    def of(cls, prompts: Iterable[Prompt], *, test_fraction: float, seed: int) -> Sides:
        """The sides of a set of prompts, in one pass that remembers two of them.

        Raises:
            InputError: the fraction is not between 0 and 1, or there are fewer than two prompts.
        """
        if not 0 < test_fraction < 1:  # NaN too
            raise InputError(f"test_fraction: expected between 0 and 1, got {test_fraction}.")
        first = last = None
        for prompt in prompts:
            place = _place(seed, prompt)
            first = place if first is None else min(first, place)
            last = place if last is None else max(last, place)
        if first is None or last is None or first == last:
            raise InputError(
                f"Expected at least 2 different prompts, one for each side of the split, "
                f"got {0 if first is None else 1}."
            )
        return cls(seed, test_fraction, first, last)

    def held_out(self, prompt: Prompt) -> bool:
        """Whether a prompt, one of those, is held out."""
        place = _place(self.seed, prompt)
        if self.first[0] >= self.test_fraction:
            return place == self.first
        if self.last[0] < self.test_fraction:
            return place != self.last
        return place[0] < self.test_fraction


def split_by_prompt(rows: Sequence[R], *, test_fraction: float, seed: int) -> Split[R]:
    """Hold out about that fraction of the prompts (at least one, never all) with all their rows.

    Prompts that differ only in case or white space count as one. Each has a rank in [0, 1), the
    SHA-256 of seed and key, and is held out where it is below the fraction. So the side of a prompt
    does not depend on the other prompts: a demonstration set and a preference set that share
    prompts are split alike, and what DPO is tested on, SFT has not seen.

    Raises:
        InputError: The fraction is not between 0 and 1, or there are fewer than two prompts.
    """
    sides = Sides.of((row.prompt for row in rows), test_fraction=test_fraction, seed=seed)
    held_out = [sides.held_out(row.prompt) for row in rows]
    return Split(
        train=tuple(row for row, out in zip(rows, held_out, strict=True) if not out),
        test=tuple(row for row, out in zip(rows, held_out, strict=True) if out),
    )


def _place(seed: int, prompt: Prompt) -> Place:
    key = near_key(prompt)
    return digest64(f"{seed}:{key}".encode()) / 2**64, key


def overlap(train: Iterable[Row], test: Iterable[Row]) -> tuple[Prompt, ...]:
    """The prompts of `test` that `train` has too, up to case and white space, each once."""
    return shared_prompts(prompt_digests(row.prompt for row in train), test)


def shared_prompts(trained_on: Digests, test: Iterable[Row]) -> tuple[Prompt, ...]:
    """The prompts of `test` with a digest among those of `prompt_digests`, each once."""
    shared: dict[int, Prompt] = {}
    for row in test:
        digest = prompt_digest(row.prompt)
        if contains(trained_on, digest):
            shared.setdefault(digest, row.prompt)
    return tuple(shared.values())


def prompt_digests(prompts: Iterable[Prompt]) -> Digests:
    """The digests of the different prompts, in order: 8 bytes for each."""
    return np.unique(np.fromiter(map(prompt_digest, prompts), np.uint64))


def contains(digests: Digests, digest: int) -> bool:
    """Whether a digest is among others that are in order."""
    place = int(np.searchsorted(digests, np.uint64(digest)))
    return place < len(digests) and int(digests[place]) == digest
