"""Sequences as one batch for a model: padded rows, or packed prefix trees.

Sequences that share a prompt form a *tree*: what all of them begin with is the stem and stands
once; what each has of its own is a branch. A packed batch is one row of trees,

    | stem  branch 1  branch 2 | stem  branch 1 | ...
      0..4  5..7      5..9       0..2  3..8           positions restart with every branch

so no token is computed twice and nothing is padded. The last token of a sequence predicts nothing
and nothing attends to it: it is a target, never an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo.data.order import group_by_length
from dpo.data.tokenize import TokenSequence

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tree:
    """The inputs of sequences that begin alike, in tokens: `stem` once, then each one's rest."""

    stem: int
    branches: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.stem + sum(self.branches)

    @property
    def attended(self) -> int:
        """Pairs of a token and a token that it sees, itself included.

        >>> Tree(2, (2, 0)).attended  # 1 + 2, then 3 + 4; the other branch is empty
        10
        """
        whole = sum(_triangle(self.stem + branch) for branch in self.branches)
        return whole - (len(self.branches) - 1) * _triangle(self.stem)


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes through a model at once, and which of its hidden states predict what.

    Hidden state n, at (row[n], column[n]), is needed once however many targets it predicts: scored
    token m of all the sequences together is `targets[m]`, predicted by hidden state `source[m]`.
    """

    ids: Integers
    """(B, T) input ids."""
    positions: Integers | None
    """(B, T) position of each token in its sequence; None: 0..T-1 in every row."""
    trees: tuple[Tree, ...] | None
    """What stands in the one packed row, in order; None: rows are sequences, padded right."""
    row: Integers
    column: Integers
    source: Integers
    targets: Integers
    sequence: Integers
    """(M,) the sequence that scored token m belongs to, counted from 0 in this batch."""

    @property
    def attended(self) -> int:
        """Pairs of a position and one that it sees, itself included, padding too."""
        rows, columns = self.ids.shape
        if self.trees is None:
            return int(rows * _triangle(columns))
        return sum(tree.attended for tree in self.trees)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def pad(sequences: Sequence[TokenSequence]) -> Batch:
    """Each sequence a row, padded on the right, where a causal model never looks: no mask is
    needed and no id is special.
    """
    inputs = [s.ids[:-1] for s in sequences]
    ids = np.zeros((len(sequences), max(map(len, inputs))), np.int64)
    for row, tokens in zip(ids, inputs, strict=True):
        row[: len(tokens)] = tokens
    counts = [s.num_scored for s in sequences]
    owner = np.repeat(np.arange(len(sequences)), counts)
    column = np.concatenate([np.arange(s.prompt_length - 1, len(s) - 1) for s in sequences])
    return Batch(ids, None, None, owner, column, np.arange(len(owner)), _targets(sequences), owner)


def pack(sequences: Sequence[TokenSequence]) -> Batch:
    """All sequences in one row, as trees in the order in which their prompts first come."""
    trees: list[Tree] = []
    ids: list[tuple[int, ...]] = []
    positions: list[Integers] = []
    columns: list[Integers] = [np.empty(0, np.int64)] * len(sequences)
    start = 0
    for members in group_by_prompt(sequences).values():
        inputs = [sequences[i].ids[:-1] for i in members]
        tree = _tree(inputs)
        stem = tree.stem
        ids.append(inputs[0][:stem])
        positions.append(np.arange(stem))
        branch_start = start + stem
        for i, tokens, length in zip(members, inputs, tree.branches, strict=True):
            ids.append(tokens[stem:])
            positions.append(np.arange(stem, len(tokens)))
            in_row = np.arange(len(tokens)) + start
            in_row[stem:] += branch_start - start - stem
            columns[i] = in_row[sequences[i].prompt_length - 1 :]
            branch_start += length
        start += tree.num_tokens
        trees.append(tree)
    owner = np.repeat(np.arange(len(sequences)), [s.num_scored for s in sequences])
    column, source = np.unique(np.concatenate(columns), return_inverse=True)
    return Batch(
        np.concatenate([np.asarray(tokens, np.int64) for tokens in ids])[None],
        np.concatenate(positions)[None],
        tuple(trees),
        np.zeros_like(column),
        column,
        source,
        _targets(sequences),
        owner,
    )


def _targets(sequences: Sequence[TokenSequence]) -> Integers:
    """Every scored token, sequence after sequence."""
    return np.concatenate([np.asarray(s.ids[s.prompt_length :], np.int64) for s in sequences])


def group_by_prompt(sequences: Sequence[TokenSequence]) -> dict[tuple[int, ...], list[int]]:
    """The indices of the sequences of each prompt, prompts in order of appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(sequence.ids[: sequence.prompt_length], []).append(i)
    return groups


def _tree(inputs: Sequence[tuple[int, ...]]) -> Tree:
    stem = _common_length(inputs)
    return Tree(stem, tuple(len(tokens) - stem for tokens in inputs))


def _common_length(inputs: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all inputs begin with: as many as the first and the last in order do."""
    first, last = min(inputs), max(inputs)
    for position, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return position
    return min(len(first), len(last))


def packed_tokens(sequences: Sequence[TokenSequence]) -> int:
    """Tokens that the sequences send through the model when packed.

    >>> pair = [TokenSequence((5, 6, 7, 1), 3), TokenSequence((5, 6, 7, 8, 9, 1), 3)]
    >>> packed_tokens(pair)  # 5 6 7, then nothing, then 8 9
    5
    """
    groups = group_by_prompt(sequences).values()
    return sum(_tree([sequences[i].ids[:-1] for i in members]).num_tokens for members in groups)


def packed_groups(sequences: Sequence[TokenSequence], *, max_tokens: int) -> list[list[int]]:
    """Split sequences into groups of at most `max_tokens` packed tokens, prompts kept together.

    A prompt whose responses do not fit together is given again in the next group, and a sequence
    that alone exceeds the budget is a group of its own: nothing is dropped.
    """
    groups: list[list[int]] = []
    filled = 0
    for prompt, members in group_by_prompt(sequences).items():
        in_group = False  # whether the group at hand holds this prompt already
        for i in members:
            own = len(sequences[i]) - 1 - len(prompt)
            cost = own if in_group else own + len(prompt)
            if not groups or filled + cost > max_tokens:
                groups.append([])
                filled, cost = 0, own + len(prompt)
            groups[-1].append(i)
            filled += cost
            in_group = True
    return groups


def padded_groups(sequences: Sequence[TokenSequence], *, max_tokens: int) -> list[list[int]]:
    """Split sequences into groups of like length, of at most `max_tokens` positions, padding
    included.
    """
    return group_by_length([len(s) - 1 for s in sequences], max_tokens=max_tokens)
