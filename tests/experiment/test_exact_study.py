"""The study of exact worlds: its plan, its files, its page, and numbers that can be recomputed."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.config_files import read_config, validate
from dpo.core.losses import dpo
from dpo.core.stats import mean_interval
from dpo.errors import DivergedError, InputError
from dpo.evaluate.exact import Measures, coverage
from dpo.experiment import exact as study_module
from dpo.experiment.exact import part_file, run_exact
from dpo.experiment.exact_config import ExactStudyConfig, quick_form
from dpo.experiment.exact_costs import costs, num_online_pairs
from dpo.experiment.exact_methods import Snapshot, prefer, sample_pairs
from dpo.experiment.exact_trials import (
    Seeded,
    Trial,
    checkpoints,
    fit_of,
    generator_for,
    make_start,
    pairs_of_a_share,
    run_trials,
)
from dpo.report.exact_claims import claims_table, verdict
from dpo.report.exact_page import page
from dpo.report.exact_study import (
    BEST_OF_TRUE,
    DPO,
    FRONTIER,
    METHODS,
    PAIRS,
    PPO_RM,
    PPO_TRUE,
    RATE,
    RM_SOLVED,
    UNLIKELIHOOD,
    ExactStudy,
    MethodCost,
    PolicyRow,
    area_shares,
    gains,
    paired,
    read_seed,
    rewards_at,
    seconds_to,
    worst_gains,
)
from dpo.report.exact_tables import rate_table

ROOT = Path(__file__).parents[2]
FIT = {"steps": 2, "batch_size": 16, "learning_rate": 1e-3}
TINY = {
    "seeds": [0, 1],
    "processes": 1,
    "demonstrations": 64,
    "pairs": 128,
    "reference": FIT,
    "offline": FIT,
    "reward_model": FIT,
    "ppo": {"rounds": 1, "rollouts": 16, "epochs": 2, "minibatch_size": 16},
    "online": {"pairs_per_round": 16, "passes": 1},
    "betas": [1.0],
    "on_policy_betas": [1.0],
    "ipo_betas": [0.2],
    "unlikelihood_alphas": [0.3],
    "best_of": [2, 4],
    "pair_counts": [32],
    "reward_model_pairs": [32],
    "shares": [0.5],
    "rate_factors": [3.0],
}


def study_config(folder, **changes):
    return validate(ExactStudyConfig, {**TINY, **changes, "out": str(folder)})


def lines_of(file):
    return list(csv.DictReader(file.read_text("utf-8").splitlines()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "study"
    return run_exact(study_config(folder)), folder


# -- settings ------------------------------------------------------------------------------------


def test_the_file_shows_every_key_and_its_default():
    config = read_config(ExactStudyConfig, ROOT / "studies" / "exact.yaml")
    assert config.model_fields_set == ExactStudyConfig.model_fields.keys()
    assert config == ExactStudyConfig(out="runs/exact")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"beta": 0.5}, r"betas: expected to find beta \(0\.5\) there"),
        ({"on_policy_betas": [0.1]}, r"on_policy_betas: expected to find beta \(1\)"),
        ({"seeds": [1, 1]}, "seeds: expected different ones"),
        ({"best_of": [4, 4]}, "best_of: expected different ones"),
        ({"pair_counts": [128]}, "pair_counts: 128 is measured anyway"),
        ({"reward_model_pairs": [128]}, "reward_model_pairs: 128 is measured anyway"),
        ({"rate_factors": [1.0]}, "rate_factors: 1 is measured anyway"),
        ({"shares": [1.5]}, "shares"),
        ({"betas": []}, "betas: list should have at least 1 item"),
        ({"ppo": {"rollouts": 100, "minibatch_size": 64}}, r"rollouts \(100\) must be a multiple"),
        ({"ppo": {"epoch": 3}}, "epoch"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        run_exact(study_config(tmp_path / "study", **changes))
    assert not (tmp_path / "study").exists()


def test_the_quick_form_is_one_seed_with_less_of_everything():
    config = ExactStudyConfig(out="runs/exact")
    quick = quick_form(config)
    assert (quick.out, quick.seeds, quick.betas) == ("runs/exact-quick", [6], [config.beta])
    assert quick.offline.steps < config.offline.steps
    assert quick.ppo.steps < config.ppo.steps
    assert ExactStudyConfig.model_validate(quick.model_dump()) == quick


def test_a_training_is_measured_at_its_end_and_at_halves_of_it():
    assert sorted(checkpoints(64)) == [2, 4, 8, 16, 32, 64]
    assert all(b == 2 * a for a, b in pairwise(sorted(checkpoints(64))))
    assert checkpoints(2) == {1, 2}


def test_costs_count_models_data_and_settings():
    config = ExactStudyConfig(out="x")
    cost = {one.method: one for one in costs(config)}
    assert [len(cost[m].models) for m in (DPO, PPO_RM, PPO_TRUE)] == [2, 4, 3]
    assert (cost[DPO].responses, cost[DPO].labels, cost[DPO].rewards) == (40_000, 20_000, 0)
    rollouts = config.ppo.rounds * config.ppo.rollouts
    assert (cost[PPO_TRUE].responses, cost[PPO_TRUE].rewards) == (rollouts, rollouts)
    assert cost[PPO_RM].responses == 40_000 + rollouts
    assert cost[DPO].settings == 4  # beta, steps, batch size, rate
    assert cost[PPO_RM].settings == 3 + 8 + 1
    # 4 bytes: two models, a gradient and two moments of one, of 100k parameters and some more.
    assert cost[DPO].megabytes == pytest.approx(4 * 5 * 0.102, rel=0.02)
    assert num_online_pairs(config) % config.online.pairs_per_round == 0
    assert num_online_pairs(config) * config.online.passes >= config.offline.steps * 128


# -- the study -----------------------------------------------------------------------------------


def test_every_method_is_there_and_the_last_policy_of_each_is_marked(finished):
    study, _ = finished
    assert {row.method for row in study.rows(FRONTIER)} == set(METHODS)
    for seed in study.seeds:
        keys = [(r.effect, r.method, r.strength, r.varied) for r in seed.policies]
        ends = [key for key, row in zip(keys, seed.policies, strict=True) if row.last]
        assert len(ends) == len(set(ends)) == len(set(keys))
        assert not seed.diverged
    assert {row.step for row in study.rows(method=DPO)} == {1, 2}


def test_the_files_hold_what_the_study_says(finished):
    study, folder = finished
    promised = ["README.md", "study.json", "table.csv", "policies.csv", "manifest.json"]
    promised += [
        f"figures/{n}.{s}" for n in ("frontier", "data", "time") for s in ("png", "svg", "csv")
    ]
    assert all((folder / name).stat().st_size > 100 for name in promised)
    rows = lines_of(folder / "policies.csv")
    assert len(rows) == sum(len(seed.policies) for seed in study.seeds)
    assert float(rows[0]["kl"]) == study.seeds[0].policies[0].measured.kl
    table = lines_of(folder / "table.csv")
    (line,) = [
        row
        for row in table
        if (row["effect"], row["method"], row["strength"]) == (FRONTIER, PPO_TRUE, "1.0")
    ]
    values = [
        float(row["reward"])
        for row in rows
        if (row["effect"], row["method"], row["last"]) == (FRONTIER, PPO_TRUE, "True")
    ]
    assert len(values) == 2
    low, high = mean_interval(values)
    found = [float(line[name]) for name in ("reward", "reward_low", "reward_high")]
    assert found == pytest.approx([np.mean(values), low, high])
    told = json.loads((folder / "study.json").read_text("utf-8"))
    assert {"config", "environment"} == told.keys()


def test_a_policy_is_trained_again_by_hand_and_has_the_same_numbers(finished):
    study, folder = finished
    config = study_config(folder)
    start = make_start(config, 1)
    world = start.world
    pairs = sample_pairs(world, world.log_ref, 128, generator_for(1, "pairs"))
    generator = generator_for(1, "DPO 1.0")
    *_, end = prefer(start, pairs, partial(dpo, beta=1.0), fit_of(config.offline), generator)
    seen = pairs.covered(world.reward.shape)
    expected = asdict(Measures(world)(end.log_policy, beta=1.0, seen=seen))
    (row,) = [row for row in study.at_beta(DPO) if row.seed == 1]
    assert asdict(row.measured) == pytest.approx(expected, nan_ok=True)


def test_fewer_pairs_cover_less(finished):
    study, _ = finished
    everything = {row.seed: row.measured.coverage for row in study.at_beta(DPO)}
    for row in study.final(PAIRS):
        assert 0 < row.measured.coverage < everything[row.seed]


def test_pairs_of_a_share_have_no_other_responses_and_are_as_many(finished):
    _, folder = finished
    config = study_config(folder, pairs=20_000)
    start = make_start(config, 0)
    here = Seeded(
        config,
        0,
        start,
        sample_pairs(start.world, start.world.log_ref, 8, generator_for(0, "pairs")),
    )
    pairs = pairs_of_a_share(here, 0.25)
    assert len(pairs) == 20_000
    seen = here.seen(pairs)
    picked = torch.rand(seen.shape, generator=here.random("share 0.25")) < 0.25
    assert not (seen & ~picked).any()
    assert coverage(start.world, seen) == pytest.approx(0.25, abs=0.05)


def test_best_of_n_and_the_solved_reward_model_need_no_training(finished):
    study, _ = finished
    assert {row.seconds for row in study.rows(method=BEST_OF_TRUE)} == {0.0}
    for row in study.final(method=BEST_OF_TRUE):
        n = row.strength
        assert 0 < row.measured.kl < math.log(n) - (n - 1) / n
        assert 0.9 < row.measured.efficiency <= 1.0
    fitted = {(s.seed, m.pairs): m.seconds for s in study.seeds for m in s.reward_models}
    assert {m for _, m in fitted} == {32, 128}
    for row in study.final(method=RM_SOLVED):
        assert row.seconds == fitted[row.seed, 128]
    for row in study.final(method=PPO_RM):
        assert row.seconds > fitted[row.seed, 128]


def test_a_finished_study_runs_nothing_again_and_a_new_seed_only_itself(finished, monkeypatch):
    study, folder = finished
    ran = []
    run_part = study_module.run_part

    def remembered(config, seed, part):
        ran.append((seed, part))
        return run_part(config, seed, part)

    monkeypatch.setattr(study_module, "run_part", remembered)
    before = (folder / "table.csv").read_bytes()
    again = run_exact(study_config(folder))
    assert ran == []
    assert again.seeds == study.seeds
    assert (folder / "table.csv").read_bytes() == before
    part_file(study_config(folder), 1, "rewards").unlink()
    run_exact(study_config(folder))
    assert ran == [(1, "rewards")]
    with pytest.raises(InputError, match=r"betas: \[1\.0\] there, \[1\.0, 0\.3\] now"):
        run_exact(study_config(folder, betas=[1.0, 0.3]))
    assert ran == [(1, "rewards")]


@pytest.mark.slow
def test_halves_that_run_at_the_same_time_are_the_same(finished, tmp_path):
    study, _ = finished
    config = study_config(tmp_path / "study", seeds=[0], processes=2)
    (found,) = run_exact(config).seeds

    def untimed(rows):
        return [replace(row, seconds=0.0) for row in rows]

    assert untimed(found.policies) == untimed(study.seeds[0].policies)
    assert part_file(config, 0, "pairs").is_file()


def test_a_trial_that_diverges_is_told_and_the_others_go_on(finished):
    study, folder = finished
    start = make_start(study_config(folder), 0)

    def diverging():
        yield Snapshot(1, 0.1, start.world.log_ref)
        raise DivergedError("Step 2: the loss is nan.")

    fine = iter([Snapshot(1, 0.1, start.world.log_ref)])
    trials = [Trial(DPO, 0.5, diverging(), 0.5), Trial(DPO, 1.0, fine, 1.0)]
    policies, diverged = run_trials(trials, 0, Measures(start.world))
    assert [(row.strength, row.last) for row in policies] == [(1.0, True)]
    assert diverged == ["DPO 0.5: Step 2: the loss is nan."]
    seeds = [replace(study.seeds[0], diverged=diverged), study.seeds[1]]
    text = page(ExactStudy(folder, seeds, study.costs, study.config))
    assert "## Trials that diverged" in text
    assert "- seed 0, DPO 0.5: Step 2: the loss is nan." in text
    assert "diverged" not in page(study)


# -- what is said of it --------------------------------------------------------------------------


def invented(finished, gains_of):
    """A study whose gains at beta 1 are given by method and factor on the rate, one a seed."""
    study, folder = finished
    rows = {
        row.method: row
        for row in study.at_beta(DPO) + study.at_beta(PPO_RM) + study.at_beta(PPO_TRUE)
    }
    seeds = []
    for number in range(3):
        policies = [
            replace(
                rows[method],
                seed=number,
                effect=FRONTIER if factor == 1 else RATE,
                varied=None if factor == 1 else factor,
                measured=replace(rows[method].measured, gain=values[number]),
                seconds=10.0 if method == DPO else 20.0 + number,
            )
            for (method, factor), values in gains_of.items()
        ]
        seeds.append(replace(study.seeds[0], seed=number, policies=policies))
    return ExactStudy(folder, seeds, study.costs, study.config)


def test_claims_are_paired_by_seed_and_judged_by_their_interval(finished):
    study = invented(
        finished,
        {
            (DPO, 1): [0.90, 0.91, 0.92],
            (DPO, 3.0): [0.80, 0.95, 0.85],
            (PPO_RM, 1): [0.80, 0.81, 0.83],
            (PPO_RM, 3.0): [0.10, 0.20, 0.15],
            (PPO_TRUE, 1): [0.95, 0.96, 0.97],
            (PPO_TRUE, 3.0): [0.99, 0.99, 0.99],
        },
    )
    assert worst_gains(study, DPO) == {0: 0.80, 1: 0.91, 2: 0.85}
    lines = {(line[0], line[1]): line[2:] for line in claims_table(study)[1:]}
    nearer = lines["nearer to π*", "gain at the study's beta, DPO's less PPO's"]
    low, high = mean_interval([0.10, 0.10, 0.09])
    assert nearer[0] == f"+0.097 [{low:+.3f}, {high:+.3f}]: **holds**"
    assert nearer[1].endswith("**does not hold**")
    faster = lines["faster", "processor seconds of all training, PPO's ratio to DPO's"]
    ratio = math.exp(np.mean(np.log([2.0, 2.1, 2.2])))
    assert faster[0].startswith(f"{ratio:.2f} [")
    assert faster[0].endswith("**holds**")
    stable = lines["more stable", "worst gain over learning rates, DPO's less PPO's"]
    assert stable[0].endswith("**holds**")
    assert stable[1].endswith("open")  # -0.15, -0.05, -0.12
    assert rate_table(study)[1][-1].startswith("0.853 [")


def test_a_claim_that_the_interval_does_not_decide_is_open():
    assert verdict([0.1, 0.2, -0.1]).endswith("open")
    assert verdict([0.1]).startswith("open")
    assert verdict([math.log(2.0), math.log(2.1)], ratio=True).startswith("2.05 [1.50, 2.79]: **h")


def test_frontiers_go_through_the_final_policies(finished):
    study, _ = finished
    for number, seed in enumerate(study.seeds):
        own = [row.measured for row in study.final(method=BEST_OF_TRUE) if row.seed == seed.seed]
        for one in own:
            assert rewards_at(study, BEST_OF_TRUE, one.kl)[number] == pytest.approx(
                one.reward, abs=1e-3
            )
        beyond = rewards_at(study, BEST_OF_TRUE, 4.0)[number]
        assert beyond == pytest.approx(max(one.reward for one in own))
        exact = [reward for _, _, reward in seed.frontier]
        assert exact == sorted(exact)  # the smaller beta, the more
    for method in METHODS:
        assert all(0 <= share <= 1 for share in area_shares(study, method))
    best = area_shares(study, BEST_OF_TRUE)
    assert min(best) > max(area_shares(study, PPO_TRUE))  # one round of PPO is next to nothing


def test_time_to_a_gain_is_that_of_the_first_checkpoint_that_has_it(finished):
    study, folder = finished
    (row,) = [row for row in study.at_beta(DPO) if row.seed == 0]

    def at(step, seconds, gain):
        return replace(row, step=step, seconds=seconds, measured=replace(row.measured, gain=gain))

    rows = [at(1, 1.0, 0.5), at(2, 2.0, 0.93), at(4, 4.0, 0.91)]
    invented_study = ExactStudy(folder, [replace(study.seeds[0], policies=rows)], [], study.config)
    assert seconds_to(invented_study, DPO, 0.9) == {0: 2.0}
    assert seconds_to(invented_study, DPO, 0.99) == {}


def test_differences_are_of_the_seeds_that_both_have(finished):
    study, _ = finished
    assert paired({0: 1.0, 1: 3.0}, {1: 1.0, 2: 9.0}) == [2.0]
    assert gains(study.final(method=UNLIKELIHOOD)) == {}  # its strength is no beta


def test_one_seed_makes_a_page_without_intervals(finished, tmp_path):
    study, folder = finished
    alone = ExactStudy(folder, study.seeds[:1], study.costs, study.config)
    text = page(alone)
    assert "open: too few seeds" in text
    assert "inf" not in text
    assert "nan" not in text


def test_a_seed_is_read_as_it_was_written(finished):
    study, folder = finished
    part = read_seed(folder / "seed-0-pairs.json")
    assert isinstance(part.policies[0], PolicyRow)
    assert part.policies == study.seeds[0].policies[: len(part.policies)]
    assert part.frontier == study.seeds[0].frontier
    assert isinstance(study.costs[0], MethodCost)
