"""The order of rows, and how they are grouped into passes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.order import (
    batch_rows,
    epoch_order,
    group_by_length,
    split_among,
    split_by_tokens,
    steps_per_epoch,
)

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60)


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epoch_is_a_permutation(num_rows: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_rows, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(num_rows))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = epoch_order(50, seed=1, epoch=2).tolist()
    epoch_order(50, seed=9, epoch=9)
    epoch_order(50, seed=8, epoch=8)  # out of the cache
    np.random.seed(3)
    assert epoch_order(50, seed=1, epoch=2).tolist() == first
    others = [epoch_order(50, seed=s, epoch=e).tolist() for s, e in [(2, 1), (1, 3), (2, 2)]]
    assert first not in others
    assert first != list(range(50))


def test_the_order_is_the_same_on_every_machine() -> None:
    """A change here would make every stopped run resume on other rows."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_the_cached_order_cannot_be_changed_by_its_readers() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, seed=0, epoch=0)[0] = 1


@given(st.integers(1, 100), st.integers(1, 120), st.integers(0, 5))
def test_every_row_comes_once_an_epoch(num_rows: int, batch_size: int, seed: int) -> None:
    every = steps_per_epoch(num_rows, batch_size)
    for epoch in range(2):
        batches = [
            batch_rows(epoch * every + i, num_rows=num_rows, batch_size=batch_size, seed=seed)
            for i in range(every)
        ]
        assert Counter(row for batch in batches for row in batch) == Counter(range(num_rows))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert len(batches[-1]) == (num_rows - 1) % batch_size + 1


def test_the_last_batch_is_short_and_the_next_epoch_starts_anew() -> None:
    sizes = [len(batch_rows(s, num_rows=10, batch_size=4, seed=0)) for s in range(6)]
    assert sizes == [4, 4, 2, 4, 4, 2]
    assert steps_per_epoch(10, 4) == 3
    assert steps_per_epoch(8, 4) == 2
    first = [batch_rows(s, num_rows=10, batch_size=4, seed=0) for s in range(3)]
    second = [batch_rows(s, num_rows=10, batch_size=4, seed=0) for s in range(3, 6)]
    assert first != second


@given(LENGTHS, st.integers(1, 500), st.sampled_from([0.0, 0.1, 0.2, 0.9]))
def test_groups_hold_every_sequence_once_within_budget_and_padding(
    lengths: list[int], max_tokens: int, max_padding: float
) -> None:
    groups = group_by_length(lengths, max_tokens=max_tokens, max_padding=max_padding)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[i] for i in group]
        padded = max(members) * len(members)
        assert padded <= max_tokens or len(members) == 1
        assert padded - sum(members) <= max_padding * padded + 1e-9


@given(LENGTHS)
def test_an_unlimited_budget_groups_by_padding_alone(lengths: list[int]) -> None:
    no_limit = group_by_length(lengths, max_tokens=10**9, max_padding=1.0)
    assert len(no_limit) == 1
    equal = group_by_length([7] * len(lengths), max_tokens=10**9, max_padding=0.0)
    assert len(equal) == 1


@given(LENGTHS, st.integers(1, 500))
def test_groups_run_from_long_to_short_so_memory_is_highest_first(
    lengths: list[int], max_tokens: int
) -> None:
    groups = group_by_length(lengths, max_tokens=max_tokens)
    in_order = [lengths[i] for group in groups for i in group]
    assert in_order == sorted(lengths, reverse=True)


@given(LENGTHS, st.integers(1, 500))
def test_micro_batches_hold_every_row_once_within_the_budget(
    costs: list[int], max_tokens: int
) -> None:
    batches = split_by_tokens(costs, max_tokens=max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(costs)))
    for batch in batches:
        assert batch
        assert sum(costs[i] for i in batch) <= max_tokens or len(batch) == 1
    for before, after in pairwise(batches):
        joined = sum(costs[i] for i in [*before, after[0]])
        assert joined > max_tokens, "a batch is closed only when the next row does not fit"


def test_grouping_and_splitting_are_functions_of_the_lengths_with_ties_by_position() -> None:
    assert group_by_length([5, 5, 5], max_tokens=10) == [[0, 1], [2]]
    assert split_by_tokens([5, 5, 5], max_tokens=10) == [[0, 1], [2]]
    assert group_by_length([], max_tokens=10) == []
    assert split_by_tokens([], max_tokens=10) == []


@given(LENGTHS, st.integers(1, 9))
def test_ranks_share_a_batch_by_tokens_and_every_row_is_someones(
    costs: list[int], parts: int
) -> None:
    shares = split_among(costs, parts=parts)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    assert split_among(costs, parts=1) == [list(range(len(costs)))]
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)
