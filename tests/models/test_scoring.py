"""Scoring: a row's value is its own, nothing is computed that is not needed, the model is left as
it was."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from scored_data import SHAPES, VOCAB, random_sequences
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from dpo.data.order import group_by_length
from dpo.data.prompts import resolve_template
from dpo.data.tokenize import Encoder, TokenSequence
from dpo.models.plan import scoring_plan
from dpo.models.scoring import response_logps, scored_logits
from tiny_models import ARCHITECTURES, make


class Passes:
    """Shapes of the inputs and head outputs of every forward pass of a model."""

    def __init__(self, model: nn.Module) -> None:
        scoring_plan(model)  # its trial is not counted
        self.inputs: list[Tensor] = []
        self.head_rows: list[int] = []
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: self.inputs.append(args[0])
        )
        model.get_output_embeddings().register_forward_hook(
            lambda module, args, output: self.head_rows.append(output.shape[:-1].numel())
        )

    @property
    def positions(self) -> list[int]:
        return [ids.numel() for ids in self.inputs]


def lognormal_sequences(number: int, *, seed: int = 0) -> list[TokenSequence]:
    """Lengths as in instruction data: many short, a few long (at most 64 tokens)."""
    draw = random.Random(seed)
    sequences = []
    for _ in range(number):
        prompt = min(30, max(1, round(draw.lognormvariate(2.0, 0.6))))
        response = min(34, max(1, round(draw.lognormvariate(2.3, 0.7))))
        ids = tuple(draw.randrange(VOCAB) for _ in range(prompt + response))
        sequences.append(TokenSequence(ids, prompt))
    return sequences


def padded(model: nn.Module) -> nn.Module:
    """The model, as one whose attention packing cannot serve."""
    model._supports_attention_backend = False
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"]
)
@torch.no_grad()
def test_a_row_alone_in_a_batch_in_any_order_or_split_scores_the_same(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    if dtype == torch.float64 and name in ("llama", "gemma2"):
        tolerance = 1e-6  # their norms round to float32 whatever the model's type
    model, sequences = make(name, VOCAB).to(dtype), random_sequences()
    alone = torch.cat([response_logps(model, [sequence]) for sequence in sequences])
    orders = [list(range(6)), [5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3], [3, 3, 0]]
    for order, max_tokens in itertools.product(orders, [1, 13, 40, 100, 10_000]):
        found = response_logps(model, [sequences[i] for i in order], max_tokens=max_tokens)
        torch.testing.assert_close(found, alone[order], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(name: str) -> None:
    """Padding is id 0: a model whose embedding of it is enormous scores the same."""
    model = make(name, VOCAB)
    model.get_output_embeddings().weight = nn.Parameter(
        model.get_output_embeddings().weight.clone()
    )
    sequences = [
        TokenSequence(tuple(max(1, i) for i in s.ids), s.prompt_length) for s in random_sequences()
    ]
    before = response_logps(model, sequences)
    model.get_input_embeddings().weight[0] = 1e4
    found = response_logps(model, sequences)
    torch.testing.assert_close(found, before, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_log_probability_sums_response_tokens_only() -> None:
    """It equals the difference of two scores of everything after the first token, and doubling a
    response adds the second half's conditional log-probability."""
    model = make("llama", VOCAB)
    draw = random.Random(0)
    prompt = [draw.randrange(VOCAB) for _ in range(7)]
    response = [draw.randrange(VOCAB) for _ in range(6)]

    def logp(ids: list[int], prompt_length: int) -> float:
        return response_logps(model, [TokenSequence(tuple(ids), prompt_length)]).item()

    whole = logp(prompt + response, 1)
    assert logp(prompt + response, 7) == pytest.approx(whole - logp(prompt, 1), abs=1e-4)
    doubled = logp(prompt + response + response, 7)
    assert doubled == pytest.approx(
        logp(prompt + response, 7) + logp(prompt + response + response, 13), abs=1e-4
    )


