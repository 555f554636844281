"""Attention over packed prefix trees, for every model that takes a registered attention function.

transformers lets a model's attention be chosen by name. Ours, `dpo_packed`, computes for each
branch of a tree exactly what a causal model computes for that sequence alone: its tokens see the
stem and the branch's own earlier tokens, and nothing else of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from dpo.data.pack import Tree
from dpo.models import flex

NAME = "dpo_packed"


class UnsupportedAttention(Exception):
    """A model asks of its attention what the packed one does not do; the padded path serves it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What every attention layer is given in place of a mask."""

    trees: tuple[Tree, ...]
    window: int | None
    """Tokens that a token sees, itself included; None: all before it."""


_trees: ContextVar[tuple[Tree, ...]] = ContextVar("trees")


@contextmanager
def attention_named(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the model uses the registered attention function `name`."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def packed_attention_of(model: nn.Module, trees: tuple[Tree, ...]) -> Iterator[None]:
    """Inside, the model's rows are trees."""
    token = _trees.set(trees)
    try:
        with attention_named(model, NAME):
            yield
    finally:
        _trees.reset(token)


def _layout(*args: Any, local_size: int | None = None, **kwargs: Any) -> Layout:
    """What transformers calls to make a mask. `local_size` is the window of a sliding layer.

    The layout travels as the mask argument, so that recomputation in a checkpointed backward pass
    sees it as well.
    """
    return Layout(_trees.get(), local_size)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of each tree of the row, (1, T, H, D), as `attention_mask` lays them out.

    On a GPU one kernel for the whole row where it serves (`dpo.models.flex`), else tree by tree.

    Args:
        query: (1, H, T, D); key, value: (1, G, T, D), where G divides H (grouped queries).

    Raises:
        UnsupportedAttention: there is more to this model's attention (sinks, biases, a cache).
    """
    if not isinstance(attention_mask, Layout):
        raise UnsupportedAttention("it makes its own attention mask")
    extra = [n for n, v in others.items() if isinstance(v, Tensor) and n != "position_ids"]
    if extra or key.shape[2] != query.shape[2]:
        raise UnsupportedAttention(f"its attention takes {', '.join(extra) or 'other keys'}")
    layout = Layout(attention_mask.trees, sliding_window or attention_mask.window)
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
    if flex.serves(query, value, dropout=dropout):
        found = flex.row_attention(query, key, value, layout.trees, window=layout.window, **options)
        return found.transpose(1, 2), None
    return tree_attention(query, key, value, layout, dropout=dropout, **options), None


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, **options: Any
) -> Tensor:
    """Attention by torch's own products, (1, T, H, D), tree by tree.

    Two products a pair: the stem with its first branch is plain causal attention; every other
    branch looks at the stem's keys and its own.

    Args:
        query: (1, H, T, D); key, value: (1, G, T, D), where G divides H.
        options: `dropout`, `scaling` and `softcap` as of `packed_attention`.
    """
    window = layout.window
    outputs: list[Tensor] = []
    sizes = [n for tree in layout.trees for n in _pieces(tree)]
    split = (x.split(sizes, dim=2) for x in (query, key, value))
    pieces = iter(zip(*split, strict=True))  # split: its backward is one copy, slices' is many
    for tree in layout.trees:
        q, k, v = next(pieces)
        outputs.append(_attend(q, k, v, window=window, **options))
        stem_k, stem_v = k[:, :, : tree.stem], v[:, :, : tree.stem]
        for _ in tree.branches[1:]:
            q, k, v = next(pieces)
            if q.shape[2]:
                k, v = torch.cat([stem_k, k], dim=2), torch.cat([stem_v, v], dim=2)
                outputs.append(_attend(q, k, v, window=window, **options))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _pieces(tree: Tree) -> list[int]:
    """The stem with its first branch, then every other branch."""
    return [tree.stem + tree.branches[0], *tree.branches[1:]]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention whose queries are the last of the keys' positions, (1, H, Q, D)."""
    queries, keys = query.shape[2], key.shape[2]
    windowed = window is not None and keys > window  # else the window holds all there is
    allowed = None
    if queries < keys or windowed or softcap is not None:
        distance = torch.arange(keys - queries, keys, device=query.device)[:, None]
        distance = distance - torch.arange(keys, device=query.device)
        allowed = distance >= 0
        if window is not None and windowed:
            allowed &= distance < window
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if softcap is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=dropout,
            is_causal=allowed is None,
            scale=scaling,
        )
    assert allowed is not None
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores.float() / softcap)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).to(value.dtype)
    return drop(weights, p=dropout) @ value


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _layout)
