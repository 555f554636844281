"""What generations are like and which wins length explains, on evaluations made for the purpose."""

import json

import numpy as np
import pytest

from dpo.errors import InputError
from dpo.evaluate.diagnostics import diagnose
from dpo.evaluate.generation_diagnostics import COSINES, health_of

N = 150


def record(model, prompt, generated="one two three four five six", **changes):
    return {
        "kind": "model",
        "model": model,
        "temperature": 1.0,
        "prompt_index": prompt,
        "sample": 0,
        "prompt": f"p{prompt}",
        "chosen": "chosen text",
        "rejected": "rejected",
        "generated": generated,
        "num_tokens": len(generated.split()) + 1,
        "truncated": False,
        "margin": 0.0,
    } | changes


def evaluation_of(folder, records, matchups=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("scored.jsonl", records), ("matchups.jsonl", matchups)):
        if rows:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(count):
    return " ".join(f"w{i}" for i in range(count))


def reading(diagnosis, title):
    return next(r for r in diagnosis.readings if r.title == title)


def test_health_by_hand():
    records = [
        {"generated": "a b c d e f", "truncated": False},
        {"generated": "a b a b a b a b", "truncated": True},
        {"generated": " ", "truncated": False},
    ]
    found = health_of(records)
    assert found["truncated"] == found["empty"] == pytest.approx(1 / 3)
    assert found["repeated_4grams"] == pytest.approx((0 + (1 - 2 / 5) + 0) / 3)
    assert found["distinct_2grams"] == pytest.approx(6 / 12)  # ab bc cd de ef, ba
    assert found["words"] == pytest.approx(14 / 3)
    assert health_of([]) == {}


@pytest.mark.parametrize(
    ("title", "broken"),
    [
        ("Cut generations", {"truncated": True}),
        ("Empty generations", {"generated": ""}),
        ("Repetition", {"generated": "no no no no no no no no"}),
    ],
)
def test_a_model_that_is_worse_than_the_baseline_is_named(tmp_path, title, broken):
    records = [record("sft", i) for i in range(20)]
    records += [record("dpo", i, **(broken if i < 4 else {})) for i in range(20)]
    found = diagnose(evaluation_of(tmp_path, records))
    assert found.kind == "evaluation"
    for name in ("Cut generations", "Empty generations", "Repetition"):
        said = reading(found, name)
        assert said.level == ("warning" if name == title else "ok")
        assert ("dpo" in said.sentence) == (name == title)


def test_what_the_baseline_does_as_well_is_not_held_against_a_model(tmp_path):
    records = [record(model, i, truncated=True) for model in ("sft", "dpo") for i in range(20)]
    assert reading(diagnose(evaluation_of(tmp_path, records)), "Cut generations").level == "ok"


def test_lengths_are_compared_on_the_same_prompts(tmp_path):
    records = [record("sft", i, words(5 + i)) for i in range(30)]
    records += [record("dpo", i, words(8 + i + i % 2)) for i in range(10, 30)]
    found = diagnose(evaluation_of(tmp_path, records))
    row = next(row for row in found.numbers["generations"] if row["model"] == "dpo")
    assert row["tokens_longer"] == pytest.approx(3.5)
    assert row["tokens_longer_interval"][0] > 3
    assert reading(found, "Length of generations").level == "note"


def dpo_against_sft(rng, *, length, skill):
    """The cosine margin grows with length, with the model's skill, both or neither."""
    records = []
    for i in range(N):
        short, long = (int(n) for n in rng.integers(10, 30, 2))
        long += 8
        for model, count, own in (("sft", short, 0.0), ("dpo", long, skill)):
            margin = own + length * count / 8 + rng.normal()
            records.append(record(model, i, words(count), margin=margin))
    return records