@torch.no_grad()
def test_a_model_without_context_gives_a_doubled_response_double_the_log_probability() -> None:
    """With one embedding for all tokens and positions only the target matters."""
    model = make("gpt2", VOCAB)
    head = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.lm_head.weight = head
    model.transformer.wte.weight[:] = model.transformer.wte.weight[0].clone()
    model.transformer.wpe.weight.zero_()
    once = TokenSequence((1, 2, 3, 4, 5), 2)
    twice = TokenSequence((1, 2, 3, 4, 5, 3, 4, 5), 2)
    single, double = response_logps(model, [once, twice]).tolist()
    assert double == pytest.approx(2 * single, abs=1e-4)


def test_no_pass_is_larger_than_the_budget_unless_one_sequence_is() -> None:
    model, sequences = make("gpt2", VOCAB), lognormal_sequences(60)
    passes = Passes(model)
    longest = max(len(s) for s in sequences)
    for max_tokens in (30, 64, 200, 1000):
        passes.inputs.clear()
        with torch.no_grad():
            response_logps(model, sequences, max_tokens=max_tokens)
        for ids in passes.inputs:
            assert ids.numel() <= max(max_tokens, longest)
        assert sum(passes.positions) <= sum(len(s) - 1 for s in sequences)


def test_packed_rows_hold_no_padding_and_every_sequence() -> None:
    model, sequences = make("gpt2", VOCAB), lognormal_sequences(200)
    distinct = len({s.ids[: s.prompt_length] for s in sequences}) == len(sequences)
    passes = Passes(model)
    with torch.no_grad():
        response_logps(model, sequences, max_tokens=2048)
    tokens = sum(len(s) - 1 for s in sequences)
    assert sum(passes.positions) == tokens if distinct else sum(passes.positions) < tokens
    assert all(ids.shape[0] == 1 for ids in passes.inputs)


def test_where_rows_are_padded_less_than_a_fifth_of_all_positions_is_padding() -> None:
    model, sequences = padded(make("gpt2", VOCAB)), lognormal_sequences(200)
    passes = Passes(model)
    with torch.no_grad():
        response_logps(model, sequences, max_tokens=2048)
    real = sum(len(s) for s in sequences)
    assert 1 - real / sum(passes.positions) < 0.2
    one_batch = len(sequences) * max(len(s) for s in sequences)
    assert 1 - real / one_batch > 0.4, "these lengths would not show it"
    assert len(passes.inputs) < len(sequences) / 5, "batches, not row by row"


def test_padding_is_small_on_real_instruction_pairs(shared_data) -> None:
    """Instruction pairs with GPT-2's tokenizer: all lengths, and the passes of the first pairs."""
    encoder = Encoder(
        GPT2Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer"),
        resolve_template("alpaca"),
        max_length=512,
    )
    rows = json.loads((shared_data / "instruction-preferences.json").read_text("utf-8"))
    sequences = [
        sequence
        for row in rows
        for sequence in encoder.encode(
            "\n\n".join(filter(None, [row["instruction"], row["input"]])),
            [row["chosen"], row["rejected"]],
        ).sequences
    ]
    lengths = [len(s) for s in sequences]
    groups = group_by_length(lengths, max_tokens=4096)
    padded = sum(max(lengths[i] for i in group) * len(group) for group in groups)
    assert 1 - sum(lengths) / padded < 0.05

    torch.manual_seed(0)
    config = GPT2Config(n_positions=512, n_embd=8, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config).eval()
    passes, first = Passes(model), sequences[:32]
    with torch.no_grad():
        response_logps(model, first, max_tokens=1024)
    assert max(passes.positions) <= 1024
    shared = 1 - sum(passes.positions) / sum(len(s) - 1 for s in first)
    assert shared > 0.3, "a third of the tokens stand in both sequences of a pair"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_computed_at_scored_positions_only(name: str) -> None:
    model, sequences = make(name, VOCAB), random_sequences()
    passes = Passes(model)
    with torch.no_grad():
        logits, targets, row = scored_logits(model, sequences)
    num_scored = sum(scored for _, scored in SHAPES)
    assert passes.head_rows == [num_scored]
    assert logits.shape == (num_scored, VOCAB)
    assert targets.tolist() == [t for s in sequences for t in s.ids[s.prompt_length :]]
    assert row.tolist() == [i for i, (_, scored) in enumerate(SHAPES) for _ in range(scored)]


