"""A small GPT-2 from scratch with its own tokenizer, for machines and demonstrations without a
hub.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpo.errors import InputError
from dpo.models.load import fuse_activations

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer as GPT-2's, learnt from the texts; it can spell anything.

    Raises:
        InputError: `vocab_size` is too small to hold the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise InputError(
            f"model.fresh.vocab_size: expected at least 257 (256 bytes and {END_OF_TEXT}), "
            f"got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def fresh_gpt2(
    *, width: int, layers: int, heads: int, positions: int, tokenizer: Any, seed: int
) -> nn.Module:
    """A GPT-2 with random weights, a function of the seed.

    Raises:
        InputError: `width` is not a multiple of `heads`.
    """
    if width % heads:
        raise InputError(f"model.fresh.width: {width} is not a multiple of heads ({heads}).")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = GPT2LMHeadModel(config).eval()
    return fuse_activations(model)
