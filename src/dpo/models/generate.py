"""Batched sampling in which every response is a function of its own seed, not of its batch."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dpo.core.logps import at_least_float32
from dpo.errors import DivergedError, InputError
from dpo.models.forward import float32_head, head_replaced, precision_context
from dpo.models.load import max_positions
from dpo.models.parts import device_of

SHRINK_AT = 1 / 8
"""Ended responses leave once they are this share of the batch, because leaving copies the cache."""


@dataclass(frozen=True, slots=True)
class SampledResponse:
    """Generated ids, and the end token that came after them: one of several, for some models."""

    ids: tuple[int, ...]
    end: int | None
    """None where the token limit came first."""

    @property
    def truncated(self) -> bool:
        return self.end is None

    @property
    def drawn(self) -> tuple[int, ...]:
        """All that was sampled, the end token included."""
        return self.ids if self.end is None else (*self.ids, self.end)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """P different prompts that are run together, and their R responses."""

    prompts: list[tuple[int, ...]]
    prompt_of_row: Tensor
    """(R,), which of the prompts each response belongs to."""
    uniforms: Tensor
    """(R, T) in [0, 1): the number that decides new token t of each response."""
    temperature: float
    stop_ids: list[int]


# -- one token -----------------------------------------------------------------------------------


def uniform_stream(seed: int, key: str, length: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`length` numbers in [0, 1), a function of the seed and the key alone."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return generator.random(length)


def draw_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float) -> Tensor:
    """One token of each row, (R,), found by inverting the cumulative distribution at its number.

    `min {v : sum_{w <= v} p_w > u}` with `p = softmax(z / temperature)`; temperature 0 is the
    argmax. The exponentials have the precision of the logits, whose own rounding is larger than
    theirs; the sums are float64, because in float32 a token of probability 1e-7 may get no room.

    Args:
        logits: (R, V), in at least float32.
        uniforms: (R,), float64 in [0, 1).

    Raises:
        DivergedError: a row has a NaN, an infinite logit or no finite one.
    """
    highest = logits.amax(-1, keepdim=True)  # NaN where any logit of the row is
    if not highest.isfinite().all():
        raise DivergedError("sampling: the model's logits are not finite.")
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = ((logits - highest) / temperature).exp_().double().cumsum_(-1)
    threshold = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


# -- many responses ------------------------------------------------------------------------------


@torch.no_grad()  # not inference_mode: what a model caches in its forward pass must stay trainable
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
    """Sample one response for each prompt; for several samples of a prompt, repeat it.

    The response to a prompt depends on its tokens, its key, the seed and the temperature (up to
    rounding in the model's arithmetic), not on the batch it is generated in. Prompts of like
    length share a batch, and equal prompts of a batch are encoded once.

    Args:
        model: a causal language model of transformers.
        prompts: token ids; none may be empty. None is cut.
        keys: a name for each prompt's random stream, e.g. "12/0" for prompt 12, sample 0.
        temperature: divides the logits; 0 is greedy decoding. No top-k or top-p is applied.
        max_new_tokens: limit, the end token included; a response that reaches it is truncated.
        stop_ids: tokens that end a response.
        seed: of the whole call.
        batch_size: responses generated at once.
        precision: "fp32" or "bf16" for the trunk; logits are float32 either way.
        progress: called with the number of responses that each finished batch adds.

    Raises:
        InputError: an argument is out of range, or a prompt is empty or leaves no room for
            `max_new_tokens` within the model's positions.
        DivergedError: the model's logits are not finite.
    """
    positions = max_positions(model)
    check_sampling(
        prompts,
        keys,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        positions=positions,
        room=positions + 1 - max_new_tokens,  # the last new token is never fed
    )
    if batch_size < 1:
        raise InputError(f"sampling: batch_size must be at least 1, not {batch_size}.")
    responses: dict[int, SampledResponse] = {}
    device = device_of(model)
    context = precision_context(precision, device)
    with _evaluation_mode(model), _last_position_only(model), context:
        plain = bool(prompts) and has_plain_cache(model, prompts[0][0])
        for rows in _batches(prompts, batch_size, equal_lengths=not plain):
            different = list(dict.fromkeys(tuple(prompts[i]) for i in rows))
            place = {prompt: p for p, prompt in enumerate(different)}
            streams = np.stack([uniform_stream(seed, keys[i], max_new_tokens) for i in rows])
            batch = SamplingBatch(
                prompts=different,
                prompt_of_row=torch.tensor([place[tuple(prompts[i])] for i in rows]).to(device),
                uniforms=torch.from_numpy(streams).to(device),
                temperature=temperature,
                stop_ids=list(stop_ids),
            )
            new = (decode if plain else decode_by_transformers)(model, batch)
            for i, ids in zip(rows, new.tolist(), strict=True):
                responses[i] = until_stop(ids, set(stop_ids))
            progress(len(rows))
    return [responses[i] for i in range(len(prompts))]


def check_sampling(
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    *,
    temperature: float,
    max_new_tokens: int,
    positions: int,
    room: int,
) -> None:
    """Refuse what cannot be sampled, whoever samples.

    Args:
        positions: of the model.
        room: how many tokens of a prompt they leave.

    Raises:
        InputError: an argument is out of range, or a prompt is empty or leaves no room.
    """
    if len(keys) != len(prompts):
        raise InputError(f"sampling: {len(prompts)} prompts need as many keys; got {len(keys)}.")
    if not 0 <= temperature < math.inf:
        raise InputError(f"sampling: the temperature must be 0 or more, not {temperature}.")
    if max_new_tokens < 1:
        raise InputError(f"sampling: max_new_tokens must be at least 1, not {max_new_tokens}.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"sampling: prompt {i} has no tokens.")
        if len(prompt) > room:
            raise InputError(
                f"sampling: prompt {i} has {len(prompt)} tokens; {max_new_tokens} new tokens leave "
                f"room for {room} in the model's {positions} positions."
            )


def _batches(
    prompts: Sequence[Sequence[int]], batch_size: int, *, equal_lengths: bool
) -> list[list[int]]:
    """Indices of the prompts in batches of at most `batch_size`, from the longest to the shortest.

    Equal prompts are kept together; only where they are more than a batch are they split.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt), []).append(i)
    batches: list[list[int]] = []
    for prompt in sorted(places, key=len, reverse=True):
        rows, last = places[prompt], batches[-1] if batches else []
        alike = not equal_lengths or not last or len(prompts[last[0]]) == len(prompt)
        if last and alike and len(last) + len(rows) <= batch_size:
            last += rows
        else:
            batches += [rows[k : k + batch_size] for k in range(0, len(rows), batch_size)]
    return batches


