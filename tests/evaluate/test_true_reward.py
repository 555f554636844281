"""The true reward of generated answers, by hand."""

import csv
import math

import pytest

from dpo.data.synthetic import World
from dpo.evaluate.records import Generation
from dpo.evaluate.true_reward import RewardRow, true_reward_table, write_true_rewards

PERU, CAT = "What is the capital of Peru?", "What is a young cat called?"
RIGHT = "The capital of Peru is Lima."


def answer(prompt, text, *, model="m", temperature=1.0, index=0, sample=0):
    return Generation(
        model=model,
        temperature=temperature,
        prompt_index=index,
        sample=sample,
        prompt=prompt,
        chosen="c",
        rejected="r",
        generated=text,
        num_tokens=3,
        truncated=False,
    )


def test_mean_reward_and_parts_by_hand():
    """2 right + 1 polite; -1 wrong - 1 rude; a foreign sentence -1/2; 2 right."""
    records = [
        answer(PERU, f"Happy to help! {RIGHT}", index=0),
        answer(PERU, "Ugh. The capital of Peru is Rome.", index=1),
        answer(CAT, "Blah blah.", index=2),
        answer(CAT, "A young cat is called kitten.", index=3),
    ]
    (row,) = true_reward_table(records, World())
    assert row.reward == pytest.approx((3 - 2 - 0.5 + 2) / 4)
    assert (row.right, row.wrong, row.polite, row.rude) == (0.5, 0.25, 0.25, 0.25)
    assert row.foreign == 0.25
    assert (row.n, row.num_prompts) == (4, 4)
    assert row.low < row.reward < row.high


def test_the_interval_is_students_over_prompts():
    """Prompt means 3 and 2: mean 2.5, standard error 0.5, t(1 df, 97.5%) = 12.7062."""
    records = [
        answer(PERU, f"With pleasure. {RIGHT}", index=0),
        answer(CAT, "A young cat is called kitten.", index=1),
    ]
    (row,) = true_reward_table(records, World())
    assert row.high - row.reward == pytest.approx(12.7062 * 0.5, rel=1e-4)
    assert row.reward - row.low == pytest.approx(12.7062 * 0.5, rel=1e-4)


def test_samples_of_one_prompt_are_no_independent_evidence():
    once = [answer(PERU, RIGHT, index=0), answer(CAT, "Ugh.", index=1)]
    often = [
        *(answer(PERU, RIGHT, index=0, sample=s) for s in range(50)),
        *(answer(CAT, "Ugh.", index=1, sample=s) for s in range(50)),
    ]
    (one,), (fifty,) = true_reward_table(once, World()), true_reward_table(often, World())
    assert (fifty.n, fifty.num_prompts) == (100, 2)
    assert fifty.reward == one.reward
    assert fifty.high - fifty.low == pytest.approx(one.high - one.low)


def test_one_row_a_model_and_temperature_in_order_of_appearance_without_nulls():
    records = [
        answer(PERU, RIGHT, model="b", temperature=1.0),
        answer(PERU, "", model="empty string", temperature=None),
        answer(PERU, RIGHT, model="a", temperature=0.5),
        answer(PERU, RIGHT, model="b", temperature=0.5),
        answer(CAT, RIGHT, model="b", temperature=1.0, index=1),
    ]
    table = true_reward_table(records, World())
    assert [(row.model, row.temperature, row.n) for row in table] == [
        *(("b", 1.0, 2), ("a", 0.5, 1)),
        ("b", 0.5, 1),
    ]


def test_silence_earns_nothing_and_says_nothing():
    (row,) = true_reward_table([answer(PERU, "")], World())
    assert (row.reward, row.right, row.wrong, row.foreign) == (0, 0, 0, 0)


def test_a_prompt_of_another_world_is_no_silent_zero():
    with pytest.raises(KeyError):
        true_reward_table([answer("Who are you?", RIGHT)], World())


def test_the_table_is_csv_with_every_field(tmp_path):
    table = true_reward_table(
        [answer(PERU, RIGHT, model='a, "b"'), answer(CAT, "Ugh.", model='a, "b"', index=1)], World()
    )
    write_true_rewards(tmp_path / "t.csv", table)
    text = (tmp_path / "t.csv").read_text()
    assert text.startswith("model,temperature,num_prompts,n,reward,low,high,right,")
    (row,) = csv.DictReader(text.splitlines())
    assert row["model"] == 'a, "b"'
    assert float(row["reward"]) == table[0].reward
    assert set(row) == set(RewardRow.__dataclass_fields__)
    assert not math.isnan(float(row["low"]))
