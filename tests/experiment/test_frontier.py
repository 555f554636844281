"""The study of frontiers: what is possible, what methods reached, and a table that follows from
the run directories.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo.config_files import read_config, validate
from dpo.core.exact import World
from dpo.core.frontier import Point, area_under, optimum_at_kl, reward_at_kl
from dpo.data.synthetic import World as Language
from dpo.errors import InputError
from dpo.evaluate.frontier import (
    best_of_n,
    curve_stderr,
    efficiency,
    optimum_curve,
    within_prompt_correlation,
    world_of_samples,
)
from dpo.experiment import frontier
from dpo.experiment.frontier import held_out_questions, run_frontier
from dpo.experiment.frontier_config import (
    FrontierConfig,
    kind_of,
    left_out,
    plan,
    quick_form,
)
from dpo.experiment.frontier_results import named_keys, responses_drawn
from dpo.experiment.methods import METHOD_KINDS
from dpo.report.exact_study import BEST_OF_TRUE, DPO, MAX_KL, PPO_RM, PPO_TRUE
from dpo.report.frontier_claims import answers
from dpo.report.frontier_page import page
from dpo.report.frontier_study import (
    Cost,
    FrontierStudy,
    Measurement,
    RewardModelFit,
    RunResult,
    SeedResult,
    area_shares,
    drops,
    hull,
    rewards_at,
)
from dpo.train.run import read_manifest, read_metrics
from train.small_runs import dpo

ROOT = Path(__file__).parents[2]
ON_SAMPLES = {"rounds": 2, "prompts_per_round": 4, "batch.size": 4}
TINY = {
    "seeds": [0],
    "processes": 2,
    "sft_steps": 15,
    "num_facts": 8,
    "pairs_per_question": 2,
    "budget": {"steps": 2, "pairs_per_step": 4, "learning_rate": 1e-3},
    "strengths": {"dpo": [0.1, 1.0], "ppo_rm": [0.1], "ppo_true": [0.1], "online": [0.1]},
    "best_of": [1, 4],
    "settings": {
        "ppo_rm": {**ON_SAMPLES, "epochs_per_round": 1},
        "ppo_true": {**ON_SAMPLES, "epochs_per_round": 1},
        "online": {**ON_SAMPLES, "samples_per_prompt": 2},
    },
    "shift": {"dpo": 0.1},
    "evaluations": 2,
    "samples_per_question": 2,
    "optimum_samples": 16,
}


def study_config(folder, **changes):
    return validate(FrontierConfig, {**TINY, **changes, "out": str(folder)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study and its folder."""
    folder = tmp_path_factory.mktemp("frontier") / "study"
    return run_frontier(study_config(folder)), folder


# -- what is possible ----------------------------------------------------------------------------


def enumerable_world():
    """Two prompts, five responses; rewards of three values each."""
    log_ref = torch.tensor(
        [[0.5, 0.2, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.3, 0.1]], dtype=torch.float64
    ).log()
    reward = torch.tensor([[0, 1, 1, 2, 0], [-1, 0.5, 0.5, 0.5, 3]], dtype=torch.float64)
    return World(torch.tensor([0.5, 0.5], dtype=torch.float64), log_ref, reward)


def samples_of(world):
    """Ten samples of each prompt, in the very proportions of the world."""
    counts = (10 * world.log_ref.exp()).round().long()
    return torch.stack([r.repeat_interleave(c) for r, c in zip(world.reward, counts, strict=True)])


def test_the_curve_from_a_reward_histogram_is_that_of_the_enumerable_world():
    world = enumerable_world()
    curve = optimum_curve(world_of_samples(samples_of(world)))
    for kl in (0.05, 0.3, 0.7, 1.2):
        assert reward_at_kl(curve, kl) == pytest.approx(optimum_at_kl(world, kl).reward, abs=1e-3)
    assert curve[0] == pytest.approx((0, float(world.expected_reward(world.log_ref))), abs=1e-9)
    assert curve[-1].reward == pytest.approx(2.5, abs=1e-6)  # each prompt's best
    assert curve[-1].kl == pytest.approx(math.log(10), abs=1e-4)  # of probability 0.1 in both


