"""The arithmetic floor of a training step: the multiply-adds that it cannot avoid, at the speed
at which this machine multiplies matrices.

Counted, each three times (forward, gradient of the input, gradient of the weight):

- the trunk's four products a layer, `12 width^2` a token, on the unique tokens of the batch's
  prefix trees: a prompt once, each of its responses once and without its last token, which
  predicts nothing;
- attention, `2 width` a layer for each (query, key at or before it) in its sequence;
- the output head, `width * vocab` for each scored token.

Not counted: embeddings, normalisation, softmax, activations, the optimizer, and moving memory. In
the last layer, prompt tokens (but the last) are counted in full although nothing reads what their
attention and MLP put out; a step that left that out would need up to 3/4 of a layer less on them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scenario import Scenario
from torch import Tensor

from dpo.data.tokenize import TokenSequence

SECONDS_PER_RATE = 0.3
"""Time over which a product is repeated; the fastest repetition counts."""


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Lengths of a prompt and of the responses to it, in tokens."""

    prompt: int
    responses: tuple[int, ...]

    @staticmethod
    def of(sequences: Sequence[TokenSequence]) -> PrefixTree:
        """The tree of sequences that have their prompt in common."""
        return PrefixTree(sequences[0].prompt_length, tuple(s.num_scored for s in sequences))

    @property
    def unique_tokens(self) -> int:
        """Tokens that must go through the trunk."""
        return self.prompt + sum(length - 1 for length in self.responses)

    @property
    def scored_tokens(self) -> int:
        return sum(self.responses)

    @property
    def attended(self) -> int:
        """Pairs of a token and a token that it looks at, itself included.

        >>> PrefixTree(2, (3, 1)).attended  # 1 + 2, then 3 + 4; the other branch is empty
        10
        """
        branches = (_triangle(self.prompt + n - 1) - _triangle(self.prompt) for n in self.responses)
        return _triangle(self.prompt) + sum(branches)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def trees_of(step: Sequence[Any], task: str) -> list[PrefixTree]:
    """The prefix trees of one step's pairs; SFT trains on the chosen response alone."""
    if task == "sft":
        return [PrefixTree.of([pair.chosen]) for pair in step]
    return [PrefixTree.of([pair.chosen, pair.rejected]) for pair in step]


@dataclass(frozen=True, slots=True)
class Products:
    """Multiply-adds of a step, forward and backward."""

    trunk: int
    attention: int
    head: int

    @staticmethod
    def of(trees: Sequence[PrefixTree], *, layers: int, width: int, vocab: int) -> Products:
        tokens = sum(tree.unique_tokens for tree in trees)
        return Products(
            trunk=3 * layers * 12 * width**2 * tokens,
            attention=3 * layers * 2 * width * sum(tree.attended for tree in trees),
            head=3 * width * vocab * sum(tree.scored_tokens for tree in trees),
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured multiply-adds per second of each kind of product."""

    trunk: float
    attention: float
    head: float

    def seconds(self, products: Products) -> float:
        """What the products take at these rates."""
        return (
            products.trunk / self.trunk
            + products.attention / self.attention
            + products.head / self.head
        )

    def best(self, other: Rates) -> Rates:
        """The faster of two measurements: other work on the machine only slows one down."""
        return Rates(
            max(self.trunk, other.trunk),
            max(self.attention, other.attention),
            max(self.head, other.head),
        )


def measure_rates(scenario: Scenario, steps: Sequence[Sequence[PrefixTree]]) -> dict[str, Rates]:
    """Rates of each type that the scenario's precision lets a step multiply in.

    In bf16 a step may keep products in float32, as our output head does, and on processors
    without hardware for bfloat16 those are the faster ones.
    """
    dtypes = {"float32": torch.float32}
    if scenario.precision == "bf16":
        dtypes["bfloat16"] = torch.bfloat16
    return {name: _rates(scenario, steps, dtype) for name, dtype in dtypes.items()}


def _rates(scenario: Scenario, steps: Sequence[Sequence[PrefixTree]], dtype: torch.dtype) -> Rates:
    """Rates at the shapes of the median step, on the threads of the caller.

    Trunk and head: `x @ W`, its input gradient `dy @ W^T` and its weight gradient `x^T @ dy`, with
    the sizes that the step has when all its tokens go through at once. Attention: `q @ k^T` and
    `p @ v` of all heads at the median sequence length, whole squares.
    """
    width, heads = scenario.width, scenario.heads
    tokens = _median([sum(tree.unique_tokens for tree in step) for step in steps])
    scored = _median([sum(tree.scored_tokens for tree in step) for step in steps])
    length = _median([t.prompt + max(t.responses) - 1 for step in steps for t in step])

    trunk = [
        _linear_seconds(tokens, inner, outer, dtype)
        for inner, outer in ((1, 3), (1, 1), (1, 4), (4, 1))
        for inner, outer in [(inner * width, outer * width)]
    ]
    q, k = (torch.randn(heads, length, width // heads, dtype=dtype) for _ in range(2))
    p = torch.randn(heads, length, length, dtype=dtype)
    attention = _seconds(lambda: torch.bmm(q, k.mT)) + _seconds(lambda: torch.bmm(p, k))
    return Rates(
        trunk=3 * 12 * width**2 * tokens / sum(trunk),
        attention=2 * width * length**2 / attention,
        head=3
        * width
        * scenario.vocab
        * scored
        / _linear_seconds(scored, width, scenario.vocab, dtype),
    )


def _linear_seconds(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """A linear layer's forward and backward products, (rows, inner) by (inner, outer)."""
    x, dy = torch.randn(rows, inner, dtype=dtype), torch.randn(rows, outer, dtype=dtype)
    weight = torch.randn(outer, inner, dtype=dtype)
    return (
        _seconds(lambda: torch.mm(x, weight.T))
        + _seconds(lambda: torch.mm(dy, weight))
        + _seconds(lambda: torch.mm(dy.T, x))
    )


def _seconds(product: Callable[[], Tensor]) -> float:
    """The fastest of at least three repetitions, after one that warms up."""
    product()
    fastest, spent, repetitions = float("inf"), 0.0, 0
    while spent < SECONDS_PER_RATE or repetitions < 3:
        started = time.perf_counter()
        product()
        seconds = time.perf_counter() - started
        fastest, spent, repetitions = min(fastest, seconds), spent + seconds, repetitions + 1
    return fastest


def _median(values: Sequence[int]) -> int:
    return max(1, round(statistics.median(values)))
