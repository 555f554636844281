"""Sampling: exact in distribution, a function of each row's own seed, free of the model's own
defaults, and without work for what is shared or finished."""

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
from transformers import GenerationConfig, Lfm2Config, Lfm2ForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.cache_utils import DynamicLayer

from dpo.data.tokenize import TokenSequence
from dpo.errors import DivergedError, InputError
from dpo.models import generate as module
from dpo.models.generate import (
    GrowingLayer,
    SampledResponse,
    SeededSampling,
    draw_tokens,
    generate,
    has_plain_cache,
    uniform_stream,
)
from dpo.models.scoring import scored_logits
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


def by_hand(
    model: nn.Module,
    prompt: list[int],
    key: str,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 12,
    stop_ids: tuple[int, ...] = (STOP,),
) -> SampledResponse:
    """One response, every token by a whole forward pass: no cache, no padding, no batch."""
    new: list[int] = []
    for u in uniform_stream(0, key, max_new_tokens):
        logits = next_logits(model, prompt + new).tolist()
        if temperature == 0:
            token = max(range(len(logits)), key=logits.__getitem__)
        else:
            weights = [math.exp((z - max(logits)) / temperature) for z in logits]
            cumulative = list(itertools.accumulate(weights))
            token = next(v for v, c in enumerate(cumulative) if c > u * cumulative[-1])
        if token in stop_ids:
            return SampledResponse(tuple(new), end=token)
        new.append(token)
    return SampledResponse(tuple(new), end=None)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_responses_are_those_of_whole_forward_passes_one_row_at_a_time(
    name: str, temperature: float
) -> None:
    """So cache, padding, positions, masks, shared prompts and leaving rows change no token."""
    model, prompts, stop_ids = sharp(name).double(), random_prompts(), (STOP, 7, 8, 9)
    places = [(i, s) for s in range(3) for i in range(len(prompts))]  # samples apart on purpose
    arguments = {"temperature": temperature, "stop_ids": stop_ids}
    found = sample(
        model,
        [prompts[i] for i, _ in places],
        keys=[f"{i}/{s}" for i, s in places],
        # A float64 Gemma 2 gives NaN for padding (its softmax is float32): one prompt a batch.
        batch_size=3 if name == "gemma2" else 14,
        **arguments,
    )
    expected = [by_hand(model, prompts[i], f"{i}/{s}", **arguments) for i, s in places]
    assert found == expected
    if temperature > 0:
        assert len({len(response.ids) for response in found}) > 3, "rows end at different times"
        assert {response.truncated for response in found} == {True, False}


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
        numbers = torch.tensor([u], dtype=torch.float64)
        for dtype in (torch.float64, torch.float32):
            logits = probabilities.log().to(dtype)
            assert draw_tokens(logits, numbers, temperature=1.0).tolist() == [token]
        sampling = SeededSampling(numbers.unsqueeze(0), temperature=1.0, prompt_width=2)
        forced = sampling(torch.zeros(1, 2, dtype=torch.long), logits)
        assert forced.argmax().item() == token
        assert forced.isfinite().sum() == 1


