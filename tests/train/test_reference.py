"""Reference log-probabilities: cached by all that decides them, never stale."""

import copy
import os
import random
import signal

import numpy as np
import pytest
import torch

from dpo.data.pack import group_by_prompt
from dpo.data.tokenize import TokenSequence
from dpo.errors import StorageError
from dpo.models.fresh import fresh_gpt2
from dpo.models.load import weights_digest
from dpo.models.scoring import response_logps
from dpo.train import reference
from dpo.train.reference import cache_folder, cache_key, reference_logps, score_all
from train.small_runs import forked


@pytest.fixture(scope="module")
def model(tokenizer):
    return fresh_gpt2(width=16, layers=1, heads=2, positions=64, tokenizer=tokenizer, seed=0)


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    lengths = [(int(rng.integers(1, 20)), int(rng.integers(1, 30))) for _ in range(24)]
    return [TokenSequence(tuple(map(int, rng.integers(0, 300, p + r))), p) for p, r in lengths]


def cached(model, sequences, precision="fp32", max_tokens=512):
    return reference_logps(model, sequences, precision=precision, max_tokens=max_tokens)


def key(model, sequences, precision="fp32", max_tokens=512):
    return cache_key(model, sequences, precision=precision, max_tokens=max_tokens)


def cache_file():
    (file,) = (cache_folder() / "reference").iterdir()
    return file


def test_cached_values_are_the_online_ones_one_at_a_time(model, sequences):
    cached(model, sequences)
    values, from_cache = cached(model, sequences)
    assert from_cache
    with torch.no_grad():
        online = torch.cat([response_logps(model, [s]) for s in sequences])
    assert (values - online).abs().max() < 1e-5


def test_the_cache_is_used_the_second_time_and_gives_the_same_bits(model, sequences, monkeypatch):
    first, from_cache = cached(model, sequences)
    assert not from_cache
    monkeypatch.setattr(reference, "score_all", None)  # calling it would fail
    second, from_cache = cached(model, sequences)
    assert from_cache
    assert torch.equal(first, second)
    assert first.dtype == torch.float64


def test_two_passes_are_bitwise_equal_even_for_a_model_left_in_training_mode(tokenizer, sequences):
    model = fresh_gpt2(width=16, layers=1, heads=2, positions=64, tokenizer=tokenizer, seed=0)
    assert model.config.resid_pdrop > 0
    first = score_all(model.train(), sequences, precision="fp32", max_tokens=512)
    second = score_all(model.train(), sequences, precision="fp32", max_tokens=512)
    assert torch.equal(first, second)


def test_scoring_changes_no_weight_and_keeps_no_gradient(model, sequences):
    before = weights_digest(model)
    score_all(model, sequences, precision="fp32", max_tokens=512)
    assert weights_digest(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_key_changes_with_the_weights(model, sequences):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.ln_f.bias[3] = 1e-7
    assert key(other, sequences) != key(model, sequences)


def test_key_changes_with_what_the_config_computes_from_the_same_weights(model, sequences):
    other = copy.deepcopy(model)
    other.config.layer_norm_epsilon = 1e-3
    assert key(other, sequences) != key(model, sequences)


@pytest.mark.parametrize("changed", [{"precision": "bf16"}, {"max_tokens": 64}])
def test_key_changes_with_precision_and_grouping(model, sequences, changed):
    assert key(model, sequences, **changed) != key(model, sequences)


def test_key_changes_with_ids_boundaries_order_and_cuts(model, sequences):
    first = sequences[0]
    variants = [
        sequences,
        sequences[1:],
        sequences[::-1],
        [TokenSequence((*first.ids[:-1], (first.ids[-1] + 1) % 300), first.prompt_length)],
        [TokenSequence(first.ids, first.prompt_length + 1)],
        [TokenSequence(first.ids[:-1], first.prompt_length)],
        [first],
    ]
    assert len({key(model, variant) for variant in variants}) == len(variants)


def test_key_does_not_change_with_where_the_model_lies(model, sequences, tmp_path):
    from transformers import AutoModelForCausalLM

    keys = set()
    for place in ("here", "there"):
        model.save_pretrained(tmp_path / place)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype=torch.float32).eval()
        keys.add(key(loaded, sequences))
    assert len(keys) == 1


def test_values_do_not_come_from_the_cache_of_another_model(model, tokenizer, sequences):
    cached(model, sequences)
    other = fresh_gpt2(width=16, layers=1, heads=2, positions=64, tokenizer=tokenizer, seed=1)
    values, from_cache = cached(other, sequences)
    assert not from_cache
    expected = score_all(other, sequences, precision="fp32", max_tokens=512)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("damage", ["flip a value", "truncate", "empty", "garbage"])
def test_a_damaged_cache_file_is_computed_again_and_mended(model, sequences, damage):
    good, _ = cached(model, sequences)
    file = cache_file()
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40  # inside the last value
    damaged = {
        "flip a value": bytes(data),
        "truncate": bytes(data[: len(data) // 2]),
        "empty": b"",
        "garbage": b"\xff" * 100,
    }
    file.write_bytes(damaged[damage])
    values, from_cache = cached(model, sequences)
    assert not from_cache
    assert torch.equal(values, good)
    again, from_cache = cached(model, sequences)
    assert from_cache
    assert torch.equal(again, good)


def test_a_cache_that_cannot_be_written_is_one_sentence(model, sequences, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"cannot be written: a part of the path is a file\."):
        cached(model, sequences)


def test_cache_folder_is_the_users_unless_it_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("DPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "dpo"


def test_nothing_but_the_values_is_left_in_the_cache(model, sequences):
    cached(model, sequences)
    assert cache_file().suffix == ".safetensors"


@pytest.mark.parametrize(("interval", "num_kept"), [(0.0, 8), (3600.0, 0)])
def test_a_kill_costs_what_was_scored_since_it_was_last_kept(
    model, sequences, monkeypatch, tmp_path, interval, num_kept
):
    monkeypatch.setattr(reference, "CHUNK", 4)
    monkeypatch.setattr(reference, "KEEP_SECONDS", interval)
    expected, _ = cached(model, sequences)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    score, chunks = reference.response_logps, []

    def counted(*arguments, **options):
        chunks.append(arguments)
        return score(*arguments, **options)

    def killed():
        def deadly(*arguments, **options):
            counted(*arguments, **options)
            if len(chunks) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return score(*arguments, **options)

        monkeypatch.setattr(reference, "response_logps", deadly)
        cached(model, sequences)

    assert forked(killed) == -signal.SIGKILL
    assert sum(1 for _ in tmp_path.rglob("*.safetensors")) == (num_kept > 0)
    monkeypatch.setattr(reference, "response_logps", counted)
    values, from_cache = cached(model, sequences)
    assert not from_cache
    assert torch.equal(values, expected)
    assert len(chunks) == (len(sequences) - num_kept) / 4
    assert cached(model, sequences)[1]


def test_sequences_are_scored_longest_prompt_group_first_and_else_in_their_order():
    drawn = random.Random(0)
    sequences = [
        TokenSequence((drawn.randrange(4), *range(drawn.randrange(5)), 9, 7), 2) for _ in range(200)
    ]
    groups = group_by_prompt(sequences).values()
    longest_first = sorted(groups, key=lambda group: -max(len(sequences[i]) for i in group))
    expected = [i for group in longest_first for i in group]
    assert reference.longest_prompt_first(sequences).tolist() == expected
    assert reference.longest_prompt_first([]).tolist() == []
