"""Models that packing cannot serve are found, take the padded path, and say so in one line."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from dpo.core.head import HeadForm
from dpo.data.tokenize import TokenSequence
from dpo.models.plan import head_form, scoring_plan, why_not_packed
from dpo.models.scoring import response_logps
from tiny_models import make

VOCAB = 40


def bloom() -> nn.Module:
    """Positions by linear biases: no registered attention."""
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))


def gpt_oss() -> nn.Module:
    """A learnt sink takes part in every softmax."""
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    )


SEQUENCES = [TokenSequence((1, 2, 3, 4, 5), 3), TokenSequence((1, 2, 3, 6), 3)]


@pytest.mark.parametrize(("build", "reason"), [(bloom, "registered attention"), (gpt_oss, "s_aux")])
def test_a_model_that_packing_cannot_serve_is_padded_and_says_so(build, reason, caplog) -> None:
    torch.manual_seed(0)
    model = build().eval()
    with caplog.at_level(logging.INFO, logger="dpo"):
        assert not scoring_plan(model).packed
        scoring_plan(model)
    lines = [r.getMessage() for r in caplog.records if "padded rows" in r.getMessage()]
    assert len(lines) == 1
    assert reason in lines[0]
    with torch.no_grad():
        found = response_logps(model, SEQUENCES)
        for value, s in zip(found, SEQUENCES, strict=True):
            logps = model(torch.tensor([s.ids])).logits[0].log_softmax(-1)
            own = sum(logps[t - 1, s.ids[t]].item() for t in range(3, len(s)))
            assert value.item() == pytest.approx(own, abs=1e-4)


def test_opt_which_counts_positions_by_itself_is_right_either_way() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        found = response_logps(model, SEQUENCES)
        for value, s in zip(found, SEQUENCES, strict=True):
            logps = model(torch.tensor([s.ids])).logits[0].log_softmax(-1)
            own = sum(logps[t - 1, s.ids[t]].item() for t in range(3, len(s)))
            assert value.item() == pytest.approx(own, abs=1e-4)


def test_a_kind_of_layer_that_is_not_known_is_refused_by_the_configuration() -> None:
    model = make("llama", VOCAB)
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in str(why_not_packed(model))


def test_the_trial_finds_a_model_that_leaks_between_branches(monkeypatch) -> None:
    """As one whose layers ignored the layout would."""

    def leaky(module, query, key, value, mask, scaling=None, **others):
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return found.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "dpo_packed", leaky)
    with torch.no_grad():
        assert "differ by" in str(why_not_packed(make("llama", VOCAB)))


@pytest.mark.parametrize(
    ("name", "expected"), [("gpt2", HeadForm()), ("gemma2", HeadForm(cap=2.0))]
)
def test_what_follows_the_head_is_found(name: str, expected: HeadForm) -> None:
    with torch.no_grad():
        assert head_form(make(name, VOCAB)) == expected


def test_a_cap_that_is_too_high_to_show_is_believed_from_the_configuration() -> None:
    model = make("gemma2", VOCAB, scale=0.01)
    model.config.final_logit_softcapping = 30.0
    with torch.no_grad():
        assert head_form(model) == HeadForm(cap=30.0)


def test_a_head_that_is_more_than_a_matrix_is_run_by_the_model(caplog) -> None:
    model = make("llama", VOCAB)
    plain = response_logps(model, SEQUENCES).detach()
    other = make("llama", VOCAB)
    other.lm_head = nn.Sequential(other.lm_head)
    other.lm_head.weight = None
    with caplog.at_level(logging.INFO, logger="dpo"):
        assert scoring_plan(other).form is None
    assert "its own output head" in caplog.text
    torch.testing.assert_close(response_logps(other, SEQUENCES).detach(), plain)


def test_the_trial_leaves_modes_and_random_numbers_alone() -> None:
    model = make("gpt2", VOCAB).train()
    model.transformer.h[0].eval()
    state = torch.get_rng_state()
    scoring_plan(model)
    assert model.training
    assert not model.transformer.h[0].training
    assert torch.equal(torch.get_rng_state(), state)
