"""Log-probabilities, losses and gradients against the equations, written out in float64.

The independent side runs the model once for every scored token, on the bare prefix, and does the
rest with loops over tokens. It shares nothing with the package but the model.
"""

from __future__ import annotations

import math

import pytest
import torch
from scored_data import (
    SHAPES,
    VOCAB,
    preference_method,
    random_pairs,
    random_sequences,
    supervised_method,
)
from torch import Tensor, nn

from dpo.config import DPOLossConfig
from dpo.data.tokenize import TokenSequence
from dpo.models.scoring import response_logps
from dpo.train.encoded import EncodedPair
from tiny_models import ARCHITECTURES, make


def logp_by_hand(model: nn.Module, sequence: TokenSequence) -> Tensor:
    """sum_t log softmax(model(y_<t))[y_t] over the response, one prefix at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(sequence.prompt_length, len(sequence.ids)):
        prefix = torch.tensor([sequence.ids[:t]])
        scores = model(input_ids=prefix).logits[0, -1]
        top = scores.detach().max()
        log_normaliser = torch.log(torch.exp(scores - top).sum()) + top
        total = total + scores[sequence.ids[t]] - log_normaliser
    return total


def dpo_by_hand(
    policy: nn.Module, reference: nn.Module, pairs: list[EncodedPair], *, beta: float, eps: float
) -> Tensor:
    """The mean over pairs of -(1 - eps) log sigmoid(u) - eps log sigmoid(-u)."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        with torch.no_grad():
            reference_gap = logp_by_hand(reference, pair.chosen) - logp_by_hand(
                reference, pair.rejected
            )
        policy_gap = logp_by_hand(policy, pair.chosen) - logp_by_hand(policy, pair.rejected)
        margin = beta * (policy_gap - reference_gap)
        straight = -torch.log(1 / (1 + torch.exp(-margin)))
        flipped = -torch.log(1 / (1 + torch.exp(margin)))
        total = total + (1 - eps) * straight + eps * flipped
    return total / len(pairs)


def sft_by_hand(policy: nn.Module, sequences: list[TokenSequence]) -> Tensor:
    """The mean over all scored tokens of -log pi(y_t | y_<t)."""
    total = torch.stack([logp_by_hand(policy, sequence) for sequence in sequences]).sum()
    return -total / sum(len(s.ids) - s.prompt_length for s in sequences)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_equal_the_equation(name: str) -> None:
    model, sequences = make(name, VOCAB).double(), random_sequences()
    with torch.no_grad():
        expected = torch.stack([logp_by_hand(model, sequence) for sequence in sequences])
        for max_tokens in (16_384, 30):
            found = response_logps(model, sequences, max_tokens=max_tokens)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        in_float32 = response_logps(model.float(), sequences)
    torch.testing.assert_close(in_float32, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_dpo_loss_and_gradients_equal_the_equation(name: str, eps: float) -> None:
    policy, reference = make(name, VOCAB).double(), make(name, VOCAB, seed=1).double()
    pairs, rows = random_pairs(), range(len(SHAPES))
    config = DPOLossConfig(beta=0.3, label_smoothing=eps)
    loss = dpo_by_hand(policy, reference, pairs, beta=0.3, eps=eps)
    expected = gradients(loss, policy)
    assert loss.item() != pytest.approx(math.log(2), abs=1e-2)

    method = preference_method(reference, pairs, config, max_tokens=50)
    found_loss = method.loss(policy, rows).loss / method.weight(rows)
    found = gradients(found_loss, policy)
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=key)

    method = preference_method(reference.float(), pairs, config, max_tokens=50)
    found_loss = method.loss(policy.float(), rows).loss / method.weight(rows)
    found = gradients(found_loss, policy)
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-4)
    for key, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[key].double() / scale, value / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sft_loss_and_gradients_equal_the_equation(name: str) -> None:
    policy, sequences = make(name, VOCAB).double(), random_sequences()
    loss = sft_by_hand(policy, sequences)
    expected = gradients(loss, policy)
    method, rows = supervised_method(sequences, max_tokens=50), range(len(sequences))
    found_loss = method.loss(policy, rows).loss / method.weight(rows)
    found = gradients(found_loss, policy)
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert method.evaluate(policy)["eval/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("name", "step", "tolerance"),
    [("gpt2", 1e-5, 1e-6), ("neox", 1e-5, 1e-6), ("llama", 1e-3, 1e-3)],
)
def test_gradients_equal_central_differences(name: str, step: float, tolerance: float) -> None:
    """Of the DPO and the SFT loss, at an entry of every parameter, without autograd. Llama's norm
    rounds to float32 whatever the model's type, so its step has to be wide."""
    policy, reference = make(name, VOCAB).double(), make(name, VOCAB, seed=1).double()
    pairs, rows = random_pairs()[:3], range(3)
    dpo_method = preference_method(reference, pairs, DPOLossConfig(beta=0.3), max_tokens=999)
    sft_method = supervised_method(random_sequences()[:3], max_tokens=999)
    generator = torch.Generator().manual_seed(0)
    for method in (dpo_method, sft_method):
        exact = gradients(method.loss(policy, rows).loss, policy)
        for key, parameter in policy.named_parameters():
            position = int(torch.randint(parameter.numel(), (), generator=generator))
            entry = parameter.data.view(-1)
            before, values = entry[position].item(), []
            with torch.no_grad():
                for moved in (before + step, before - step):
                    entry[position] = moved
                    values.append(method.loss(policy, rows).loss.item())
                entry[position] = before
            numeric = (values[0] - values[1]) / (2 * step)
            assert exact[key].view(-1)[position].item() == pytest.approx(
                numeric, rel=tolerance, abs=tolerance
            ), key


def test_a_model_of_zeros_gives_every_token_one_over_the_vocabulary() -> None:
    model = make("gpt2", VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        found = response_logps(model, random_sequences())
    expected = [-num_scored * math.log(VOCAB) for _, num_scored in SHAPES]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_policy_equal_to_reference_costs_log_two_and_ties() -> None:
    policy = make("llama", VOCAB)
    method = preference_method(policy, random_pairs(), DPOLossConfig(beta=0.1), max_tokens=60)
    metrics = method.evaluate(policy)
    assert metrics["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["eval/rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert metrics["eval/rewards/ties"] == 1
    assert metrics["eval/rewards/accuracy"] == 0
