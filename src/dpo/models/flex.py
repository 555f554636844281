"""Attention of a packed row in one kernel: FlexAttention, for GPUs.

A GPU spends its time on starting small kernels where trees are attended to one by one. Here the
whole row is one product under a mask, and tiles of the mask in which nothing is seen are skipped.

Rows are of any length, and the kernel is compiled anew for each length it meets, or once for all of
them and then slower. So queries, keys and values are padded to one of few lengths (`bucket`), for
each of which there is one kernel. A padded place sees itself alone and nobody sees it: nothing
changes but the work, of one more tile for every 128 padded places.

None of this has been run on a GPU yet. What a CPU can check is checked: the mask against sequences
one by one, outputs and gradients of torch's own uncompiled form against the trees' attention.

The kernel: Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized
Attention Kernels" (arXiv 2412.05496), as torch.nn.attention.flex_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad
from torch.utils._triton import has_triton

from dpo.data.pack import Tree

TILE = 128
"""Rows and columns of the mask that the kernel takes or skips together; torch's default."""
LEAST_HEAD_DIM, MOST_HEAD_DIM = 16, 128
"""Channels of a head. The kernel refuses fewer; with more, its backward pass does not fit into the
shared memory of some GPUs (pytorch/pytorch#180278, #198224)."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def serves(query: Tensor, value: Tensor, *, dropout: float) -> bool:
    """Whether the kernel takes these: on CUDA, no dropout (it has none), no float64."""
    dims = (query.shape[-1], value.shape[-1])
    return (
        query.is_cuda
        and dropout == 0
        and query.dtype != torch.float64
        and min(dims) >= LEAST_HEAD_DIM
        and max(dims) <= MOST_HEAD_DIM
        and has_triton()  # torch's own question before it compiles for a GPU
    )


def bucket(tokens: int) -> int:
    """The length that a row is padded to: a tile, times a power of two.

    >>> [bucket(tokens) for tokens in (1, 128, 129, 700, 4096)]
    [128, 128, 256, 1024, 4096]
    """
    return TILE << ((tokens - 1) // TILE).bit_length()


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    trees: tuple[Tree, ...],
    *,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention of every token of a packed row to what it sees, (1, H, T, D).

    `o_q = sum_k softmax_k(s_qk) v_k` over the keys k that q sees (`mask_mod`), where
    `s_qk = scaling q_q . k_k`, or `softcap tanh(s_qk / softcap)` of it.

    Args:
        query: (1, H, T, D); key, value: (1, G, T, D), where G divides H (grouped queries).
        window: tokens that a token sees, itself included; None: all before it.
        scaling: None: `D ** -0.5`.
    """
    device = query.device
    if torch.is_autocast_enabled(device.type):
        # As torch's own attention does; rotary embeddings leave queries in float32, values not.
        dtype = torch.get_autocast_dtype(device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    tokens = query.shape[2]
    output: Tensor = kernel()(
        *(_padded(x) for x in (query, key, value)),
        score_mod=None if softcap is None else soft_cap(softcap),
        block_mask=block_mask(trees, window, device),
        scale=scaling,
        enable_gqa=True,
        # Else rows under 128 tokens take a kernel for decoding, which cannot be trained.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return output[:, :, :tokens]


def _padded(x: Tensor) -> Tensor:
    """(1, H, T, D) with zeros up to the bucket's length, laid out as tokens of heads, (1, T, H, D).

    Always a copy: a layout of its own for rows that fill their bucket would be a kernel of its own.
    """
    missing = bucket(x.shape[2]) - x.shape[2]
    return pad(x.transpose(1, 2), (0, 0, 0, 0, 0, missing)).contiguous().transpose(1, 2)


@cache
def kernel() -> Callable[..., Any]:
    """The compiled kernel: one for each bucket that comes, with gradients and without; others for
    other heads, types and caps.
    """
    # After eight of these torch would take its uncompiled form, a square of the row's length for
    # every head; `fullgraph` makes that an error.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(64, limits.recompile_limit)
    return compiled()


def compiled(**options: Any) -> Callable[..., Any]:
    """Torch's attention, compiled for lengths that are known: it leaves out the checks of the last
    tile then (IS_DIVISIBLE in torch/_inductor/kernel/flex).

    Args:
        options: of `torch.compile`.
    """
    return torch.compile(flex_attention, fullgraph=True, dynamic=False, **options)


def soft_cap(cap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A score between -cap and cap: `cap tanh(score / cap)`."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


@lru_cache(maxsize=8)
def block_mask(trees: tuple[Tree, ...], window: int | None, device: torch.device) -> BlockMask:
    """What a padded row's tokens see, by tile: nothing, all, or what `mask_mod` says of each pair.

    All layers of a forward pass, its repetition under gradient checkpointing and other models on
    the same row find the same one: it is kept for the rows seen last. A square of the row's length
    never exists, only one row of tiles at a time.
    """
    length = bucket(sum(tree.num_tokens for tree in trees))
    sees = mask_mod(trees, window, device)
    nothing = torch.zeros((), dtype=torch.int64, device=device)
    keys = torch.arange(length, device=device)
    rows = [sees(nothing, nothing, q[:, None], keys).sum(0) for q in keys.split(TILE)]
    counts = torch.stack(rows).unflatten(1, (-1, TILE)).sum(2)
    counts = counts[None, None]
    full = counts == TILE * TILE
    return BlockMask.from_kv_blocks(
        *_listed((counts > 0) & ~full),
        *_listed(full),
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are taken, (1, 1, Q), and which, those first, (1, 1, Q, K)."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.int()


def mask_mod(trees: tuple[Tree, ...], window: int | None, device: torch.device) -> MaskMod:
    """Whether query q sees key k, both counted along the padded row.

    `tree_q = tree_k and (branch_k = 0 or branch_k = branch_q) and 0 <= pos_q - pos_k < window`

    with the branch of a stem 0, and positions as in the sequence of each token. Padding is a tree
    of its own with a window of 1: a query that sees no key would have a softmax over nothing.
    """
    tree, branch, position = token_numbers(trees)
    # A tensor in any case: a number would have the kernel compiled again for another window.
    oldest = torch.zeros_like(position) if window is None else position - window + 1
    padding = torch.arange(bucket(len(tree)) - len(tree), dtype=torch.int32)
    tree, branch, position, oldest = (
        torch.cat([numbers, of_padding]).to(device)
        for numbers, of_padding in [
            (tree, torch.full_like(padding, -1)),
            (branch, torch.zeros_like(padding)),
            (position, padding),
            (oldest, padding),
        ]
    )

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_sequence = (tree[q] == tree[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))
        return in_sequence & (position[k] <= position[q]) & (position[k] >= oldest[q])

    return sees


def token_numbers(trees: tuple[Tree, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token of the row, (T,): its tree; its branch, from 1, 0 in the stem; its position.

    >>> for numbers in token_numbers((Tree(2, (1, 2)), Tree(1, (0,)))):
    ...     numbers.tolist()
    [0, 0, 0, 0, 0, 1]
    [0, 0, 1, 2, 2, 0]
    [0, 1, 2, 2, 3, 0]
    """
    runs = [
        (number, branch, first, length)
        for number, tree in enumerate(trees)
        for branch, (first, length) in enumerate(
            [(0, tree.stem), *((tree.stem, length) for length in tree.branches)]
        )
    ]
    lengths = torch.tensor([length for *_, length in runs])
    tree, branch = (
        torch.tensor([run[i] for run in runs], dtype=torch.int32).repeat_interleave(lengths)
        for i in (0, 1)
    )
    positions = chain.from_iterable(range(first, first + n) for _, _, first, n in runs)
    return tree, branch, torch.tensor(list(positions), dtype=torch.int32)
