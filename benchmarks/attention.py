"""Time attention over packed trees on a GPU: one kernel for the row, tree by tree, padded rows.

    python benchmarks/attention.py                   # every layout, shape and precision
    python benchmarks/attention.py --layout pairs --precision bf16

`flex` is dpo.models.flex, `trees` is what runs where that does not serve, `padded` is torch's
causal attention of every sequence in a row of its own: the prompt again for each response, and
padding. All take forward and backward passes of random queries, keys and values, at other lengths
in every round, as in training. The first two must give the same in fp32, or the exit code is 1.
The result goes to results/attention/. These kernels can be compared on a GPU only: without one
nothing is timed, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import Spread, write
from rich.console import Console
from rich.table import Table
from scenario import RESULTS
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpo.data.pack import Tree
from dpo.models import flex
from dpo.models.attention import Layout, tree_attention
from dpo.train.run import environment

WARMUP_ROUNDS = 3
"""Rounds that compile: the first length, then all lengths."""
LAYERS = 8
"""Attentions of a round, one after the other as in a model; they share one mask."""
TOLERANCE = 1e-4
"""Largest difference of flex and trees in fp32, relative to the largest value."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Trees:
    """Mean lengths of a batch, in tokens; each tree's are drawn from half to one and a half."""

    trees: int
    prompt: int
    responses: int
    response: int

    def draw(self, source: random.Random) -> tuple[Tree, ...]:
        def length(mean: int) -> int:
            return source.randint((mean + 1) // 2, mean + mean // 2)

        return tuple(
            Tree(length(self.prompt), tuple(length(self.response) for _ in range(self.responses)))
            for _ in range(self.trees)
        )


LAYOUTS = {
    "pairs": Trees(16, 84, 2, 34),  # the medians of hh-rlhf
    "long-pairs": Trees(4, 512, 2, 512),
    "rankings": Trees(4, 256, 8, 128),
    "demonstrations": Trees(16, 84, 1, 116),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of queries, heads of keys and values, channels of a head."""

    heads: int
    groups: int
    channels: int


SHAPES = {
    "gpt2-medium": Shape(16, 16, 64),
    "llama-1b": Shape(32, 8, 64),
    "llama-8b": Shape(32, 8, 128),
}

Attention = Callable[[Tensor, Tensor, Tensor, tuple[Tree, ...]], Tensor]


def by_flex(query: Tensor, key: Tensor, value: Tensor, trees: tuple[Tree, ...]) -> Tensor:
    found = flex.row_attention(query, key, value, trees, window=None, scaling=None, softcap=None)
    return found.transpose(1, 2)


def by_trees(query: Tensor, key: Tensor, value: Tensor, trees: tuple[Tree, ...]) -> Tensor:
    layout = Layout(trees, None)
    return tree_attention(query, key, value, layout, dropout=0.0, scaling=None, softcap=None)


def by_rows(query: Tensor, key: Tensor, value: Tensor, trees: tuple[Tree, ...]) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
    )


CONTESTANTS: dict[str, Attention] = {"flex": by_flex, "trees": by_trees, "padded": by_rows}


def inputs(
    trees: tuple[Tree, ...], shape: Shape, dtype: torch.dtype, device: torch.device, *, padded: bool
) -> list[Tensor]:
    """Random queries, keys, values and output gradients, strided as a model's projections are."""
    rows, length = 1, sum(tree.num_tokens for tree in trees)
    if padded:
        lengths = [tree.stem + branch for tree in trees for branch in tree.branches]
        rows, length = len(lengths), max(lengths)
    heads = (shape.heads, shape.groups, shape.groups, shape.heads)
    made = [torch.randn(rows, length, n, shape.channels, device=device, dtype=dtype) for n in heads]
    return [x.transpose(1, 2).requires_grad_() for x in made[:3]] + made[3:]


def step(attention: Attention, tensors: Sequence[Tensor], trees: tuple[Tree, ...]) -> list[Tensor]:
    """The output and the three gradients."""
    *qkv, gradient = tensors
    output = attention(*qkv, trees)
    if output.shape != gradient.shape:  # heads before tokens
        gradient = gradient.transpose(1, 2)
    return [output.detach(), *torch.autograd.grad(output, qkv, gradient)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(
    layout: Trees, shape: Shape, dtype: torch.dtype, device: torch.device, *, rounds: int, seed: int
) -> dict[str, Any]:
    """Milliseconds a layer of each contestant in each round, turn by turn, and the difference of
    `flex` and `trees`.
    """
    source = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    tokens = []
    difference = 0.0
    for _ in range(WARMUP_ROUNDS + rounds):
        trees = layout.draw(source)
        tokens.append(sum(tree.num_tokens for tree in trees))
        packed = inputs(trees, shape, dtype, device, padded=False)
        rows = inputs(trees, shape, dtype, device, padded=True)
        for name, attention in CONTESTANTS.items():
            synchronize(device)
            started = time.perf_counter()
            for _ in range(LAYERS):
                step(attention, rows if name == "padded" else packed, trees)
            synchronize(device)
            times[name].append(1000 * (time.perf_counter() - started) / LAYERS)
        pairs = zip(step(by_flex, packed, trees), step(by_trees, packed, trees), strict=True)
        for a, b in pairs:
            difference = max(difference, float((a - b).abs().max() / b.abs().max()))
    return {"milliseconds": times, "packed_tokens": tokens, "difference": difference}


def timed(case: dict[str, Any], name: str) -> list[float]:
    """Without the rounds that warm up."""
    milliseconds: list[float] = case["milliseconds"][name][WARMUP_ROUNDS:]
    return milliseconds


def show(cases: Sequence[dict[str, Any]]) -> None:
    """Medians with ranges, and how many times as fast `flex` is, round by round."""
    table = Table("layout", "shape", "", *CONTESTANTS, "flex over trees", "flex over padded")
    table.title = "milliseconds a layer, forward and backward"
    for case in cases:
        ratios = [
            Spread.of([b / a for a, b in zip(timed(case, "flex"), timed(case, n), strict=True)])
            for n in ("trees", "padded")
        ]
        table.add_row(
            case["layout"],
            case["shape"],
            case["precision"],
            *(Spread.of(timed(case, name)).text(".3f") for name in CONTESTANTS),
            *(ratio.text(".2f", "x") for ratio in ratios),
        )
    Console().print(table)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    if not torch.cuda.is_available():
        print("Attention kernels are compared on a GPU; none was found here.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    cases = []
    for layout in arguments.layout or LAYOUTS:
        for shape in arguments.shape or SHAPES:
            for precision in arguments.precision or PRECISIONS:
                found = compare(
                    LAYOUTS[layout],
                    SHAPES[shape],
                    PRECISIONS[precision],
                    device,
                    rounds=arguments.rounds,
                    seed=arguments.seed,
                )
                cases.append({"layout": layout, "shape": shape, "precision": precision, **found})
    show(cases)
    name = torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-")
    result = {
        "name": name,
        "seed": arguments.seed,
        "num_warmup": WARMUP_ROUNDS,
        "layers": LAYERS,
        "cases": cases,
        "hardware": environment(),
    }
    print(f"Written to {write(result, arguments.out)}.")
    if any(c["precision"] == "fp32" and c["difference"] > TOLERANCE for c in cases):
        print("The two packed kernels do not compute the same.", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, choices in (("layout", LAYOUTS), ("shape", SHAPES), ("precision", PRECISIONS)):
        parser.add_argument(
            f"--{name}", action="append", choices=choices, help="may be given again (default: all)"
        )
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="decides lengths (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "attention", help="folder to write the result to"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