def test_the_models_own_forward_is_back_afterwards() -> None:
    model, ids = make("gpt2", VOCAB), torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits
    with torch.no_grad():
        response_logps(model, random_sequences())
    assert "forward" not in vars(model.get_output_embeddings())
    assert torch.equal(model(ids).logits, before)


def test_the_models_own_forward_is_back_after_a_failure() -> None:
    model, ids = make("gpt2", VOCAB), torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits
    too_long = TokenSequence(tuple([1] * 66), 3)  # the model has 64 positions
    with pytest.raises(IndexError), torch.no_grad():
        response_logps(model, [too_long])
    assert "forward" not in vars(model.get_output_embeddings())
    assert torch.equal(model(ids).logits, before)


def test_a_head_whose_forward_was_replaced_by_others_keeps_the_replacement() -> None:
    """As accelerate does it for models that are spread over devices."""
    model, sequences = make("gpt2", VOCAB), random_sequences()
    head = model.get_output_embeddings()
    original = head.forward
    with torch.no_grad():
        plain = response_logps(model, sequences)
        head.forward = lambda hidden: 2 * original(hidden)
        doubled = response_logps(model, sequences)
        again = response_logps(model, sequences)
    assert not torch.equal(plain, doubled)
    assert torch.equal(doubled, again)


def test_two_passes_are_bitwise_equal_and_leave_no_trace_in_the_model() -> None:
    model, sequences = make("neox", VOCAB), random_sequences()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first = response_logps(model, sequences)
        second = response_logps(model, sequences)
    assert torch.equal(first, second)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_float64_and_carry_the_gradient(dtype: torch.dtype) -> None:
    model = make("gpt2", VOCAB).to(dtype)
    found = response_logps(model, random_sequences())
    assert found.dtype == torch.float64
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


def test_the_gradient_of_one_row_is_not_touched_by_the_others() -> None:
    model, sequences = make("gpt2", VOCAB).double(), random_sequences()
    response_logps(model, sequences)[3].backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    response_logps(model, [sequences[3]]).sum().backward()
    for found, parameter in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_bf16_rounds_the_trunk_only(name: str) -> None:
    """Logits are float32 and sums float64; weights stay float32. Measured on these models: at most
    0.0035 nat a token and 0.03 nat a response, and not zero, or bf16 would not be in use."""
    model, sequences = make(name, VOCAB), lognormal_sequences(40)
    logits, _, _ = scored_logits(model, sequences[:3], precision="bf16")
    assert logits.dtype == torch.float32
    exact = response_logps(model, sequences)
    found = response_logps(model, sequences, precision="bf16")
    assert found.dtype == torch.float64
    per_token = (found - exact).abs() / torch.tensor([s.num_scored for s in sequences])
    assert 0 < per_token.max() < 0.01
    assert (found - exact).abs().max() < 0.1
    assert all(p.dtype == torch.float32 for p in model.parameters())


@torch.no_grad()
def test_bf16_keeps_the_head_in_float32() -> None:
    """Rounding 50,257 logits to bfloat16 would cost up to 2^-8 of their size in each."""
    model = make("gpt2", VOCAB)
    seen: list[torch.dtype] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    logits, _, _ = scored_logits(model, random_sequences(), precision="bf16")
    assert set(seen) == {torch.float32}
    assert not torch.equal(logits, logits.bfloat16().float())
