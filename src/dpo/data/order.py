"""Which rows a step trains on: a pure function of the seed and the step, so that a position is one
integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of `range(num_rows)`: the same for the same seed and epoch, on every
    machine.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps in one pass over the rows; the last may hold fewer than `batch_size` rows."""
    return -(-num_rows // batch_size)


def batch_rows(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows of optimizer step `step` (counted from 0). No row is left out of an epoch, none is
    repeated.
    """
    epoch, position = divmod(step, steps_per_epoch(num_rows, batch_size))
    order = epoch_order(num_rows, seed=seed, epoch=epoch)
    return [int(i) for i in order[position * batch_size : (position + 1) * batch_size]]


def group_by_length(
    lengths: Sequence[int], *, max_tokens: int, max_padding: float = 0.2
) -> list[list[int]]:
    """Split sequences into groups that are run together, so that little of what is computed is
    padding.

    Sequences are taken from the longest to the shortest. A group is closed when padded to its
    longest member it would hold more than `max_tokens` positions, or more than the share
    `max_padding` of them would be padding. A sequence longer than `max_tokens` is a group of its
    own: nothing is dropped.

    >>> group_by_length([10, 3, 9, 3], max_tokens=100)
    [[0, 2], [1, 3]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    real = 0
    for i in longest_first:
        if groups:
            padded = lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            if padded <= max_tokens and real + lengths[i] >= (1 - max_padding) * padded:
                groups[-1].append(i)
                real += lengths[i]
                continue
        groups.append([i])
        real = lengths[i]
    return groups


def split_by_tokens(costs: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Split rows into micro-batches of at most `max_tokens` tokens each, rows of like length
    together.

    A row that alone exceeds the budget is a micro-batch of its own.

    >>> split_by_tokens([5, 9, 2, 4], max_tokens=10)
    [[1], [0, 3], [2]]
    """
    batches: list[list[int]] = []
    filled = 0
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        if not batches or filled + costs[i] > max_tokens:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += costs[i]
    return batches


def split_among(costs: Sequence[int], *, parts: int) -> list[list[int]]:
    """Split rows among processes, about as many tokens to each: from the longest to the shortest,
    each to the one that has the fewest. A part may be empty; in each, rows keep their order.

    >>> split_among([5, 9, 2, 4], parts=2)
    [[1, 2], [0, 3]]
    """
    members: list[list[int]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = filled.index(min(filled))
        members[least].append(i)
        filled[least] += costs[i]
    return [sorted(part) for part in members]
