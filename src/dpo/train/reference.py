"""Reference log-probabilities: computed once before training, cached by content."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dpo.atomic import replace_file, storage_errors
from dpo.data.split import digest64
from dpo.data.store import cache_folder as cache_folder  # "as": for others to import from here
from dpo.data.tokenize import TokenSequence
from dpo.models.load import weights_digest
from dpo.models.parts import device_of, is_sharded, settle
from dpo.models.scoring import response_logps, score_groups
from dpo.train import ranks

Integers = NDArray[np.int32] | NDArray[np.int64]

SCORING_VERSION = 2
"""Counts changes of the scoring code that change its values; a part of every cache key."""

CHUNK = 256
"""Sequences scored between two reports of progress."""

KEEP_SECONDS = 30.0
"""Between two writings of what is scored so far: what a kill costs at most."""


def cache_key(
    reference: nn.Module, sequences: Sequence[TokenSequence], *, precision: str, max_tokens: int
) -> str:
    """SHA-256 of all that decides the values: weights, architecture, token ids, boundaries,
    precision.

    Nothing cosmetic takes part: paths, names and templates matter only through the ids they gave.
    """
    digest = hashlib.sha256()
    config = reference.config.to_json_string()  # type: ignore[operator, union-attr]
    device = device_of(reference).type
    header = f"{SCORING_VERSION} {weights_digest(reference)} {precision} {max_tokens} {device}"
    digest.update(f"{header} {torch.__version__} {config}".encode())
    for sequence in sequences:
        digest.update(np.asarray([sequence.prompt_length, *sequence.ids, -1], np.int64).tobytes())
    return digest.hexdigest()


def reference_logps(
    reference: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    precision: str,
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, bool]:
    """`log pi_ref(response | prompt)` of each sequence, (S,), float64, and whether the cache had
    them.

    What is scored is kept at intervals, and when it is stopped or fails; the next call goes on.
    """
    key = cache_key(reference, sequences, precision=precision, max_tokens=max_tokens)
    file = cache_folder() / "reference" / f"{key}.safetensors"
    values = _read(file, len(sequences)) if ranks.is_first() else None
    if values is None:
        unknown = math.nan if ranks.is_first() else 0.0
        values = torch.full((len(sequences),), unknown, dtype=torch.float64)
    ranks.sum_in_place(values)  # on every rank what the first has
    if not values.isnan().any():
        return values, True
    kept = time.monotonic()

    def keep_at_intervals(done: int) -> None:
        nonlocal kept
        progress(done)
        if ranks.is_first() and time.monotonic() - kept >= KEEP_SECONDS:
            _write(file, values)
            kept = time.monotonic()

    try:
        score_all(
            reference,
            sequences,
            precision=precision,
            max_tokens=max_tokens,
            progress=keep_at_intervals,
            values=values,
        )
    finally:
        if ranks.is_first():
            _write(file, values)
    return values, False


def score_all(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    precision: str,
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
    values: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of many responses without gradients, (S,), float64, on the CPU.

    Ranks share the work. A chunk is scored as one process scores it, whoever does.

    Args:
        values: filled in place where given; what is not NaN is known already.
    """
    order = longest_prompt_first(sequences)
    if values is None:
        values = torch.full((len(sequences),), math.nan, dtype=torch.float64)
    model.eval()
    shares, in_step = ranks.size(), is_sharded(model)
    own = ranks.rank() * CHUNK
    shortest = min(sequences, key=len)
    with torch.no_grad():
        for start in range(0, len(order), CHUNK * shares):
            chunks = order[start : start + CHUNK * shares].tolist()
            chosen = chunks[own : own + CHUNK]
            # A chunk is scored whole: its bits depend on it.
            members = [sequences[i] for i in chosen] if values[chosen].isnan().any() else []
            idle = _idle_passes(model, members, max_tokens) if in_step else 0
            if members:
                logps = response_logps(model, members, precision=precision, max_tokens=max_tokens)
                values[chosen] = logps.cpu()
            for _ in range(idle):
                response_logps(model, [shortest], precision=precision)
            if shares > 1:
                found = torch.zeros(len(chunks), dtype=torch.float64)
                found[own : own + CHUNK] = values[chosen]
                ranks.sum_in_place(found)
                values[chunks] = found
            progress(len(chunks))
    settle(model)
    return values


def _idle_passes(model: nn.Module, sequences: Sequence[TokenSequence], max_tokens: int) -> int:
    """How many passes more than this rank another one needs for its own sequences."""
    own = len(score_groups(model, sequences, max_tokens=max_tokens)) if sequences else 0
    return int(max(ranks.gather(own))) - own


def longest_prompt_first(sequences: Sequence[TokenSequence]) -> Integers:
    """Long sequences first, so that memory runs out at once if it does; a prompt's stay together,
    so that they share it. Numbers of the sequences; 8 bytes of each prompt's digest tell prompts
    apart.
    """
    num_sequences = len(sequences)
    index = np.int32 if num_sequences < 2**31 else np.int64  # half the memory
    prompts, lengths = np.empty(num_sequences, np.uint64), np.empty(num_sequences, np.int32)
    for i, sequence in enumerate(sequences):
        prompts[i], lengths[i] = _prompt_digest(sequence), len(sequence)
    members = np.argsort(prompts, kind="stable").astype(index)  # prompt by prompt, in their order
    prompts.sort()
    begins = np.ones(num_sequences, bool)
    begins[1:] = prompts[1:] != prompts[:-1]
    del prompts
    starts = np.flatnonzero(begins).astype(index)
    longest = np.maximum.reduceat(lengths[members], starts)
    del lengths, begins
    groups = np.lexsort((members[starts], -longest)).astype(index)
    sizes = np.diff(starts, append=index(num_sequences))
    order: Integers = members[_ranges(starts[groups], sizes[groups])]
    return order


def _ranges(starts: Integers, sizes: Integers) -> Integers:
    """Ranges of numbers one after the other, none of them empty.

    >>> _ranges(np.array([7, 0]), np.array([2, 3])).tolist()
    [7, 8, 0, 1, 2]
    """
    steps = np.ones(sizes.sum(), starts.dtype)
    steps[:1] = starts[:1]
    steps[np.cumsum(sizes)[:-1]] = starts[1:] - starts[:-1] - sizes[:-1] + 1
    np.cumsum(steps, out=steps)
    return steps


def _prompt_digest(sequence: TokenSequence) -> int:
    return digest64(np.asarray(sequence.ids[: sequence.prompt_length], np.int64).tobytes())


def _write(file: Path, values: Tensor) -> None:
    """Keep values; NaN stands where there is none yet."""
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as temporary:
        save_file({"logps": values}, temporary, metadata={"sha256": _digest(values)})


def _read(file: Path, num_sequences: int) -> Tensor | None:
    """Kept values; a damaged file counts as none."""
    try:
        with safe_open(file, framework="pt") as cached:
            values: Tensor = cached.get_tensor("logps")
            digest = (cached.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return values if values.shape == (num_sequences,) and _digest(values) == digest else None


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