@pytest.mark.parametrize(
    ("length", "skill", "level", "wins"),
    [(1.0, 0.0, "warning", False), (0.0, 1.5, "ok", True), (0.5, 1.5, "ok", True)],
)
def test_wins_that_come_from_length_alone_are_told_from_others(
    tmp_path, length, skill, level, wins
):
    records = dpo_against_sft(np.random.default_rng(0), length=length, skill=skill)
    found = diagnose(evaluation_of(tmp_path, records))
    (row,) = found.numbers["length_controlled"]
    assert (row["judge"], row["a"], row["b"]) == (COSINES, "dpo", "sft")
    assert row["raw_interval"][0] > 0.5
    assert (row["interval"][0] > 0.5) == wins
    assert reading(found, "Wins and length").level == level


def matchup(i, verdict, **changes):
    return {
        "judge": "reward",
        "family": "chosen",
        "a": "dpo",
        "b": "chosen",
        "temperature": 1.0,
        "prompt_index": i,
        "sample": 0,
        "verdict": verdict,
    } | changes


def test_judges_comparisons_are_controlled_too_with_the_length_of_the_chosen(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 8, N)
    records = [record("dpo", i, words(int(lengths[i])), chosen="c" * 12) for i in range(N)]
    verdicts = ["win" if 3 * count > 12 else "loss" for count in lengths]
    verdicts[0] = "tie"
    matchups = [matchup(i, verdict) for i, verdict in enumerate(verdicts)]
    matchups += [matchup(i, "win", family="labels", a="chosen", b="rejected") for i in range(N)]
    matchups += [matchup(N + 5, "win")]  # of a response that is not in scored.jsonl
    (row,) = diagnose(evaluation_of(tmp_path, records, matchups)).numbers["length_controlled"]
    assert (row["judge"], row["n"]) == ("reward", N)
    won = sum(verdict == "win" for verdict in verdicts)
    assert row["raw"] == pytest.approx((won + 0.5) / N)
    assert row["slope_interval"][0] > 0
    longer = sum(len(words(int(count))) > 12 for count in lengths)
    assert row["longer"] == pytest.approx(longer / N)


def test_a_win_rate_of_one_has_an_interval(tmp_path):
    records = [record("sft", i, words(5)) for i in range(12)]
    records += [record("dpo", i, words(1 + i), margin=1.0) for i in range(12)]
    (row,) = diagnose(evaluation_of(tmp_path, records)).numbers["length_controlled"]
    assert row["raw"] == 1
    low, high = row["raw_interval"]
    assert 0.7 < low < 1 == high


def test_where_one_side_is_always_longer_the_extrapolation_is_said(tmp_path):
    rng = np.random.default_rng(0)
    records = [record("sft", i, words(5), margin=rng.normal()) for i in range(N)]
    records += [
        record("dpo", i, words(int(rng.integers(50, 80))), margin=rng.normal()) for i in range(N)
    ]
    said = reading(diagnose(evaluation_of(tmp_path, records)), "Wins and length")
    assert said.level == "note"
    assert "extrapolation" in said.sentence


def test_equal_lengths_leave_nothing_to_control_for(tmp_path):
    records = [record(model, i) for model in ("sft", "dpo") for i in range(5)]
    found = diagnose(evaluation_of(tmp_path, records))
    assert found.numbers["length_controlled"] == []
    assert not [r for r in found.readings if r.title == "Wins and length"]


def test_the_baseline_is_sft_or_the_first(tmp_path):
    records = [record(model, i) for model in ("b", "sft", "a") for i in range(3)]
    assert diagnose(evaluation_of(tmp_path, records)).numbers["baseline"] == "sft"
    records = [r for r in records if r["model"] != "sft"]
    assert diagnose(evaluation_of(tmp_path, records)).numbers["baseline"] == "b"


def test_damaged_and_empty_evaluations_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="no response of a model"):
        diagnose(evaluation_of(tmp_path / "nulls", [record("n", 0, kind="null")]))
    (tmp_path / "scored.jsonl").write_text('{"kind": "mod')
    with pytest.raises(InputError, match=r"scored\.jsonl"):
        diagnose(tmp_path)
