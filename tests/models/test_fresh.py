"""Models from scratch and their tokenizer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.errors import InputError
from dpo.models.fresh import END_OF_TEXT, fresh_gpt2, train_tokenizer
from dpo.models.load import check_fit, max_positions, weights_digest

SIZES = {"width": 16, "layers": 1, "heads": 2, "positions": 32}


@given(st.text())
def test_the_tokenizer_spells_any_text(tokenizer, text: str) -> None:
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


def test_the_tokenizer_is_a_function_of_its_texts_and_adds_nothing(tokenizer) -> None:
    texts = ["one two two", "three two one"] * 5
    first, second = (train_tokenizer(texts, vocab_size=270) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 270 or len(first) < 270
    assert first(" two").input_ids != first(" ten").input_ids
    assert first.eos_token == first.bos_token == END_OF_TEXT
    assert first("one").input_ids == first("one", add_special_tokens=False).input_ids


def test_bytes_and_the_end_token_must_fit_into_the_vocabulary() -> None:
    assert len(train_tokenizer([], vocab_size=257)) == 257
    with pytest.raises(InputError, match=r"model.fresh.vocab_size: expected at least 257 .*256"):
        train_tokenizer([], vocab_size=256)


def test_the_width_must_be_a_multiple_of_the_heads(tokenizer) -> None:
    with pytest.raises(InputError, match=r"model.fresh.width: 15 is not a multiple of heads \(2\)"):
        fresh_gpt2(**{**SIZES, "width": 15}, tokenizer=tokenizer, seed=0)


def test_weights_are_a_function_of_the_seed_and_leave_the_random_state_alone(tokenizer) -> None:
    before = torch.get_rng_state()
    first = fresh_gpt2(**SIZES, tokenizer=tokenizer, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again = fresh_gpt2(**SIZES, tokenizer=tokenizer, seed=0)
    assert weights_digest(first) == weights_digest(again)
    assert weights_digest(first) != weights_digest(fresh_gpt2(**SIZES, tokenizer=tokenizer, seed=1))


def test_the_model_fits_its_tokenizer(tokenizer) -> None:
    model = fresh_gpt2(**SIZES, tokenizer=tokenizer, seed=0)
    check_fit(model, tokenizer, name="fresh")
    assert max_positions(model) == 32
    assert not model.training
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
