"""Packed prefix trees give what padded rows give: log-probabilities, losses, gradients; for every
architecture that is served packed, and with nothing of a row seen by its neighbours."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tiny_models
from dpo.core import losses
from dpo.data.pack import pack, pad
from dpo.data.tokenize import TokenSequence
from dpo.models.plan import scoring_plan
from dpo.models.recompute import enable_recomputation, recompute_without_dropout
from dpo.models.scoring import response_logps, scored_logits

VOCAB = 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MORE: dict[str, Callable[[], nn.Module]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, **SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=6, **SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(head_dim=8, sliding_window=5, **SIZES)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(logit_scale=0.3, **SIZES)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=4.0, **SIZES)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**{**SIZES, "num_key_value_heads": 4})),
}
NAMES = [*tiny_models.ARCHITECTURES, *MORE]


def make(name: str) -> nn.Module:
    """A random model whose logits differ widely, in evaluation mode."""
    if name in tiny_models.ARCHITECTURES:
        return tiny_models.make(name, VOCAB)
    torch.manual_seed(0)
    model = MORE[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
    return model.eval()


def padded_logps(model: nn.Module, sequences: list[TokenSequence]) -> Tensor:
    """An independent way: transformers' own forward and masks, one sequence at a time."""
    sums = []
    for s in sequences:
        logits = model(input_ids=torch.tensor([s.ids]), use_cache=False).logits[0]
        logps = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(s.ids[1:])[:, None])
        sums.append(logps[s.prompt_length - 1 :].double().sum())
    return torch.stack(sums)


def random_trees(seed: int = 0) -> list[TokenSequence]:
    """One-token prompts and responses, equal responses, one the beginning of another, K up to 8."""
    draw = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(n))

    found = []
    for prompt_length, num_responses in [(1, 1), (7, 2), (1, 8), (12, 3), (3, 4)]:
        prompt, common = tokens(prompt_length), tokens(draw.randrange(3))
        for _ in range(num_responses):
            response = common + tokens(draw.choice([1, 1, 2, 5, 9]))
            found.append(TokenSequence(prompt + response, prompt_length))
    found += [found[1], TokenSequence((*found[1].ids, *tokens(3)), found[1].prompt_length)]
    draw.shuffle(found)
    return found


def pair_loss(logps: Tensor) -> Tensor:
    """DPO of neighbours against a reference of zeros."""
    chosen, rejected = logps[0::2], logps[1::2]
    nothing = torch.zeros_like(chosen)
    return losses.dpo(chosen, rejected, nothing, nothing, beta=0.3).mean()


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.to_dense().flatten().double() for g in gradients])


@pytest.mark.parametrize("name", NAMES)
def test_it_is_packed_with_the_fused_head(name: str) -> None:
    plan = scoring_plan(make(name))
    assert plan.packed
    assert plan.form is not None


@pytest.mark.parametrize("name", NAMES)
def test_packed_log_probabilities_and_gradients_equal_one_sequence_at_a_time(name: str) -> None:
    model, sequences = make(name), random_trees()
    found, expected = response_logps(model, sequences), padded_logps(model, sequences)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    a, b = gradient(found.sum(), model), gradient(expected.sum(), model)
    assert (a - b).norm() <= 2e-6 * b.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3"])
def test_in_float32_the_loss_is_within_1e6_and_the_gradient_within_5e6_of_float64(name) -> None:
    """And packed is not further from float64 than one sequence at a time is, within a factor."""
    model, sequences = make(name), random_trees(1)[:20]
    exact = copy.deepcopy(model).double()
    reference = pair_loss(padded_logps(exact, sequences))
    loss = pair_loss(response_logps(model, sequences))
    assert abs(loss.item() / reference.item() - 1) <= 1e-6
    right = gradient(reference, exact)
    packed = (gradient(loss, model) - right).norm() / right.norm()
    plain = gradient(pair_loss(padded_logps(model, sequences)), model)
    assert packed <= 5e-6
    assert packed <= 3 * (plain - right).norm() / right.norm()