def until_stop(ids: Sequence[int], stop: set[int]) -> SampledResponse:
    """The ids before the first stop token."""
    for position, token in enumerate(ids):
        if token in stop:
            return SampledResponse(tuple(ids[:position]), end=token)
    return SampledResponse(tuple(ids), end=None)


# -- one batch -----------------------------------------------------------------------------------


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is off; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _last_position_only(model: nn.Module) -> Iterator[None]:
    """Inside, the model's output head sees only the last hidden state of each row, in float32.

    As in scoring: prompt positions predict nothing that is needed, and logits rounded to bfloat16
    would be another distribution than the one that is scored.
    """
    head = float32_head(model)
    with head_replaced(model, lambda hidden: head(hidden[:, -1:])):
        yield


def has_plain_cache(model: nn.Module, token: int) -> bool:
    """Whether `decode` can run the model: all that it remembers is keys and values by position.

    What the model makes for itself in a pass over one token shows it. Recurrent states (whose rows
    cannot be chosen), memory outside the cache and models that prepare inputs of their own for
    generation are left to transformers.
    """
    prepare = getattr(type(model), "prepare_inputs_for_generation", None)
    if prepare is not GenerationMixin.prepare_inputs_for_generation:
        return False
    if getattr(model, "_is_stateful", False):
        return False
    ids = torch.tensor([[token]], device=device_of(model))
    cache = model(input_ids=ids, use_cache=True, return_dict=True).get("past_key_values")
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