def test_the_optimum_has_efficiency_one_and_the_reference_gains_nothing():
    world = enumerable_world()
    curve = optimum_curve(world_of_samples(samples_of(world)))
    optimum = world.optimum(beta=0.37)  # none of the curve's own
    found = Point(float(world.kl_to_ref(optimum)), float(world.expected_reward(optimum)))
    assert efficiency(found, curve) == pytest.approx(1, abs=1e-3)
    assert efficiency(Point(1.0, curve[0].reward), curve) == 0
    assert math.isnan(efficiency(curve[0], curve))


def test_best_of_n_from_samples_lies_under_the_curve_with_the_kl_of_its_policy():
    rewards = samples_of(enumerable_world())
    curve = optimum_curve(world_of_samples(rewards))
    one, two, four = best_of_n(rewards, [1, 2, 4])
    assert (one.reward, one.kl) == pytest.approx((curve[0].reward, 0.0), abs=1e-12)
    # Two without replacement of ten: P(both 0) = 15/45 where 6 are 0, P(any 2) = 9/45.
    first = 0 * 15 / 45 + 2 * 9 / 45 + 1 * (1 - 24 / 45)
    second = -1 * 1 / 45 + 3 * 9 / 45 + 0.5 * (1 - 10 / 45)
    assert two.reward == pytest.approx((first + second) / 2)
    for each in (two, four):
        assert 0 < each.kl < each.kl_bound
    assert four.reward > two.reward > one.reward
    # Chosen by noise, the best of four is any of them.
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(200, *rewards.shape, generator=generator, dtype=torch.float64)
    by_noise = torch.tensor([best_of_n(rewards, [4], scores=scores)[0].reward for scores in noise])
    stderr = float(by_noise.std()) / 200**0.5
    assert abs(float(by_noise.mean()) - one.reward) < 4 * stderr < two.reward - one.reward


def test_more_samples_make_the_curve_more_certain():
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(0, 4, (5, 20), generator=generator).double()
    many = torch.randint(0, 4, (5, 320), generator=generator).double()
    (wide,), (narrow,) = (curve_stderr(r, [0.5], num_resamples=40) for r in (few, many))
    assert wide == pytest.approx(4 * narrow, rel=0.5)  # a sixteenth of the samples


def test_correlation_is_within_prompts_and_leaves_out_those_that_do_not_vary():
    rewards = torch.tensor([[0.0, 1, 2], [5, 5, 5], [3, 2, 1]], dtype=torch.float64)
    scores = torch.tensor([[9.0, 10, 11], [0, 1, 2], [0, 10, 20]], dtype=torch.float64)
    assert within_prompt_correlation(rewards, scores) == pytest.approx(0)  # 1, none and -1


# -- what methods reached ------------------------------------------------------------------------


def run_of(seed, method, strength, *points, diverged="", seconds=10.0):
    trail = [Measurement(i, kl, 0.1, reward, 0.1) for i, (kl, reward) in enumerate(points, 1)]
    cost = Cost(seconds, 0.0, 1_000_000, len(points), 100, 0, 5)
    return RunResult(seed, method, strength, trail, None if diverged else cost, diverged)


def study_of(folder, *seeds):
    """A study made by hand; a curve from (0, 0) over (1, 2) to (3, 3)."""
    curve = [Point(0, 0), Point(1, 2), Point(3, 3)]
    results = [
        SeedResult(
            seed=number,
            reference_reward=0.0,
            curve=curve,
            curve_stderr=[0.01, 0.01, 0.01],
            best_of={BEST_OF_TRUE: best_of_n(samples_of(enumerable_world()), [1, 2])},
            reward_model=RewardModelFit(0.7, 0.75, 0.6),
            runs=runs,
            shift=[],
        )
        for number, runs in enumerate(seeds)
    ]
    config = FrontierConfig(out=str(folder)).model_dump(mode="json")
    models = {m.title: ["policy"] for m in METHOD_KINDS.values()} | {PPO_RM: ["policy", "critic"]}
    return FrontierStudy(Path(folder), results, models, num_questions=3, config=config)


