"""Packed prefix trees: every sequence can be read back, nothing stands twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.pack import Tree, group_by_prompt, pack, packed_groups, packed_tokens, pad
from dpo.data.tokenize import TokenSequence

TOKENS = st.integers(0, 3)  # few, so that responses begin alike and are equal often
PROMPTS = st.lists(TOKENS, min_size=1, max_size=4).map(tuple)
RESPONSES = st.lists(TOKENS, min_size=1, max_size=5).map(tuple)
SEQUENCES = st.lists(
    st.builds(lambda p, r: TokenSequence(p + r, len(p)), PROMPTS, RESPONSES),
    min_size=1,
    max_size=12,
)


def visible(batch, at: int) -> list[int]:
    """The tokens that position `at` of a packed row sees, itself last, as the layout says."""
    start = 0
    for tree in batch.trees:
        if at < start + tree.num_tokens:
            stem = list(range(start, start + tree.stem))
            if at < start + tree.stem:
                return [int(batch.ids[0, i]) for i in range(start, at + 1)]
            branch = start + tree.stem
            for length in tree.branches:
                if at < branch + length:
                    seen = [*stem, *range(branch, at + 1)]
                    return [int(batch.ids[0, i]) for i in seen]
                branch += length
        start += tree.num_tokens
    raise AssertionError("outside the row")


@given(SEQUENCES)
def test_every_target_is_predicted_by_exactly_the_tokens_before_it(sequences) -> None:
    batch = pack(sequences)
    expected = [
        (i, s.ids[:t], s.ids[t])
        for i, s in enumerate(sequences)
        for t in range(s.prompt_length, len(s))
    ]
    found = [
        (int(owner), tuple(visible(batch, int(batch.column[source]))), int(target))
        for owner, source, target in zip(batch.sequence, batch.source, batch.targets, strict=True)
    ]
    assert found == expected


@given(SEQUENCES)
def test_a_position_is_the_number_of_tokens_before_it(sequences) -> None:
    batch = pack(sequences)
    for at in range(batch.ids.shape[1]):
        assert batch.positions[0, at] == len(visible(batch, at)) - 1


@given(SEQUENCES)
def test_no_hidden_state_is_asked_for_twice_and_each_is_used(sequences) -> None:
    batch = pack(sequences)
    assert len(set(batch.column.tolist())) == len(batch.column)
    assert set(batch.source.tolist()) == set(range(len(batch.column)))


@given(SEQUENCES)
def test_a_row_holds_each_prompts_tree_once_and_packed_tokens_counts_it(sequences) -> None:
    batch = pack(sequences)
    assert sum(tree.num_tokens for tree in batch.trees) == batch.ids.shape[1]
    assert len(batch.trees) == len({s.ids[: s.prompt_length] for s in sequences})
    assert packed_tokens(sequences) == batch.ids.shape[1]
    assert batch.ids.shape[1] <= sum(len(s) - 1 for s in sequences)


@given(SEQUENCES)
def test_padded_rows_predict_the_same_targets(sequences) -> None:
    batch, packed = pad(sequences), pack(sequences)
    assert batch.targets.tolist() == packed.targets.tolist()
    assert batch.sequence.tolist() == packed.sequence.tolist()
    for source, owner, target in zip(batch.source, batch.sequence, batch.targets, strict=True):
        row, column = int(batch.row[source]), int(batch.column[source])
        assert row == owner
        assert tuple(batch.ids[row, : column + 1]) == sequences[owner].ids[: column + 1]
        assert sequences[owner].ids[column + 1] == target


def test_a_pair_by_hand() -> None:
    """Prompt 5 6, chosen 7 8 9, rejected 7 1: the common 7 stands once, no last token at all."""
    batch = pack([TokenSequence((5, 6, 7, 8, 9), 2), TokenSequence((5, 6, 7, 1), 2)])
    assert batch.ids.tolist() == [[5, 6, 7, 8]]
    assert batch.trees == (Tree(3, (1, 0)),)
    assert batch.positions.tolist() == [[0, 1, 2, 3]]
    assert batch.column.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [7, 8, 9, 7, 1]
    assert batch.source.tolist() == [0, 1, 2, 0, 1]


@given(SEQUENCES, st.integers(1, 30))
def test_groups_hold_every_sequence_once_and_keep_to_the_budget(sequences, max_tokens) -> None:
    groups = packed_groups(sequences, max_tokens=max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(sequences)))
    for group in groups:
        tokens = packed_tokens([sequences[i] for i in group])
        assert tokens <= max_tokens or len(group) == 1


def test_a_prompts_sequences_stay_together_where_they_fit() -> None:
    one = [TokenSequence((1, 2, 3, k), 3) for k in range(3)]
    other = [TokenSequence((4, 5, k), 2) for k in range(2)]
    mixed = [one[0], other[0], one[1], other[1], one[2]]
    assert packed_groups(mixed, max_tokens=3) == [[0, 2, 4], [1, 3]]
    assert packed_groups(mixed, max_tokens=5) == [[0, 2, 4, 1, 3]]
    assert list(group_by_prompt(mixed).values()) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("layout", [pack, pad])
def test_indices_are_integers_that_torch_takes(layout) -> None:
    batch = layout([TokenSequence((1, 2), 1)])
    for values in (batch.ids, batch.row, batch.column, batch.source, batch.targets):
        assert values.dtype == np.int64
