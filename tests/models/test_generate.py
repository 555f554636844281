"""Sampling: exact in distribution, a function of each row's own seed, free of the model's own
defaults."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn
from transformers import GenerationConfig

from dpo.models.generate import SeededSampling, generate, uniform_stream
from tiny_models import ARCHITECTURES, make

VOCAB = 40
STOP = 3


def random_prompts(number: int = 9, *, seed: int = 0) -> list[list[int]]:
    """Of 1 to 30 tokens: some longer than the sliding window (16) of the tiny Gemma 2."""
    draw = random.Random(seed)
    lengths = [1, 30, 7, 2, 18, 7, 12, 25, 3, 16][:number]
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


def sharp(name: str, vocab_size: int = VOCAB) -> nn.Module:
    """A random model whose next-token distributions are far from uniform."""
    return make(name, vocab_size, scale=12.0)


def sample(model: nn.Module, prompts: list[list[int]], **more: object):
    arguments = {
        "keys": [f"{i}/0" for i in range(len(prompts))],
        "temperature": 1.0,
        "max_new_tokens": 12,
        "stop_ids": [STOP],
        "seed": 0,
        **more,
    }
    return generate(model, prompts, **arguments)


@torch.no_grad()
def next_logits(model: nn.Module, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_response_is_the_same_alone_and_in_any_batch(name: str) -> None:
    model, prompts = sharp(name), random_prompts()
    together = sample(model, prompts)
    assert len({response.ids for response in together}) > 5
    for batch_size in (1, 2, 5):
        assert sample(model, prompts, batch_size=batch_size) == together
    order = [4, 8, 0, 3, 7, 1]
    keys = [f"{i}/0" for i in order]
    shuffled = sample(model, [prompts[i] for i in order], keys=keys, batch_size=4)
    assert shuffled == [together[i] for i in order]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_decoding_is_the_argmax_of_whole_forward_passes(name: str) -> None:
    """No cache and no padding on the other side, so positions, masks and cache must be right."""
    model, prompts = sharp(name), random_prompts()
    found = sample(model, prompts, temperature=0.0)
    for prompt, response in zip(prompts, found, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (ids[-1] != STOP or len(ids) == len(prompt)):
            ids.append(int(next_logits(model, ids).argmax()))
        new = ids[len(prompt) :]
        ended = new[-1] == STOP
        assert response.truncated is not ended
        assert list(response.ids) == (new[:-1] if ended else new)
    assert len({response.ids for response in found}) > 3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_samples_follow_their_own_uniform_numbers(name: str) -> None:
    """Each token inverts the cumulative distribution of a bare forward pass at its number."""
    model, prompts = sharp(name), random_prompts()
    for temperature in (0.5, 1.0):
        found = sample(model, prompts, temperature=temperature)
        for i, (prompt, response) in enumerate(zip(prompts, found, strict=True)):
            ids = list(prompt)
            for u in uniform_stream(0, f"{i}/0", 12)[: len(response.ids)]:
                logits = (next_logits(model, ids) / temperature).tolist()
                weights = [math.exp(z - max(logits)) for z in logits]
                cumulative = list(itertools.accumulate(weights))
                ids.append(next(v for v, c in enumerate(cumulative) if c > u * cumulative[-1]))
            assert tuple(ids[len(prompt) :]) == response.ids


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_first_token_frequencies_match_the_softmax_at_the_temperature(temperature: float) -> None:
    model, prompt, number = sharp("gpt2"), [5, 9, 2], 4000
    # A stop id is needed; the end token's share is counted by the empty response.
    found = sample(
        model,
        [prompt] * number,
        keys=[str(i) for i in range(number)],
        temperature=temperature,
        max_new_tokens=1,
        batch_size=1000,
    )
    counts = Counter(STOP if not r.truncated else r.ids[0] for r in found)
    expected = (next_logits(model, prompt) / temperature).softmax(-1).tolist()
    for token, p in enumerate(expected):
        deviation = abs(counts[token] / number - p)
        assert deviation < 5 * math.sqrt(p * (1 - p) / number) + 1 / number, token
    frequent = [t for t, p in enumerate(expected) if p * number >= 5]
    rest = 1 - sum(expected[t] for t in frequent)
    cells = [(counts[t], expected[t] * number) for t in frequent]
    cells.append((number - sum(c for c, _ in cells), max(rest * number, 1e-9)))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells if mean >= 5)
    assert statistic < chi2.ppf(1 - 1e-5, df=max(1, len(cells) - 1))
    other = (next_logits(model, prompt) / (1.5 - temperature)).softmax(-1)
    assert max(abs(other[t].item() - counts[t] / number) for t in range(VOCAB)) > 0.04


def test_two_tokens_have_the_joint_distribution_of_the_chain_rule() -> None:
    """One uniform number used twice, or one shared by rows, would show here."""
    model, prompt, number = sharp("llama", 5), [1, 4, 2], 4000
    found = sample(
        model,
        [prompt] * number,
        keys=[f"k{i}" for i in range(number)],
        max_new_tokens=2,
        batch_size=1000,
    )
    counts = Counter(r.ids + (() if r.truncated else (STOP,)) for r in found)
    first = next_logits(model, prompt).softmax(-1)
    expected: dict[tuple[int, ...], float] = {(STOP,): first[STOP].item()}
    for a in set(range(5)) - {STOP}:
        second = next_logits(model, [*prompt, a]).softmax(-1)
        for b in range(5):
            expected[(a, b)] = (first[a] * second[b]).item()
    assert sum(expected.values()) == pytest.approx(1)
    assert counts.keys() <= expected.keys()
    for cell, p in expected.items():
        bound = 5 * math.sqrt(p * (1 - p) / number) + 1 / number
        assert abs(counts[cell] / number - p) < bound, cell


def test_a_temperature_near_zero_is_greedy() -> None:
    model, prompts = sharp("gpt2"), random_prompts()
    greedy = sample(model, prompts, temperature=0.0)
    assert sample(model, prompts, temperature=1e-6) == greedy


def test_the_sampler_inverts_the_cumulative_distribution_by_hand() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.3, 0.2, 0.0]]).double()
    last = math.nextafter(1.0, 0.0)
    for u, token in [(0.0, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (last, 3)]:
        sampling = SeededSampling(
            torch.tensor([[u]], dtype=torch.float64), temperature=1.0, prompt_width=2
        )
        forced = sampling(torch.zeros(1, 2, dtype=torch.long), probabilities.log())
        assert forced.argmax().item() == token
        assert forced.isfinite().sum() == 1


def test_uniform_streams_are_functions_of_seed_and_key() -> None:
    first = uniform_stream(0, "12/0", 8)
    assert np.array_equal(first, uniform_stream(0, "12/0", 8))
    assert np.array_equal(first[:3], uniform_stream(0, "12/0", 3)), "longer streams go on"
    others = [uniform_stream(1, "12/0", 8), uniform_stream(0, "12/1", 8), uniform_stream(0, "", 8)]
    assert all(not np.isclose(first, other).any() for other in others)
    many = np.stack([uniform_stream(0, str(i), 2) for i in range(4000)])
    assert abs(many.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 8000)
    assert abs(np.corrcoef(many.T)[0, 1]) < 5 / math.sqrt(4000)


def test_seed_key_and_temperature_change_the_samples() -> None:
    model, prompts = sharp("gpt2"), random_prompts()
    base = sample(model, prompts)
    assert sample(model, prompts) == base
    assert sample(model, prompts, seed=1) != base
    assert sample(model, prompts, keys=[f"{i}/1" for i in range(9)]) != base
    same_prompt = sample(model, [prompts[2]] * 6, keys=list("abcdef"))
    assert len({r.ids for r in same_prompt}) > 1


def test_global_random_state_takes_no_part_and_is_left_alone() -> None:
    model, prompts = sharp("gpt2"), random_prompts()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(model, prompts)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample(model, prompts) == first


@pytest.mark.parametrize(
    "own",
    [
        {"top_k": 1, "do_sample": True},
        {"repetition_penalty": 5.0},
        {"min_new_tokens": 10},
        {"suppress_tokens": list(range(5, 30))},
        {"forced_eos_token_id": STOP},
        {"forced_bos_token_id": 7},
        {"eos_token_id": [8, 9, 10, 11], "max_length": 5},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"temperature": 0.1, "top_p": 0.1, "do_sample": True},
    ],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_own_generation_config_takes_no_part(own: dict, temperature: float) -> None:
    model, prompts = sharp("gpt2"), random_prompts()
    expected = sample(model, prompts, temperature=temperature)
    model.generation_config = config = GenerationConfig(**own)
    before = config.to_dict()
    assert sample(model, prompts, temperature=temperature) == expected
    assert model.generation_config is config
    assert config.to_dict() == before


def test_mode_and_generation_config_are_restored_even_after_a_failure() -> None:
    model = sharp("gpt2")
    own = model.generation_config
    model.train()
    expected = sample(sharp("gpt2"), random_prompts())
    assert sample(model, random_prompts()) == expected, "dropout is off while generating"
    assert model.training
    with pytest.raises(IndexError):
        sample(model, [[1] * 65])  # the model has 64 positions
    assert model.training
    assert model.generation_config is own


@pytest.mark.parametrize("stop_ids", [[STOP], [STOP, 7], list(range(20))])
def test_end_tokens_are_never_in_the_ids_and_the_limit_marks_truncation(
    stop_ids: list[int],
) -> None:
    model = sharp("gpt2")
    prompts = random_prompts() * 6
    keys = [str(i) for i in range(len(prompts))]
    found = sample(model, prompts, keys=keys, stop_ids=stop_ids)
    for response in found:
        assert not set(response.ids) & set(stop_ids)
        assert len(response.ids) == 12 if response.truncated else len(response.ids) < 12
    assert {r.truncated for r in found} == ({False} if len(stop_ids) == 20 else {True, False})


def test_a_longer_limit_goes_on_from_the_shorter_ones_response() -> None:
    """And the end token on the last allowed place is an end, not a truncation."""
    model, prompts = sharp("gpt2"), random_prompts() * 4
    keys = [str(i) for i in range(len(prompts))]
    long = sample(model, prompts, keys=keys, max_new_tokens=12)
    ended = [r for r in long if not r.truncated]
    for limit in sorted({len(r.ids) + 1 for r in ended} | {1}):
        for short, whole in zip(
            sample(model, prompts, keys=keys, max_new_tokens=limit), long, strict=True
        ):
            assert short.ids == whole.ids[:limit]
            assert short.truncated == (whole.truncated or len(whole.ids) + 1 > limit)


def test_progress_counts_every_response_once() -> None:
    seen: list[int] = []
    sample(sharp("gpt2"), random_prompts(), batch_size=4, max_new_tokens=2, progress=seen.append)
    assert seen == [4, 4, 1]


def test_bf16_samples_are_reproducible() -> None:
    model, prompts = sharp("llama"), random_prompts()
    first = sample(model, prompts, precision="bf16")
    assert sample(model, prompts, precision="bf16") == first
    assert all(p.dtype == torch.float32 for p in model.parameters())
