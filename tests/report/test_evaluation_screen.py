"""What an evaluation says on the screen: its files' numbers, a column for each temperature."""

import io
from dataclasses import fields

import pytest
from rich.console import Console

from dpo.evaluate.agreement import Agreement
from dpo.evaluate.head_to_head import HeadToHead
from dpo.evaluate.paired import PairedTest
from dpo.evaluate.true_reward import RewardRow
from dpo.evaluate.winrate import WinRateRow
from dpo.report.evaluation_screen import (
    agreement_table,
    by_temperature,
    differences_table,
    head_to_head_table,
    null_table,
    reward_table,
    win_rate_table,
)


def shown(table, width=200):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def grid(table):
    """Its head and its lines."""
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    return [[column.header for column in table.columns], *map(list, zip(*cells, strict=True))]


def rate(model, temperature, wins, losses, **changes):
    values = {
        "kind": "model",
        "num_prompts": 20,
        "n": wins + losses + 1,
        "ties": 1,
        "tie_half": 0.5,
        "low": 0.2,
        "high": 0.9,
        "bootstrap_low": None,
        "bootstrap_high": None,
        "confidence": 0.9,
        "mean_margin": 0.0,
        "truncated_share": 0.25 * temperature if temperature else 0.0,
        "mean_tokens": 4.0 + temperature if temperature else None,
        "win_rate": wins / (wins + losses) if wins + losses else None,
    } | changes
    return WinRateRow(model=model, temperature=temperature, wins=wins, losses=losses, **values)


def test_a_model_has_one_line_and_a_column_for_each_temperature():
    rows = [rate("[red]m", 0.5, 3, 1), rate("b\x1b[2J", 0.5, 0, 0), rate("[red]m", 2.0, 1, 9)]
    table = win_rate_table(rows)
    assert grid(table) == [
        ["model", "0.5", "2", "tokens", "cut off"],
        ["[red]m", "75 [20, 90]", "10 [20, 90]", "4 to 6", "12% to 50%"],
        ["b\\x1b[2J", "-", "", "4", "12%"],
    ]
    assert "20 held-out prompts" in str(table.title)
    assert "90% interval. Ties: 3 of 17." in str(table.caption)
    assert "[red]m" in shown(table)
    assert "\x1b" not in shown(table)


def test_nothing_is_cut_off_where_the_screen_is_narrow():
    name = "a model with a name of many words"
    text = shown(win_rate_table([rate(name, t, 3, 1) for t in (0.1, 0.5, 1.0)]), width=50)
    assert "…" not in text
    assert all(word in text for word in name.split())
    assert text.count("[20,") == 3


def test_responses_that_know_nothing_have_no_temperature():
    table = null_table([rate("prompt echoed", None, 3, 1, kind="null")])
    assert grid(table) == [["response", "win rate"], ["prompt echoed", "75 [20, 90]"]]


def paired(a, b, temperature, difference, p):
    values = {
        "family": "models",
        "family_size": 3,
        "num_prompts": 7,
        "num_unshared": 0,
        "num_decided": 7,
        "wins_only_a": 1,
        "wins_only_b": 2,
        "disagreement": 0.375,
        "low": -0.5,
        "high": 0.25,
        "confidence": 0.95,
        "mcnemar_p": p / 3,
        "mcnemar_p_holm": p,
        "margin_difference": 0.0,
        "permutation_p": 0.1,
        "permutation_p_holm": 0.123,
    }
    return PairedTest(
        model_a=a, model_b=b, temperature=temperature, difference=difference, **values
    )


def test_a_pair_has_one_line_and_a_mark_where_it_is_told_apart_after_correction():
    tests = [
        paired("a[b]", "c", 0.5, -0.125, 0.06),  # McNemar's own p is 0.02: not what is marked
        paired("a[b]", "c", 1.0, 0.125, 0.049),
        paired("a[b]", "d", None, None, 1.0),
    ]
    assert grid(differences_table(tests)) == [
        ["first", "second", "0.5", "1", "any"],
        ["a[b]", "c", "-12 [-50, +25] ", "+12 [-50, +25]*", ""],
        ["a[b]", "d", "", "", "-"],
    ]


def duel(judge, temperature, p, win_rate=0.6):
    return HeadToHead(
        judge=judge,
        family="models",
        a="dpo",
        b="sft",
        temperature=temperature,
        num_prompts=10,
        n=10,
        wins=6,
        losses=4,
        ties=0,
        win_rate=win_rate,
        low=0.3,
        high=0.85,
        confidence=0.95,
        prompts_won=6,
        prompts_lost=4,
        sign_p=p / 2,
        sign_p_holm=p,
    )


def test_each_judge_has_a_line_for_a_pair():
    rows = [duel("reward", 0.5, 0.001), duel("reward", 1.0, 0.5), duel("people", 1.0, 1.0, None)]
    table = head_to_head_table(rows)
    assert grid(table) == [
        ["judge", "first", "second", "0.5", "1"],
        ["reward", "dpo", "sft", "60 [30, 85]*", "60 [30, 85] "],
        ["people", "dpo", "sft", "", "- "],
    ]
    assert "Ties: 0 of 30." in str(table.caption)


def test_agreement_is_shown_over_all_and_over_the_decided():
    values = {field.name: 0 for field in fields(Agreement)} | {
        "judge_a": "a",
        "judge_b": "b",
        "family": "models",
        "n": 30,
        "agreement": 0.8,
        "kappa": 0.6,
        "low": 0.4,
        "high": 0.75,
        "decided_n": 20,
        "decided_agreement": 0.9,
        "decided_kappa": None,
    }
    (line,) = grid(agreement_table([Agreement(**values)]))[1:]
    assert line == ["a, b", "models", "30", "80%", "0.60 [0.40, 0.75]", "20", "90%", "-"]


def test_true_rewards_are_shown_with_their_interval():
    row = RewardRow("a[b]", 0.5, 10, 20, 1.25, 1.0, 1.5, 0.5, 0.1, 0.3, 0.2, 0.0)
    (line,) = grid(reward_table([row]))[1:]
    assert line == ["a[b]", "0.5", "20", "1.25 [1.00, 1.50]", "50%", "30%", "20%"]


@pytest.mark.parametrize(
    "table",
    [
        win_rate_table,
        null_table,
        differences_table,
        head_to_head_table,
        agreement_table,
        reward_table,
    ],
)
def test_what_an_evaluation_does_not_have_is_no_table(table):
    assert table([]) is None


def test_a_cell_is_empty_where_nothing_was_measured():
    rows = [rate("a", 0.5, 1, 1), rate("b", 1.0, 1, 1)]
    lines = by_temperature(rows, lambda r: (r.model,), lambda r: str(r.wins), head=("model",))
    assert lines == [["model", "0.5", "1"], ["a", "1", ""], ["b", "", "1"]]
