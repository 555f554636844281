"""Batched sampling in which every response is a function of its own seed, not of its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dpo.core.logps import at_least_float32
from dpo.models.scoring import precision_context


@dataclass(frozen=True, slots=True)
class SampledResponse:
    """Generated ids without the end token; `truncated` where the token limit came first."""

    ids: tuple[int, ...]
    truncated: bool


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into exact sampling at a temperature, with one uniform number a token.

    Each row has its own stream of uniform numbers. The token is found by inverting the cumulative
    distribution, `min {v : sum_{w <= v} p_w > u}`, in float64, and every other token is forbidden.
    """

    def __init__(self, uniforms: Tensor, *, temperature: float, prompt_width: int) -> None:
        self.uniforms = uniforms  # (B, max_new_tokens)
        self.temperature = temperature
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.temperature == 0:
            return scores
        step = input_ids.shape[1] - self.prompt_width
        weights = (at_least_float32(scores).double() / self.temperature).softmax(-1)
        cumulative = weights.cumsum(-1)
        threshold = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True)
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, token, 0.0)


def uniform_stream(seed: int, key: str, length: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`length` numbers in [0, 1), a function of the seed and the key alone."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return generator.random(length)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[str],
    temperature: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
    batch_size: int = 64,
    precision: str = "fp32",
    progress: Callable[[int], None] = lambda done: None,
) -> list[SampledResponse]:
    """Sample one response for each prompt.

    The response to a prompt depends on its tokens, its key, the seed and the temperature (up to
    rounding in the model's arithmetic), not on the batch it is generated in. Prompts of like
    length share a batch.

    Args:
        model: a causal language model of transformers.
        prompts: token ids; none may be empty.
        keys: a name for each prompt's random stream, e.g. "12/0" for prompt 12, sample 0.
        temperature: divides the logits; 0 is greedy decoding. No top-k or top-p is applied.
        max_new_tokens: limit, the end token included; a response that reaches it is marked
        truncated. stop_ids: tokens that end a response.
        seed: of the whole call.
        batch_size: prompts generated at once.
        precision: "fp32" or "bf16".
        progress: called with the number of responses that each finished batch adds.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    responses: list[SampledResponse | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        streams = np.stack([uniform_stream(seed, keys[i], max_new_tokens) for i in chosen])
        generated = _generate_batch(
            model,
            [prompts[i] for i in chosen],
            torch.from_numpy(streams),
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            precision=precision,
        )
        for i, ids in zip(chosen, generated, strict=True):
            responses[i] = _until_stop(ids, set(stop_ids))
        progress(len(chosen))
    return [response for response in responses if response is not None]


def _generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    *,
    temperature: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    precision: str,
) -> list[list[int]]:
    """New ids of each prompt, up to and including its first stop token where there is one."""
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    pad = stop_ids[0]  # masked on the left, cut off after the stop token on the right
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling = SeededSampling(uniforms.to(device), temperature=temperature, prompt_width=width)
    # Greedy over the one token that the sampler left: none of the model's own defaults (top-k,
    # top-p,
    # repetition penalty) may take part, so its generation config is replaced, not amended.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        use_cache=True,
    )
    was_training = model.training
    own_config, model.generation_config = model.generation_config, config  # type: ignore[assignment]
    model.eval()
    try:
        with precision_context(precision, device):
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampling]),
            )
    finally:
        model.generation_config = own_config
        model.train(was_training)
    new: list[list[int]] = output[:, width:].tolist()
    return new


def _until_stop(ids: Sequence[int], stop: set[int]) -> SampledResponse:
    """The ids before the first stop token."""
    for position, token in enumerate(ids):
        if token in stop:
            return SampledResponse(tuple(ids[:position]), truncated=False)
    return SampledResponse(tuple(ids), truncated=True)