TOKENS = st.integers(0, VOCAB - 1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mistral"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    trees=st.lists(
        st.tuples(
            st.lists(TOKENS, min_size=1, max_size=10),
            st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_random_trees_in_float64(name: str, trees) -> None:
    model = _in_float64(name)
    sequences = [
        TokenSequence((*prompt, *response), len(prompt))
        for prompt, responses in trees
        for response in responses
    ]
    with torch.no_grad():
        found, expected = response_logps(model, sequences), padded_logps(model, sequences)
    # Rotary embeddings and the norms of these models round to float32 whatever the model's type.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 if name == "gpt2" else 2e-5)


_cache: dict[str, nn.Module] = {}


def _in_float64(name: str) -> nn.Module:
    if name not in _cache:
        _cache[name] = make(name).double()
    return _cache[name]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_neighbour_changes_nothing(name: str) -> None:
    """Other trees before it, other branches beside it, with enormous embeddings."""
    model = make(name)
    sequence = TokenSequence((1, 2, 3, 4, 5, 6), 3)
    other = TokenSequence((1, 2, 3, 7, 7, 7, 7), 3)
    before = TokenSequence((7, 7, 7, 8), 2)
    alone = response_logps(model, [sequence])
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone())  # where it was the embedding's too
    model.get_input_embeddings().weight[7] = 50.0
    found = response_logps(model, [before, other, sequence, other])
    torch.testing.assert_close(found[2:3], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_shared_prompt_goes_through_the_model_once(name: str) -> None:
    model = make(name)
    scoring_plan(model)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].numel())
    )
    prompt = tuple(range(1, 11))
    sequences = [TokenSequence((*prompt, k, 20 + k, 30 + k), 10) for k in range(8)]
    with torch.no_grad():
        response_logps(model, sequences)
    assert seen == [10 + 8 * 2]


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_any_budget_gives_the_same(name: str) -> None:
    model, sequences = make(name), random_trees()
    expected = response_logps(model, sequences)
    wanted = gradient(expected.sum(), model)
    for max_tokens, max_logit_bytes in [(1, 1), (20, 1000), (50, 1 << 20)]:
        found = response_logps(
            model, sequences, max_tokens=max_tokens, max_logit_bytes=max_logit_bytes
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        assert (gradient(found.sum(), model) - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_gradient_checkpointing_changes_no_value_and_recomputes_the_layers(name: str) -> None:
    model, sequences = make(name), random_trees()
    expected = gradient(response_logps(model, sequences).sum(), model)
    enable_recomputation(model)
    recompute_without_dropout(model)
    passes: list[int] = []
    layers = getattr(model, model.base_model_prefix)
    first = (layers.h if hasattr(layers, "h") else layers.layers)[0]
    norm = next(m for m in first.modules() if "Norm" in type(m).__name__)
    norm.register_forward_hook(lambda *args: passes.append(1))
    loss = response_logps(model, sequences).sum()
    assert len(passes) == 1
    torch.testing.assert_close(gradient(loss, model), expected, rtol=1e-5, atol=1e-6)
    assert len(passes) == 2
    model.eval()


def test_dropout_is_applied_inside_packed_attention() -> None:
    model, sequences = make("gpt2"), random_trees()
    model.train()
    for module in model.modules():
        if (
            isinstance(module, nn.Dropout)
            and module is not model.transformer.h[0].attn.attn_dropout
        ):
            module.p = 0.0
    torch.manual_seed(0)
    first = response_logps(model, sequences)
    second = response_logps(model, sequences)
    torch.manual_seed(0)
    again = response_logps(model, sequences)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_logits_stand_in_the_order_of_the_targets_whatever_the_layout() -> None:
    model, sequences = make("llama"), random_trees()
    logits, targets, owner = scored_logits(model, sequences)
    assert targets.tolist() == [t for s in sequences for t in s.ids[s.prompt_length :]]
    for batch in (pack(sequences), pad(sequences)):
        assert owner.tolist() == batch.sequence.tolist()
    for n in (0, 7, len(targets) - 1):
        s = sequences[int(owner[n])]
        position = s.prompt_length + int((owner[:n] == owner[n]).sum())
        own = model(input_ids=torch.tensor([s.ids[:position]])).logits[0, -1]
        torch.testing.assert_close(logits[n], own, rtol=0, atol=1e-4)


def test_the_attention_of_the_model_is_back_afterwards() -> None:
    model = make("llama")
    before = model.config._attn_implementation
    with torch.no_grad():
        response_logps(model, random_trees())
    assert model.config._attn_implementation == before
    assert model.get_input_embeddings().sparse is False