class GrowingLayer(DynamicLayer):
    """A layer of the cache with room for what comes: most steps write one column and copy nothing.

    The layer it replaces concatenates, which copies the whole memory for every new token.
    """

    room = 32
    """Positions by which it grows when it is full."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.get_seq_length()
        # (B, heads, at least `length`, width of a head) each
        self.stored = [layer.keys, layer.values]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (x[:, :, : self.length] for x in self.stored)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Remember new positions, and return all of them."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        missing = self.length - self.stored[0].shape[-2]
        if missing > 0:
            more = (0, 0, 0, max(missing, self.room))
            self.stored = [nn.functional.pad(x, more) for x in self.stored]
        for x, new in zip(self.stored, (key_states, value_states), strict=True):
            x[:, :, start : self.length] = new
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.stored = [x[indices] for x in self.stored]
        self._show()


def decode(model: nn.Module, batch: SamplingBatch) -> Tensor:
    """New ids of each response, (R, T); what stands after its first stop token means nothing.

    The prompts go through the model once. Then each step feeds one token a response, and those
    that have ended leave the batch, though only when enough have to pay for moving the memory.
    """
    num_rows, limit = batch.uniforms.shape
    device, owner = batch.uniforms.device, batch.prompt_of_row
    stop = torch.tensor(batch.stop_ids, device=device, dtype=torch.long)
    new = torch.zeros(num_rows, limit, device=device, dtype=torch.long)

    ids, mask = _pad_left(batch.prompts, device)
    logits, cache = _forward(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None)
    cache.batch_select_indices(owner)  # a copy of its prompt's memory for each response
    cache.layers = [GrowingLayer(x) if type(x) is DynamicLayer else x for x in cache.layers]
    logits, width, length = logits[owner], mask.shape[1], mask.sum(-1)[owner]
    mask = torch.cat([mask[owner], mask.new_ones(num_rows, limit)], dim=1)

    live = torch.arange(num_rows, device=device)  # the responses that are still in the batch
    ended = torch.zeros(num_rows, device=device, dtype=torch.bool)  # those of them that stay on
    for t in range(limit):
        token = draw_tokens(logits, batch.uniforms[live, t], temperature=batch.temperature)
        new[live, t] = token
        ended |= torch.isin(token, stop)
        num_ended = int(ended.sum())
        if num_ended == len(live) or t == limit - 1:
            break
        if num_ended >= SHRINK_AT * len(live):
            going = (~ended).nonzero().squeeze(-1)
            cache.batch_select_indices(going)
            live, token, ended = live[going], token[going], ended[going]
        seen, position = mask[live, : width + t + 1], length[live] + t
        logits, cache = _forward(model, token.unsqueeze(-1), seen, position.unsqueeze(-1), cache)
    return new


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (P, longest), padded on the left so that every row ends together."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _forward(
    model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any
) -> tuple[Tensor, Any]:
    """Logits after the last of the new ids, (B, V), and the cache with them added.

    Args:
        ids: (B, S).
        mask: (B, cached + S), 0 where a row has padding.
        positions: (B, S), counted from each row's own beginning.
        cache: None where the ids are the first; the model then makes the kind that it needs.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    output = model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **({"position_ids": positions} if takes_positions else {}),
    )
    return at_least_float32(output.logits[:, -1]), output.past_key_values


# -- one batch, by transformers -------------------------------------------------------------------


class SeededSampling(LogitsProcessor):
    """Makes greedy decoding follow `draw_tokens`: every token but the drawn one is forbidden."""

    def __init__(self, uniforms: Tensor, *, temperature: float, prompt_width: int) -> None:
        self.uniforms = uniforms  # (B, max_new_tokens)
        self.temperature = temperature
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_width
        token = draw_tokens(scores, self.uniforms[:, step], temperature=self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(-1), 0.0)


def decode_by_transformers(model: nn.Module, batch: SamplingBatch) -> Tensor:
    """The same as `decode` for any model, by transformers' own loop, and slower.

    Each response encodes its prompt, and ended ones stay. The prompts must be of one length: a
    recurrent layer may take padding for text.
    """
    device = batch.uniforms.device
    ids = torch.tensor(batch.prompts, device=device)[batch.prompt_of_row]
    sampling = SeededSampling(
        batch.uniforms, temperature=batch.temperature, prompt_width=ids.shape[1]
    )
    # None of the model's own defaults (top-k, top-p, repetition penalty) may take part, so its
    # generation config is replaced, not amended.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=batch.uniforms.shape[1],
        eos_token_id=batch.stop_ids or None,
        pad_token_id=0,
        use_cache=True,
    )
    own_config, model.generation_config = model.generation_config, config  # type: ignore[assignment]
    try:
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampling]),
        )
    finally:
        model.generation_config = own_config
    new: Tensor = output[:, ids.shape[1] :]
    return new
