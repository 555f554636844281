"""The KL from the reference: against enumeration of all responses, and its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scored_data import SHAPES, VOCAB, random_sequences
from torch import nn

from dpo.data.tokenize import TokenSequence
from dpo.models.divergence import KLEstimate, kl_and_entropy, on_policy_kl, sequence_kl
from tiny_models import ARCHITECTURES, make

SMALL = 4  # tokens, one of which ends a response
STOP = 3
LENGTH = 3


@torch.no_grad()
def log_distribution(model: nn.Module, ids: list[int]) -> list[float]:
    """log softmax of the next token after `ids`, by the equation in python's floats."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
    top = max(logits)
    log_normaliser = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - log_normaliser for z in logits]


def responses(prefix: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every response of at most LENGTH tokens, ended or cut."""
    if len(prefix) == LENGTH or STOP in prefix:
        yield prefix
        return
    for token in range(SMALL):
        yield from responses((*prefix, token))


def kl_by_enumeration(policy: nn.Module, reference: nn.Module, prompt: list[int]) -> float:
    """sum_y pi(y) (log pi(y) - log pi_ref(y)) over all responses y."""
    total = mass = 0.0
    for response in responses():
        log_p = log_q = 0.0
        for t, token in enumerate(response):
            log_p += log_distribution(policy, [*prompt, *response[:t]])[token]
            log_q += log_distribution(reference, [*prompt, *response[:t]])[token]
        mass += math.exp(log_p)
        total += math.exp(log_p) * (log_p - log_q)
    assert mass == pytest.approx(1)
    return total


def small_models() -> tuple[nn.Module, nn.Module]:
    return make("llama", SMALL, scale=10.0), make("llama", SMALL, seed=1, scale=10.0)


def estimate(
    policy: nn.Module, reference: nn.Module, prompts: list[list[int]], **more: int
) -> KLEstimate:
    return on_policy_kl(policy, reference, prompts, stop_ids=[STOP], max_new_tokens=LENGTH, **more)


PROMPTS = [[0], [1, 2], [2, 2, 0, 1], [0, 1, 0, 2, 2, 1, 0, 0]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_policy_equal_to_reference_has_a_kl_of_exactly_zero(name: str) -> None:
    found = on_policy_kl(
        make(name, VOCAB),
        make(name, VOCAB),
        [list(s.ids) for s in random_sequences()],
        stop_ids=[STOP],
        max_new_tokens=8,
    )
    assert found.mean == 0
    assert found.stderr == 0


def test_the_estimate_matches_enumeration_of_all_responses() -> None:
    """Within five standard errors, and those are small enough for it to mean something; the
    divergence the other way round is outside."""
    policy, reference = small_models()
    expected = np.mean([kl_by_enumeration(policy, reference, prompt) for prompt in PROMPTS])
    backward = np.mean([kl_by_enumeration(reference, policy, prompt) for prompt in PROMPTS])
    found = estimate(policy, reference, PROMPTS * 250)
    assert found.num_prompts == found.num_samples == 1000
    assert found.stderr < 0.04 * expected
    assert abs(found.mean - expected) < 5 * found.stderr
    assert abs(found.mean - backward) > 5 * found.stderr


def test_the_spread_of_estimates_over_seeds_is_the_stated_standard_error() -> None:
    policy, reference = small_models()
    found = [estimate(policy, reference, [PROMPTS[2]] * 40, seed=seed) for seed in range(60)]
    spread = np.std([one.mean for one in found], ddof=1)
    stated = np.mean([one.stderr for one in found])
    assert spread == pytest.approx(stated, rel=0.4)  # 60 draws know a spread to about 9%


def test_the_standard_error_falls_with_the_root_of_prompts_and_samples() -> None:
    policy, reference = small_models()
    few = estimate(policy, reference, [PROMPTS[2]] * 50)
    many = estimate(policy, reference, [PROMPTS[2]] * 800)
    repeated = estimate(policy, reference, [PROMPTS[2]] * 50, samples_per_prompt=16)
    assert repeated.num_prompts == 50
    assert repeated.num_samples == 800
    for found in (many, repeated):
        assert few.stderr / found.stderr == pytest.approx(4, rel=0.35)


def test_the_standard_error_is_over_prompts() -> None:
    """Prompts that differ in divergence keep it up however often each is sampled."""
    policy, reference = small_models()
    exact = [kl_by_enumeration(policy, reference, prompt) for prompt in PROMPTS]
    found = estimate(policy, reference, PROMPTS, samples_per_prompt=400)
    expected = np.std(exact, ddof=1) / math.sqrt(len(PROMPTS))
    assert found.stderr == pytest.approx(expected, rel=0.2)


def test_one_prompt_has_no_standard_error() -> None:
    policy, reference = small_models()
    found = estimate(policy, reference, PROMPTS[:1])
    assert math.isfinite(found.mean)
    assert math.isnan(found.stderr)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sequence_kl_equals_the_sum_written_out(name: str) -> None:
    """Over the scored positions only, whatever the batch."""
    policy, reference = make(name, VOCAB).double(), make(name, VOCAB, seed=1).double()
    sequences = random_sequences()
    expected = []
    for sequence in sequences:
        total = 0.0
        for t in range(sequence.prompt_length, len(sequence.ids)):
            log_p = log_distribution(policy, list(sequence.ids[:t]))
            log_q = log_distribution(reference, list(sequence.ids[:t]))
            total += sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        expected.append(total)
    for max_tokens in (16_384, 30, 1):
        found = sequence_kl(policy, reference, sequences, max_tokens=max_tokens)
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    in_float32 = sequence_kl(policy.float(), reference.float(), sequences)
    assert in_float32.tolist() == pytest.approx(expected, abs=1e-4)
    assert min(expected) > 1e-3


def test_entropies_equal_the_sum_written_out() -> None:
    """Of the policy alone, over the scored positions, whatever the batch."""
    policy, reference = make("llama", VOCAB).double(), make("llama", VOCAB, seed=1).double()
    sequences = random_sequences()
    expected = []
    for sequence in sequences:
        total = 0.0
        for t in range(sequence.prompt_length, len(sequence.ids)):
            log_p = log_distribution(policy, list(sequence.ids[:t]))
            total -= sum(math.exp(a) * a for a in log_p)
        expected.append(total)
    for max_tokens in (16_384, 1):
        kl, entropy = kl_and_entropy(policy, reference, sequences, max_tokens=max_tokens)
        assert entropy.tolist() == pytest.approx(expected, abs=1e-6)
        assert (kl == sequence_kl(policy, reference, sequences, max_tokens=max_tokens)).all()


def test_the_entropy_of_the_samples_is_a_mean_over_prompts_of_that_a_token() -> None:
    policy, reference = small_models()
    found = estimate(policy, reference, PROMPTS, samples_per_prompt=5)
    assert 0 < found.entropy < math.log(SMALL)
    assert found.entropy_stderr > 0
    uniform = make("llama", SMALL, scale=0.0)
    flat = estimate(uniform, reference, PROMPTS)
    assert flat.entropy == pytest.approx(math.log(SMALL), abs=1e-6)


def test_it_is_never_negative_when_the_policy_has_hardly_moved() -> None:
    policy, reference = make("gpt2", VOCAB), make("gpt2", VOCAB)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1e-8 * torch.randn_like(parameter))
    found = sequence_kl(policy, reference, random_sequences())
    assert found.min() >= 0
    assert found.max() < 1e-4


def test_samples_are_counted_with_their_end_and_truncation_is_said() -> None:
    policy, reference = small_models()
    found = estimate(policy, reference, PROMPTS * 100)
    probabilities = {
        response: math.exp(
            sum(
                log_distribution(policy, [*PROMPTS[0], *response[:t]])[token]
                for t, token in enumerate(response)
            )
        )
        for response in responses()
    }
    assert sum(probabilities.values()) == pytest.approx(1)
    one_prompt = estimate(policy, reference, [PROMPTS[0]] * 1000)
    truncated = sum(p for response, p in probabilities.items() if STOP not in response)
    tokens = sum(len(response) * p for response, p in probabilities.items())
    assert one_prompt.truncated == pytest.approx(truncated, abs=5 * 0.5 / math.sqrt(1000))
    assert one_prompt.tokens == pytest.approx(tokens, abs=5 / math.sqrt(1000))
    assert 0 < found.truncated < 1


def test_it_is_a_function_of_the_seed() -> None:
    policy, reference = small_models()
    first = estimate(policy, reference, PROMPTS * 5)
    assert estimate(policy, reference, PROMPTS * 5) == first
    assert estimate(policy, reference, PROMPTS * 5, seed=1).mean != first.mean


def test_sequences_of_one_scored_token_after_one_prompt_token() -> None:
    policy, reference = small_models()
    log_p, log_q = log_distribution(policy, [2]), log_distribution(reference, [2])
    expected = sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
    found = sequence_kl(policy, reference, [TokenSequence((2, 0), 1)])
    assert found.tolist() == pytest.approx([expected], abs=1e-5)
    assert SHAPES[0] == (1, 1)
