"""What is computed along responses equals a sum over tokens and vocabulary, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpo.data.tokenize import TokenSequence
from dpo.models.distributions import OF_BOTH, OF_POLICY, OF_REFERENCE, along_responses
from dpo.models.scoring import response_logps
from tiny_models import make

VOCAB = 20
SEQUENCES = [
    TokenSequence((1, 2, 3, 4, 5), 3),
    TokenSequence((1, 2, 3, 4, 6, 7, 8), 3),
    TokenSequence((9, 10), 1),
]


def models() -> tuple[nn.Module, nn.Module]:
    return make("llama", VOCAB).double(), make("llama", VOCAB, seed=1).double()


def distributions(model: nn.Module, s: TokenSequence) -> Tensor:
    """Log-probabilities of the next token at each scored one, (T, V), by the model alone."""
    logits = model(torch.tensor([s.ids])).logits[0]
    return logits.log_softmax(-1)[s.prompt_length - 1 : -1]


def test_every_value_equals_its_definition() -> None:
    policy, reference = models()
    found = along_responses(policy, reference, SEQUENCES, OF_POLICY | OF_REFERENCE | OF_BOTH)
    for i, s in enumerate(SEQUENCES):
        own, other = distributions(policy, s), distributions(reference, s)
        tokens = torch.tensor(s.ids[s.prompt_length :])
        n = len(tokens)
        expected = {
            "policy_token_logps": own.gather(-1, tokens[:, None]).squeeze(-1),
            "reference_token_logps": other.gather(-1, tokens[:, None]).squeeze(-1),
            "policy_token_log_collision": own.exp().square().sum(-1).log(),
            "forward_kl": (other.exp() * (other - own)).sum(),
            "reference_entropy": -(other.exp() * other).sum(),
        }
        for name, value in expected.items():
            row = found[name][i]
            torch.testing.assert_close(row[:n] if row.dim() else row, value, rtol=1e-5, atol=1e-6)
            assert not row.dim() or (row[n:] == 0).all()


def test_log_probabilities_of_tokens_add_up_to_those_of_responses() -> None:
    policy, _ = models()
    tokens = along_responses(policy, None, SEQUENCES, {"policy_token_logps"})
    torch.testing.assert_close(
        tokens["policy_token_logps"].sum(-1), response_logps(policy, SEQUENCES), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("name", ["policy_token_logps", "forward_kl"])
def test_gradients_reach_the_policy_and_never_the_reference(name: str) -> None:
    policy, reference = models()
    along_responses(policy, reference, SEQUENCES, {name})[name].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    assert all(p.grad is None for p in reference.parameters())


def test_collision_and_entropy_carry_no_gradient() -> None:
    policy, reference = models()
    wanted = {"policy_token_log_collision", "reference_entropy", "reference_token_logps"}
    found = along_responses(policy, reference, SEQUENCES, wanted)
    assert found.keys() == wanted
    assert not any(value.requires_grad for value in found.values())


def test_a_policy_equal_to_its_reference_has_no_divergence() -> None:
    policy, _ = models()
    found = along_responses(policy, policy, SEQUENCES, {"forward_kl"})
    torch.testing.assert_close(found["forward_kl"], torch.zeros(3, dtype=torch.float64))