def test_rare_tokens_have_room_in_the_cumulative_distribution_of_a_large_vocabulary() -> None:
    """50,257 equal tokens: in float32 sums the boundaries would be off by whole tokens."""
    number = 50_257
    numbers = (torch.arange(0, number, 97, dtype=torch.float64) + 0.5) / number
    logits = torch.full((len(numbers), number), 3.0)
    found = draw_tokens(logits, numbers, temperature=0.1)
    assert torch.equal(found, torch.arange(0, number, 97))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_stop_the_sampling(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, :] = bad
    numbers = torch.full((2,), 0.5, dtype=torch.float64)
    with pytest.raises(DivergedError, match="not finite"):
        draw_tokens(logits, numbers, temperature=temperature)
    logits = torch.tensor([[-math.inf, 0.0]])  # a forbidden token is none of these
    assert draw_tokens(logits, numbers[:1], temperature=temperature).tolist() == [1]


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
@pytest.mark.parametrize("plain", [True, False], ids=["own loop", "transformers"])
def test_the_models_own_generation_config_takes_no_part(
    own: dict, temperature: float, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_plain_cache", lambda model, token: plain)
    model, prompts = sharp("gpt2"), random_prompts()
    expected = sample(model, prompts, temperature=temperature)
    model.generation_config = config = GenerationConfig(**own)
    before = config.to_dict()
    assert sample(model, prompts, temperature=temperature) == expected
    assert model.generation_config is config
    assert config.to_dict() == before


@pytest.mark.parametrize("plain", [True, False], ids=["own loop", "transformers"])
def test_the_model_is_left_as_it_was_even_after_a_failure(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_plain_cache", lambda model, token: plain)
    model = sharp("gpt2").train()
    model.transformer.h[0].eval()  # modes may differ within a model
    modes = [part.training for part in model.modules()]
    own, attention = model.generation_config, model.config._attn_implementation

    def assert_unchanged() -> None:
        assert [part.training for part in model.modules()] == modes
        assert model.generation_config is own
        assert model.config._attn_implementation == attention
        assert "forward" not in vars(model.get_output_embeddings())

    expected = sample(sharp("gpt2"), random_prompts())
    assert sample(model, random_prompts()) == expected, "dropout is off while generating"
    assert_unchanged()
    model.lm_head.weight.data[0] = math.nan
    with pytest.raises(DivergedError):
        sample(model, random_prompts())
    assert_unchanged()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keys": ["a"]}, "9 prompts need as many keys; got 1"),
        ({"temperature": -0.5}, "0 or more, not -0.5"),
        ({"temperature": math.nan}, "0 or more, not nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"max_new_tokens": 36}, "prompt 1 has 30 tokens; .* room for 29 in the model's 64"),
        ({"prompts": [[1], []], "keys": ["a", "b"]}, "prompt 1 has no tokens"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict, message: str) -> None:
    arguments = {"prompts": random_prompts(), **wrong}
    with pytest.raises(InputError, match=message):
        sample(sharp("gpt2"), **arguments)


def test_the_models_last_position_can_be_used() -> None:
    """The last new token is never fed, so it needs none."""
    model, prompt = sharp("gpt2"), list(range(30))
    (found,) = sample(model, [prompt], max_new_tokens=35, stop_ids=[])
    assert found == by_hand(model, prompt, "0/0", max_new_tokens=35, stop_ids=())
    assert len(found.ids) == 35


def test_no_prompts_give_no_responses() -> None:
    assert sample(sharp("gpt2"), []) == []


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


def test_bf16_samples_come_from_the_distribution_that_scoring_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the trunk is bfloat16: logits rounded to 8 bits would be another distribution."""
    model, prompts = sharp("llama"), random_prompts()
    seen: list[Tensor] = []

    def spy(logits: Tensor, uniforms: Tensor, *, temperature: float) -> Tensor:
        seen.append(logits)
        return draw_tokens(logits, uniforms, temperature=temperature)

    monkeypatch.setattr(module, "draw_tokens", spy)
    sample(model, prompts, precision="bf16", max_new_tokens=1, batch_size=1)
    longest_first = sorted(prompts, key=len, reverse=True)
    for prompt, logits in zip(longest_first, seen, strict=True):
        with torch.no_grad():
            sequences = [TokenSequence((*prompt, 0), len(prompt))]
            scored, _, _ = scored_logits(model, sequences, precision="bf16")
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())
        assert (logits - scored).abs().max() < 1e-4 * scored.abs().max()


# -- what is computed ----------------------------------------------------------------------------


def shapes_fed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, columns) of every pass through the embedding, from now on; without the probe's."""
    monkeypatch.setattr(module, "has_plain_cache", lambda model, token: True)
    shapes: list[tuple[int, int]] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, ids: shapes.append(tuple(ids[0].shape)))
    return shapes


def test_a_prompt_is_encoded_once_for_all_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = sharp("llama"), random_prompts()
    shapes = shapes_fed(model, monkeypatch)
    repeated = [prompt for _ in range(5) for prompt in prompts]
    keys = [str(i) for i in range(len(repeated))]
    sample(model, repeated, keys=keys, max_new_tokens=3, stop_ids=[])
    assert shapes == [(9, 30), (45, 1), (45, 1)]
    shapes.clear()
    sample(model, repeated, keys=keys, max_new_tokens=1, batch_size=12)
    lengths = sorted(map(len, prompts), reverse=True)
    pairs = [(2, lengths[0]), (2, lengths[2]), (2, lengths[4]), (2, lengths[6]), (1, lengths[8])]
    assert shapes == pairs, "batches hold whole prompts, the longest first"


def test_the_head_sees_one_position_a_row() -> None:
    model, prompts = sharp("gpt2"), random_prompts()
    shapes = []
    model.transformer.ln_f.register_forward_hook(lambda *_: shapes.append("trunk"))
    head = model.get_output_embeddings()
    forward = head.forward
    head.forward = lambda hidden: shapes.append(tuple(hidden.shape)) or forward(hidden)
    replaced = head.forward
    sample(model, prompts, max_new_tokens=2, stop_ids=[])
    assert shapes == ["trunk", (1, 1, 32), "trunk", (9, 1, 32), "trunk", (9, 1, 32)]
    assert head.forward is replaced, "a replaced forward is put back"


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step fewer than an eighth of the rows are finished ones."""
    model, prompts = sharp("gpt2"), random_prompts() * 7
    keys = [str(i) for i in range(len(prompts))]
    arguments = {"keys": keys, "stop_ids": [STOP, 7, 8, 9]}
    shapes = shapes_fed(model, monkeypatch)
    found = sample(model, prompts, **arguments)
    steps = shapes[1:]
    going = [sum(len(r.ids) > t for r in found) for t in range(len(steps))]
    assert len(set(going)) > 5, "rows end at different times"
    for (rows, columns), needed in zip(steps, going, strict=True):
        assert columns == 1
        assert needed <= rows
        assert rows - needed < rows / 8
    for share in (0.0, 2.0):  # they leave at once, or never
        monkeypatch.setattr(module, "SHRINK_AT", share)
        shapes.clear()
        assert sample(model, prompts, **arguments) == found
        rows_fed = [rows for rows, _ in shapes[1:]]
        assert rows_fed == (going if share == 0 else [len(prompts)] * len(going))


def test_nothing_more_is_computed_when_every_response_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sharp("gpt2")
    shapes = shapes_fed(model, monkeypatch)
    found = sample(model, random_prompts(), stop_ids=list(range(VOCAB)))
    assert [(one.ids, one.truncated) for one in found] == [((), False)] * 9
    assert len({one.end for one in found}) > 1  # each ended with the token that it drew
    assert shapes == [(9, 30)]


def test_a_growing_layer_holds_what_a_concatenating_one_does() -> None:
    draw = torch.Generator().manual_seed(0)

    def states(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        shape = (rows, 2, columns)
        return torch.rand(*shape, 4, generator=draw), torch.rand(*shape, 6, generator=draw)

    plain, start = DynamicLayer(), DynamicLayer()
    first = states(3, 5)
    for layer in (plain, start):
        layer.update(*first)
    growing = GrowingLayer(start)
    rows = 3
    for columns in [1] * (GrowingLayer.room + 2) + [GrowingLayer.room + 7, 1]:
        new = states(rows, columns)
        for found, expected in zip(growing.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert growing.get_seq_length() == plain.get_seq_length()
        if columns > 1:
            for layer in (growing, plain):
                layer.batch_select_indices(torch.tensor([2, 0]))
            rows = 2
            assert torch.equal(growing.keys, plain.keys)
            assert torch.equal(growing.values, plain.values)


# -- models that are left to transformers ----------------------------------------------------------


def special(name: str) -> nn.Module:
    """Lfm2 keeps convolution states beside its keys; Phi-3 prepares its own inputs."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if name == "lfm2":
        model = Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"], **sizes))
    else:
        model = Phi3ForCausalLM(Phi3Config(bos_token_id=1, eos_token_id=2, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(12.0)
    return model.eval()


def test_which_models_can_be_run_by_our_own_loop() -> None:
    assert all(has_plain_cache(make(name, VOCAB), 1) for name in ARCHITECTURES)
    assert not any(has_plain_cache(special(name), 1) for name in ("lfm2", "phi3"))
    stateful = make("gpt2", VOCAB)
    stateful._is_stateful = True
    assert not has_plain_cache(stateful, 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["lfm2", "phi3"])
def test_other_models_give_the_responses_of_whole_forward_passes_too(
    name: str, temperature: float
) -> None:
    model, prompts = special(name), random_prompts()
    repeated = [prompt for prompt in prompts for _ in range(2)]
    keys = [f"{i}/{s}" for i in range(len(prompts)) for s in range(2)]
    arguments = {"temperature": temperature, "stop_ids": (STOP, 7)}
    found = sample(model, repeated, keys=keys, batch_size=5, **arguments)
    expected = [by_hand(model, p, k, **arguments) for p, k in zip(repeated, keys, strict=True)]
    assert found == expected
    assert len({response.ids for response in found}) > 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_ways_give_the_same_responses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = sharp(name), random_prompts() * 2
    keys = [str(i) for i in range(len(prompts))]
    for stop_ids in ([STOP, 7], []):
        ours = sample(model, prompts, keys=keys, stop_ids=stop_ids)
        with monkeypatch.context() as patch:
            patch.setattr(module, "has_plain_cache", lambda model, token: False)
            assert sample(model, prompts, keys=keys, stop_ids=stop_ids) == ours
