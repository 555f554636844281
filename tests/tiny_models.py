"""Tiny random models of several architectures, for tests."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def gpt2(vocab_size: int) -> torch.nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama(vocab_size: int) -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, **_SIZES))


def neox(vocab_size: int) -> torch.nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab_size, **_SIZES))


def gemma2(vocab_size: int) -> torch.nn.Module:
    """A model that caps its logits after the head."""
    config = Gemma2Config(
        vocab_size=vocab_size,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        final_logit_softcapping=2.0,
        **_SIZES,
    )
    return Gemma2ForCausalLM(config)


ARCHITECTURES = {"gpt2": gpt2, "llama": llama, "neox": neox, "gemma2": gemma2}


def make(name: str, vocab_size: int, *, seed: int = 0, scale: float = 4.0) -> torch.nn.Module:
    """A random model in evaluation mode; `scale` widens the weights so that logits differ."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name](vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
    return model.eval()
