"""Random token sequences and pairs of unlike lengths, and the training methods over them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dpo.config import DPOLossConfig
from dpo.data.tokenize import TokenSequence
from dpo.models.scoring import response_logps
from dpo.train.encoded import EncodedPair
from dpo.train.preference import PreferenceMethod
from dpo.train.sft import SupervisedMethod

VOCAB = 40

# Prompt length and scored tokens: one-token prompts and responses, and sequences longer than the
# sliding window (16) of the tiny Gemma 2.
SHAPES = [(1, 1), (5, 3), (1, 9), (20, 4), (3, 22), (12, 1)]


def random_sequences(seed: int = 0) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenSequence(tuple(torch.randint(VOCAB, (p + r,), generator=generator).tolist()), p)
        for p, r in SHAPES
    ]


def random_pairs() -> list[EncodedPair]:
    """Chosen and rejected of unlike length after the same prompt."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for prompt_length, chosen_length in SHAPES:
        ids = torch.randint(VOCAB, (40,), generator=generator).tolist()
        prompt, rest = ids[:prompt_length], ids[prompt_length:]
        rejected_length = 1 + (chosen_length * 5) % 8
        pairs.append(
            EncodedPair(
                TokenSequence((*prompt, *rest[:chosen_length]), prompt_length),
                TokenSequence((*prompt, *rest[-rejected_length:]), prompt_length),
                "",
            )
        )
    return pairs


def preference_method(
    reference: nn.Module, pairs: list[EncodedPair], config: DPOLossConfig, *, max_tokens: int
) -> PreferenceMethod:
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    with torch.no_grad():
        logps = response_logps(reference, sequences, max_tokens=max_tokens)
    return PreferenceMethod(
        train=pairs,
        test=pairs,
        train_reference=logps,
        test_reference=logps,
        loss_config=config,
        precision="fp32",
        max_tokens=max_tokens,
        on_policy=None,
        save=_refuse,
    )


def supervised_method(sequences: list[TokenSequence], *, max_tokens: int) -> SupervisedMethod:
    return SupervisedMethod(
        train=sequences,
        test=sequences,
        sources=[""] * len(sequences),
        precision="fp32",
        max_tokens=max_tokens,
        save=_refuse,
    )


def _refuse(model: nn.Module, folder: Path) -> None:
    raise AssertionError("nothing is saved here")