def test_a_frontier_is_the_hull_of_all_strengths_and_times_and_level_beyond(tmp_path):
    runs = [
        run_of(0, DPO, 0.1, (1, 1), (2, 0.5)),
        run_of(0, DPO, 1.0, (0.5, 0.2), (2, 1.4)),
        run_of(0, PPO_RM, 0.1, (0.5, 1)),
    ]
    study = study_of(tmp_path, runs)
    assert hull(study.seeds[0], DPO) == [Point(0, 0), Point(1, 1), Point(2, 1.4)]
    heights = [rewards_at(study, DPO, kl)[0] for kl in (0.5, 1.5, 4)]
    assert heights == pytest.approx([0.5, 1.2, 1.4])
    own = 0.5 + 1.2 + 2 * 1.4
    possible = 1 + 5 + 3  # a triangle, a trapezium, and level from 3 to 4
    assert area_under(study.seeds[0].curve, MAX_KL) == possible
    assert area_shares(study, DPO)[0] == pytest.approx(own / possible)
    assert drops(study, DPO)[0] == pytest.approx((0.5 + 0) / 2)  # mean over strengths


def test_a_diverged_run_is_a_result_with_its_sentence(tmp_path):
    failed = run_of(0, PPO_RM, 0.1, (0.5, 1), diverged="Step 2: the loss is nan.")
    study = study_of(tmp_path, [run_of(0, DPO, 0.1, (1, 1)), failed])
    assert study.runs(PPO_RM) == []
    assert rewards_at(study, PPO_RM, 0.5) == {0: 1.0}  # it was there before
    assert "Step 2: the loss is nan." in page(study)


@pytest.mark.parametrize(
    ("lead", "time", "said"),
    [
        (0.5, 2, "faster (2.0 times), scatters"),
        (0.5, 2, "its worst strength ends better, and its frontier is better (+"),
        (-0.5, 0.5, "slower (2.0 times), scatters"),
        (-0.5, 0.5, "its worst strength ends worse, and its frontier is worse (-"),
    ],
)
def test_the_claims_are_answered_by_the_numbers_either_way(tmp_path, lead, time, said):
    seeds = []
    for seed in range(3):
        runs = [run_of(seed, DPO, 0.1, (1, 1 + lead + 0.01 * seed), seconds=10)]
        for rival in (PPO_RM, PPO_TRUE):
            own = (1, 1 - 0.01 * seed)
            runs.append(run_of(seed, rival, 0.1, own, seconds=10 * time + seed / 100))
        seeds.append(runs)
    text = "\n".join(answers(study_of(tmp_path, *seeds)))
    assert text.count(said) == 2
    assert "1 against 2; 5 against 5: **does not hold**" in text


# -- the plan ------------------------------------------------------------------------------------


def test_the_file_shows_every_key_and_its_default():
    config = read_config(FrontierConfig, ROOT / "studies" / "frontier.yaml")
    assert config.model_fields_set == FrontierConfig.model_fields.keys()
    assert config == FrontierConfig(out="runs/frontier")


def test_every_method_starts_from_its_seeds_sft_model_on_the_same_questions():
    config = read_config(FrontierConfig, ROOT / "studies" / "frontier.yaml")
    runs = plan(config)
    strengths = sum(len(values) for values in config.strengths.values())
    assert len(runs) == len(config.seeds) * (strengths + len(config.shift))
    for run in runs:
        folder = Path(f"runs/frontier/seed-{run.seed}")
        assert Path(run.config.model.path) == folder / "sft"
        name = "pairs-without.jsonl" if run.without else "pairs.jsonl"
        assert Path(run.config.data.path) == folder / "pairs" / name
        assert (run.config.data.test_fraction, run.config.data.split_seed) == (0.25, 0)
        assert run.config.evaluation.reward.function == "synthetic"
        if run.method in ("ppo_rm", "online"):
            model = folder / ("reward-without" if run.without else "reward")
            assert Path(run.config.reward.model) == model
    of_dpo = [run.config.loss.beta for run in runs if run.method == "dpo" and run.seed == 0]
    assert of_dpo == [*config.strengths["dpo"], config.shift["dpo"]]


