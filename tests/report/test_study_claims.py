"""What a study on given pairs says of the claims about DPO and PPO."""

from dataclasses import fields, replace

import pytest

from dpo.evaluate.jobs import Evaluation
from dpo.evaluate.paired import PairedTest
from dpo.report.frontier_study import Cost
from dpo.report.study_claims import claims_table
from dpo.report.study_results import CellResult, Study

PPO = "PPO, reward model"
CURVES = ("epochs", "loss", "accuracy", "chosen_change", "kl", "kl_stderr")


def cost(seconds, keys, reward_model_seconds=0.0):
    known = {"seconds": seconds, "keys": keys, "reward_model_seconds": reward_model_seconds}
    return Cost(**{field.name: known.get(field.name, 0) for field in fields(Cost)})


def result(label, seed, models, **of_cost):
    curves = {name: [0.0] for name in CURVES}
    return CellResult(
        label=label, seed=seed, folder="run", models=models, cost=cost(**of_cost), **curves
    )


def paired_test(first, second, difference, low, high, p, temperature=1.0):
    known = {
        "family": "models",
        "model_a": first,
        "model_b": second,
        "temperature": temperature,
        "difference": difference,
        "low": low,
        "high": high,
        "mcnemar_p_holm": p,
    }
    return PairedTest(**{field.name: known.get(field.name, 0) for field in fields(PairedTest)})


RESULTS = [
    result("DPO beta 0.1", 0, ["policy", "reference"], seconds=10.0, keys=6),
    result("DPO beta 0.3", 0, ["policy", "reference"], seconds=30.0, keys=6),
    result("DPO beta 0.1", 1, ["policy", "reference"], seconds=40.0, keys=6),
    result(PPO, 0, [*"abcd"], seconds=70.0, keys=14, reward_model_seconds=10.0),
    result(PPO, 1, [*"abcd"], seconds=150.0, keys=14, reward_model_seconds=10.0),
]


def table(tmp_path, results=RESULTS, tests=()):
    return claims_table(Study(tmp_path, [*results], Evaluation(tmp_path, [], [*tests], [], [])))


def test_ppos_seconds_have_its_reward_models_and_dpos_are_the_mean_over_strengths(tmp_path):
    faster = table(tmp_path)[2]
    assert faster[0] == "faster"
    assert faster[2].startswith("4.00 [4.00, 4.00]")  # (70 + 10) / 20 and (150 + 10) / 40


def test_simpler_asks_for_fewer_models_and_fewer_settings(tmp_path):
    assert table(tmp_path)[1][2] == "2 against 4; 6 against 14: **holds**"
    as_many = [replace(r, cost=cost(1.0, keys=14)) for r in RESULTS]
    assert table(tmp_path, as_many)[1][2] == "2 against 4; 14 against 14: **does not hold**"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (("DPO beta 0.1", PPO, 0.2, 0.1, 0.3, 0.01), "+20.0% [+10.0%, +30.0%]: **holds**"),
        ((PPO, "DPO beta 0.1", 0.2, 0.1, 0.3, 0.01), "-20.0% [-30.0%, -10.0%]: **does not hold**"),
        (("DPO beta 0.1", PPO, 0.2, 0.1, 0.3, 0.06), "+20.0% [+10.0%, +30.0%]: open"),
        (("DPO beta 0.1", PPO, 0.2, -0.1, 0.5, 0.01), "+20.0% [-10.0%, +50.0%]: open"),
    ],
)
def test_a_win_rate_is_called_better_by_interval_and_corrected_test_whoever_is_first(
    tmp_path, case, said
):
    lines = table(tmp_path, tests=[paired_test(*case)])
    assert lines[3] == [
        "a better policy",
        "win rate at temperature 1, DPO beta 0.1's less PPO's",
        said,
    ]


def test_comparisons_without_ppo_or_without_dpo_are_no_claims(tmp_path):
    others = [
        paired_test("DPO beta 0.1", "SFT", 0.2, 0.1, 0.3, 0.01),
        paired_test("SFT", PPO, 0.2, 0.1, 0.3, 0.01),
    ]
    assert len(table(tmp_path, tests=others)) == 3
    assert len(table(tmp_path, [r for r in RESULTS if r.label != PPO])) == 1