def test_the_quick_form_has_one_seed_and_one_strength_of_every_method_elsewhere():
    config = quick_form(read_config(FrontierConfig, ROOT / "studies" / "frontier.yaml"))
    runs = plan(config)
    assert config.out == "runs/frontier-quick"
    assert [run.method for run in runs if not run.without] == list(config.strengths)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"strengths": {"dpoo": [0.1]}}, "strengths.dpoo: expected one of dpo, ipo"),
        ({"strengths": {"dpo": [0.1, 0.1]}}, "strengths.dpo: expected different ones"),
        ({"strengths": {"dpo": []}}, "strengths.dpo: list should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: expected different ones"),
        ({"shift": {"dpo": 0.2}}, "shift.dpo: expected one of strengths.dpo, for it is compared"),
        ({"best_of": [64]}, "best_of: 64 is more than the optimum_samples, 16"),
        ({"settings": {"ppo": {}}}, "settings.ppo: expected one of dpo, ipo"),
        ({"settings": {"dpo": {"loss.beta": 1}}}, "settings.dpo.loss.beta: the study sets this"),
        ({"settings": {"dpo": {"loss": {"beta": 1}}}}, "settings.dpo.loss.beta: the study sets"),
        ({"settings": {"ppo_rm": {"clop": 1}}}, "settings.ppo_rm: clop: unknown key; did you mean"),
        ({"settings": {"reward_model": {"seed": 1}}}, "reward_model.seed: the study sets this"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_anything_runs(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence) as raised:
        run_frontier(study_config(tmp_path / "study", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "study").exists()


def test_cost_counts_what_a_configuration_names_and_what_a_run_draws(tmp_path):
    runs = {run.method: run.config for run in plan(study_config(tmp_path)) if not run.without}
    assert named_keys(runs["dpo"]) == [
        "batch.max_tokens",
        "batch.size",
        "loss.beta",
        "loss.name",
        "max_steps",
        "optimizer.learning_rate",
    ]
    assert {"kl.coefficient", "reward.model", "rounds"} <= {*named_keys(runs["ppo_rm"])}
    drawn = {name: responses_drawn(config, num_pairs=50) for name, config in runs.items()}
    assert drawn == {"dpo": 100, "ppo_rm": 8, "ppo_true": 8, "online": 16}


# -- the study -----------------------------------------------------------------------------------


def table_of(folder):
    return list(csv.DictReader((folder / "table.csv").read_text("utf-8").splitlines()))


def folder_of(row, folder):
    key = next(key for key, kind in METHOD_KINDS.items() if kind.title == row["method"])
    return folder / "seed-0" / "runs" / f"{key}-{float(row['strength']):g}"


def test_the_numbers_of_the_table_are_those_of_the_runs(finished):
    study, folder = finished
    rows = table_of(folder)
    assert [row["method"] for row in rows] == [
        METHOD_KINDS[name].title for name, values in TINY["strengths"].items() for _ in values
    ]
    tables = load_file(folder / "seed-0" / "samples" / "samples.safetensors")
    curve = optimum_curve(world_of_samples(tables["rewards"]))
    for row in rows:
        run = folder_of(row, folder)
        measured = [m for m in read_metrics(run) if "eval/reward" in m]
        assert float(row["kl"]) == measured[-1]["eval/kl"]
        assert float(row["reward"]) == measured[-1]["eval/reward"]
        assert int(row["step"]) == measured[-1]["step"] == read_manifest(run)["steps"]
        assert float(row["seconds"]) == read_manifest(run)["seconds_training"]
        assert int(row["peak_memory_bytes"]) > 0
        if row["efficiency"]:
            point = Point(float(row["kl"]), float(row["reward"]))
            assert float(row["efficiency"]) == pytest.approx(efficiency(point, curve))
    assert study.seeds[0].reference_reward == pytest.approx(tables["rewards"].mean().item())
    assert len(study.seeds[0].runs[0].trail) == 2


def test_every_run_measures_the_true_reward_of_the_same_sft_model_at_first(finished):
    _, folder = finished
    starts = {
        (metrics[0]["eval/kl"], metrics[0]["eval/reward"])
        for row in table_of(folder)
        for metrics in [[m for m in read_metrics(folder_of(row, folder)) if "eval/reward" in m]]
    }
    assert len(starts) == 1
    assert next(iter(starts))[0] == 0


def test_held_out_questions_are_those_that_training_leaves_out(finished):
    _, folder = finished
    questions = held_out_questions(Language(TINY["num_facts"]))
    known = json.loads((folder / "seed-0" / "samples" / "questions.json").read_text("utf-8"))
    assert known == questions
    lines = (folder / "seed-0" / "pairs" / "pairs-without.jsonl").read_text("utf-8").splitlines()
    kinds = {kind_of(json.loads(line)["prompt"]) for line in lines}
    assert len(kinds) == 3
    assert left_out(0) not in kinds


def test_the_page_has_its_parts_and_figures(finished):
    _, folder = finished
    text = (folder / "README.md").read_text("utf-8")
    for name in ("frontier", "cost", "shift"):
        assert f"(figures/{name}.svg)" in text
        for suffix in ("svg", "png", "csv"):
            assert (folder / "figures" / f"{name}.{suffix}").stat().st_size > 100
    assert "log n - (n - 1)/n" in text
    assert {"config", "environment"} <= json.loads((folder / "study.json").read_text()).keys()


def test_a_study_goes_on_where_it_was_and_repeats_no_finished_run(finished):
    study, folder = finished
    lost = folder / "seed-0" / "runs" / "dpo-1"

    def files():
        found = [f for f in folder.glob("seed-0/**/*") if f.is_file() and f.name != ".lock"]
        return {f: f.stat().st_mtime_ns for f in found if lost not in f.parents}

    before = files()
    shutil.rmtree(lost)
    again = run_frontier(study_config(folder))
    assert files() == before
    for old, new in zip(study.seeds[0].runs, again.seeds[0].runs, strict=True):
        assert new.trail == old.trail  # the lost run too, bit for bit
    assert replace(again.seeds[0], runs=[]) == replace(study.seeds[0], runs=[])


def test_other_settings_in_its_folder_are_refused(finished):
    _, folder = finished
    with pytest.raises(InputError, match="pairs_per_question: 2 there, 3 now"):
        run_frontier(study_config(folder, pairs_per_question=3))


def test_a_run_that_diverges_is_remembered_and_not_repeated(finished, tmp_path, monkeypatch):
    _, folder = finished
    (run,) = [r for r in plan(study_config(folder)) if r.method == "dpo" and r.strength == 1.0]
    broken = {"out": str(tmp_path / "run")}
    optimizer = run.config.optimizer.model_copy(update={"learning_rate": 1e30, "warmup": 0.0})
    config = run.config.model_copy(update={**broken, "optimizer": optimizer})
    frontier.finish(config)
    said = json.loads((tmp_path / "run" / "diverged.json").read_text("utf-8"))["sentence"]
    assert "loss is nan" in said
    monkeypatch.setattr(frontier, "JOBS", {})
    frontier.finish(config)  # known: not asked again


def test_a_small_form_leaves_its_page_in_its_own_folder(finished, tmp_path, monkeypatch):
    study, folder = finished
    small = shutil.copytree(folder, tmp_path / "frontier-quick")
    (small / "index.html").unlink(missing_ok=True)
    monkeypatch.setattr(frontier, "run_frontier", lambda config: replace(study, folder=small))
    file = ROOT / "studies" / "frontier.yaml"
    said = dpo("experiment", "frontier", str(file), "quick=true", f"out={tmp_path / 'frontier'}")
    assert said.code == 0, said.all
    assert "could not be written" not in said.err
    assert (small / "index.html").is_file()
