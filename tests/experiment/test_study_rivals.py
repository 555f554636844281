"""DPO's rivals in a study: from the same SFT model, judged with it, and counted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from dpo.atomic import jsonable
from dpo.config import RewardSourceConfig
from dpo.config_files import validate
from dpo.core.best_of_n import best_of_n_kl_bound
from dpo.data.rows import PreferenceRow
from dpo.errors import InputError
from dpo.evaluate.best_of_n import best_of_each
from dpo.evaluate.records import Generation
from dpo.experiment.frontier_results import named_keys
from dpo.experiment.study import run_study, train_all
from dpo.experiment.study_config import StudyConfig, plan
from dpo.report.study import tables
from dpo.train.reward_source import RewardFunction, open_reward
from dpo.train.run import read_manifest, read_metrics
from experiment.tiny_study import TINY as BASE

N = 3
RIVALS = {
    "preferred_ft": {},
    "unlikelihood": {"optimizer.learning_rate": 1e-4},
    "ppo_rm": {
        "rounds": 2,
        "prompts_per_round": 4,
        "epochs_per_round": 1,
        "batch": {"size": 4},
        "sampling": {"max_new_tokens": 8},
        "optimizer": {"learning_rate": 1e-3},
    },
    "best_of_n": {"n": N},
}
TINY = {
    **BASE,
    "sft": {"max_steps": 3, "evaluation": {"num_samples": 0}},
    "dpo": {
        "max_steps": 2,
        "evaluation": {"num_samples": 0, "kl_prompts": 3, "max_new_tokens": 8},
        "optimizer": {"learning_rate": 1e-3},
    },
    "grid": {"loss.beta": [0.1]},
    "reward_model": {"max_steps": 2, "optimizer": {"learning_rate": 1e-2}},
    "rivals": RIVALS,
    "evaluation": {
        "temperatures": [0.5, 1.0],
        "max_new_tokens": 8,
        "max_prompts": 3,
        "sentence_model": "offline",
    },
}
LABELS = [
    "SFT",
    "DPO beta 0.1",
    "preferred-FT",
    "unlikelihood",
    "PPO, reward model",
    f"best-of-{N}, reward model",
]


def study_config(folder, **changes):
    return validate(StudyConfig, {**TINY, **changes, "out": str(folder)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivals") / "study"
    return run_study(study_config(folder)), folder


def resolved(folder, run):
    return json.loads((folder / "runs" / run / "config.json").read_text("utf-8"))["resolved"]


# -- what is run ---------------------------------------------------------------------------------


def test_without_rivals_a_study_is_what_it_was(tmp_path):
    without = {key: value for key, value in TINY.items() if key not in ("rivals", "reward_model")}
    todo = plan(validate(StudyConfig, {**without, "out": str(tmp_path)}))
    assert (todo.rivals, todo.reward_models, todo.best_of) == ((), (), None)
    assert [cell.name for cell in todo.policies] == [
        *("SFT seed 0", "SFT seed 1", "DPO beta 0.1 seed 0", "DPO beta 0.1 seed 1")
    ]


def test_every_rival_starts_from_its_seeds_sft_model_as_its_reference(finished):
    _, folder = finished
    starts = set()
    for seed in (0, 1):
        start = resolved(folder, f"dpo-beta-0.1-seed{seed}")["model_sha256"]
        starts.add(start)
        reward = json.loads((folder / f"runs/reward-seed{seed}/config.json").read_text("utf-8"))
        assert reward["model"]["path"] == str(folder / f"runs/sft-seed{seed}")  # with a new head
        for method in ("preferred_ft", "unlikelihood", "ppo_rm"):
            own = resolved(folder, f"{method}-seed{seed}")
            assert own["model_sha256"] == own["reference_sha256"] == start
    assert len(starts) == 2


def test_ppo_is_rewarded_by_the_reward_model_of_its_seed(finished):
    _, folder = finished
    used = []
    for seed in (0, 1):
        model = folder / "runs" / f"reward-seed{seed}"
        digest = open_reward(RewardSourceConfig(model=str(model))).digest
        used.append(resolved(folder, f"ppo_rm-seed{seed}")["reward_sha256"])
        assert used[-1] == digest
    assert used[0] != used[1]


def test_rivals_on_pairs_have_dpos_settings_and_their_own_on_top(tmp_path):
    rivals = {"preferred_ft": {}, "unlikelihood": {"epochs": 1.0, "optimizer.beta2": 0.9}}
    dpo = {**TINY["dpo"], "loss": {"label_smoothing": 0.1}}
    config = study_config(tmp_path, rivals=rivals, reward_model=None, dpo=dpo)
    cells = {cell.label: cell.config for cell in plan(config).rivals}
    imitation, unlikelihood = cells["preferred-FT"], cells["unlikelihood"]
    assert (imitation.loss.name, unlikelihood.loss.name) == ("nll", "unlikelihood")
    assert (imitation.max_steps, unlikelihood.max_steps, unlikelihood.epochs) == (2, None, 1.0)
    assert imitation.optimizer.learning_rate == unlikelihood.optimizer.learning_rate == 1e-3
    assert (imitation.optimizer.beta2, unlikelihood.optimizer.beta2) == (0.95, 0.9)


def test_the_kl_of_every_method_is_measured_on_the_same_number_of_prompts(tmp_path):
    cells = {cell.label: cell.config for cell in plan(study_config(tmp_path)).policies}
    assert cells["PPO, reward model"].evaluation.max_rows == 3
    assert cells["preferred-FT"].evaluation.kl_prompts == 3
    assert cells["unlikelihood"].evaluation.kl_prompts == 3
    assert {cell.evaluation.max_new_tokens for label, cell in cells.items() if label != "SFT"} == {
        8
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"reward_model": None},
            r"^reward_model: rivals\.ppo_rm needs one; give settings of dpo reward$",
        ),
        (
            {"reward_model": None, "rivals": {"best_of_n": {}}},
            r"^reward_model: rivals\.best_of_n needs one; give settings of dpo reward$",
        ),
        (
            {"rivals": {"preferred_ft": {}}},
            r"^reward_model: has no effect, no rival needs one$",
        ),
        ({"rivals": {"best_of_n": {"n": 1}}}, r"^rivals\.best_of_n\.n: .* greater than or equal"),
        ({"rivals": {"online": {}}}, r"^rivals\.online: unknown key"),
    ],
)
def test_what_cannot_be_is_refused_when_the_configuration_is_read(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        study_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("rival", "settings", "sentence"),
    [
        ("ppo_rm", {"reward": "x"}, r"rivals\.ppo_rm\.reward: the study sets this itself"),
        ("ppo_rm", {"reward": {"model": "x"}}, r"rivals\.ppo_rm\.reward\.model: the study sets"),
        ("preferred_ft", {"loss": {"name": "dpo"}}, r"rivals\.preferred_ft\.loss\.name: the study"),
        ("preferred_ft", {"loss.beta": 1}, r"rivals\.preferred_ft: loss\.beta: .*no effect"),
        ("unlikelihood", {"reference": "x"}, r"rivals\.unlikelihood\.reference: the study sets"),
        ("unlikelihood", {"seed": 1}, r"rivals\.unlikelihood\.seed: the study sets this itself"),
        ("ppo_rm", {"round": 1}, r"rivals\.ppo_rm: round: unknown key; did you mean rounds\?"),
        (
            "ppo_rm",
            {"sampling.max_new_tokens": 96},
            r"rivals\.ppo_rm\.sampling\.max_new_tokens: 96 leaves no room for a prompt",
        ),
    ],
)
def test_a_wrong_setting_of_a_rival_is_said_before_anything_runs(
    tmp_path, rival, settings, sentence
):
    config = study_config(tmp_path / "study", rivals={**RIVALS, rival: settings})
    with pytest.raises(InputError, match=sentence):
        plan(config)
    assert not (tmp_path / "study").exists()


def test_a_run_in_a_process_of_its_own_is_the_same_run(finished, tmp_path):
    _, folder = finished
    changes = {"seeds": [0], "rivals": {}, "reward_model": None, "processes": 1}
    config = study_config(tmp_path / "study", **changes)
    train_all(config, plan(config), trust_remote_code=False)
    for run in ("sft-seed0", "dpo-beta-0.1-seed0"):
        there, here = (root / "runs" / run for root in (folder, tmp_path / "study"))
        assert read_manifest(here)["status"] == "finished"
        losses = [[row["eval/loss"] for row in _held_out(one)] for one in (there, here)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def _held_out(folder):
    return [row for row in read_metrics(folder) if "eval/loss" in row]


# -- best of n -----------------------------------------------------------------------------------


def generation(index, sample, text, temperature=1.0):
    return Generation(
        model="m",
        temperature=temperature,
        prompt_index=index,
        sample=sample,
        prompt="p",
        chosen="c",
        rejected="r",
        generated=text,
        num_tokens=1,
        truncated=False,
    )


def test_of_every_n_responses_the_one_of_the_highest_reward_is_kept_the_first_of_equals():
    asked = []

    def score(prompts, texts):
        asked.extend(zip(prompts, texts, strict=True))
        return torch.tensor([float(len(text)) for text in texts], dtype=torch.float64)

    rows = [PreferenceRow("first", "c", "r"), PreferenceRow("second", "c", "r")]
    texts = [["a", "abc", "ab", "xyz"], ["abcd", "a", "a", "a"]]
    records = [generation(i, s, text) for i, own in enumerate(texts) for s, text in enumerate(own)]
    kept = best_of_each(records, rows, RewardFunction("length", "", score), n=2)
    found = [(one.prompt_index, one.sample, one.generated) for one in kept]
    assert found == [(0, 0, "abc"), (0, 1, "xyz"), (1, 0, "abcd"), (1, 1, "a")]
    four = best_of_each(records, rows, RewardFunction("length", "", score), n=4)
    assert [one.generated for one in four] == ["abc", "abcd"]
    assert asked.count(("second", "a")) == 2  # once for each call, though it comes three times


def test_the_line_of_best_of_n_has_the_sample_that_the_reward_model_scores_highest(finished):
    study, folder = finished
    kept = [one for one in study.evaluation.scored if one.model == LABELS[-1]]
    assert len(kept) == 3 * 2 * 2  # prompts, seeds, temperatures
    chosen_later = 0
    for seed in (0, 1):
        reward = open_reward(RewardSourceConfig(model=str(folder / f"runs/reward-seed{seed}")))
        for temperature in (0.5, 1.0):
            pattern = f"best of {N} seed {seed}-t{temperature:g}-*.jsonl"
            (file,) = (folder / "evaluation" / "generations").glob(pattern)
            drawn = [json.loads(line)["generated"] for line in file.read_text("utf-8").splitlines()]
            assert len(drawn) == 3 * N
            own = [o for o in kept if (o.sample, o.temperature) == (seed, temperature)]
            for one in own:
                texts = drawn[N * one.prompt_index : N * (one.prompt_index + 1)]
                scores = reward([one.prompt] * N, texts).tolist()
                assert one.generated in texts
                assert scores[texts.index(one.generated)] == pytest.approx(max(scores), abs=1e-6)
                chosen_later += texts.index(one.generated) > 0
    assert chosen_later > 0


def test_what_best_of_n_chooses_from_begins_with_the_sft_models_own_response(finished):
    _, folder = finished
    generations = folder / "evaluation" / "generations"
    (several,) = generations.glob(f"best of {N} seed 0-t1-*.jsonl")
    (single,) = generations.glob("SFT seed 0-t1-*.jsonl")
    assert several.read_text("utf-8").splitlines()[::N] == single.read_text("utf-8").splitlines()


# -- what is told --------------------------------------------------------------------------------


def as_rows(table):
    head, *lines = table
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def test_every_method_has_a_line_in_each_table_and_in_the_csv(finished):
    study, folder = finished
    found = tables(study)
    assert [*as_rows(found["methods"])] == [*as_rows(found["cost"])] == LABELS
    assert {row[0] for row in found["win rates"][1:]} > {*LABELS, "constant polite sentence"}
    assert {row[0] for row in found["against the strongest null"][1:]} == {*LABELS}
    others = {*LABELS} - {"DPO beta 0.1"}
    compared = {name for row in found["dpo against the others"][1:] for name in row[:2]}
    assert compared == {"DPO beta 0.1", *others}
    with (folder / "table.csv").open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["method"] for line in lines] == LABELS
    assert {"reward accuracy", "KL(policy ‖ SFT)", "settings", "models in memory"} <= {*lines[0]}
    assert json.loads((folder / "tables.json").read_text("utf-8")) == found


def test_kl_is_told_of_every_method_and_reward_accuracy_where_there_is_a_reward(finished):
    study, _ = finished
    methods = as_rows(tables(study)["methods"])
    assert methods["SFT"]["KL(policy ‖ SFT)"] == "0"
    for label in LABELS[1:-1]:
        low, high = methods[label]["KL(policy ‖ SFT)"].split("[")[1].rstrip("]").split(", ")
        assert float(low) <= float(high)
    assert methods[LABELS[-1]]["KL(policy ‖ SFT)"].startswith(
        f"at most {best_of_n_kl_bound(N):.3f}"
    )
    told = [label for label in LABELS if methods[label]["reward accuracy"]]
    assert told == ["DPO beta 0.1"]
    assert as_rows(tables(study)["reward model"])["2"]["accuracy"]


def test_costs_are_those_of_the_runs_and_of_the_reward_model_that_they_need(finished):
    study, folder = finished
    cost = as_rows(tables(study)["cost"])
    assert cost["DPO beta 0.1"]["models in memory"] == "2: policy, reference"
    assert cost["preferred-FT"]["models in memory"] == "1: policy"
    assert cost["PPO, reward model"]["models in memory"].startswith("4: policy, critic")
    assert cost["PPO, reward model"]["responses drawn"] == "8"  # 2 rounds of 4
    assert [cost[label]["responses drawn"] for label in LABELS[:4]] == ["0"] * 4
    assert [cost[label]["responses an answer"] for label in LABELS] == ["1"] * 5 + [str(N)]
    todo = plan(study_config(folder))
    own, model = (
        len(named_keys(cells[0].config)) for cells in (todo.rivals[4:], todo.reward_models)
    )
    assert cost["PPO, reward model"]["settings"] == str(own + model)
    assert cost[LABELS[-1]]["settings"] == str(model + 1)
    for run in study.of("PPO, reward model"):
        times = [
            read_manifest(folder / "runs" / f"{name}-seed{run.seed}")["seconds_training"]
            for name in ("ppo_rm", "reward")
        ]
        assert [run.cost.seconds, run.cost.reward_model_seconds] == times
    assert {line["peak memory (MB)"] for line in cost.values()} == {""}  # one process for all


def test_rivals_are_diagnosed_as_dpo_is(finished):
    _, folder = finished
    diagnosed = {file.parent.name for file in folder.glob("runs/*/diagnostics.json")}
    methods = ("dpo-beta-0.1", "preferred_ft", "unlikelihood", "ppo_rm")
    assert diagnosed == {f"{method}-seed{seed}" for method in methods for seed in (0, 1)}
    ppo, pairs = (
        json.loads((folder / "runs" / run / "diagnostics.json").read_text("utf-8"))["numbers"]
        for run in ("ppo_rm-seed0", "unlikelihood-seed0")
    )
    assert "on_policy" in ppo.keys() & pairs.keys()
    assert "displacement" in pairs.keys() - ppo.keys()  # of PPO there are no pairs


def test_study_json_has_all_numbers_and_none_of_the_texts(finished):
    study, folder = finished
    content = json.loads((folder / "study.json").read_text("utf-8"))
    assert [run["kl"] for run in content["runs"]] == [jsonable(run.kl) for run in study.results]
    assert content["best_of"]["kl_bound"] == best_of_n_kl_bound(N)
    assert len(content["reward_models"]) == 2
    assert len(content["evaluation"]["win_rates"]) == len(study.evaluation.table)
    assert len(content["evaluation"]["paired_tests"]) == len(study.evaluation.tests)
    assert content["evaluation"]["meta"]["num_prompts"] == 3
    told = [
        *(folder / name for name in ("study.json", "table.csv", "tables.json")),
        folder / "evaluation" / "win_rates.csv",
        *(folder / "figures").glob("*.csv"),
        *(folder / "figures").glob("*.svg"),
    ]
    assert len(told) >= 8
    texts = {
        text
        for one in study.evaluation.scored
        if one.kind == "model"
        for text in (one.prompt, one.chosen, one.rejected, one.generated)
        if len(text) > 10
    }
    for file in told:
        content = file.read_text("utf-8")
        assert not [text for text in texts if text in content], file


def test_a_finished_study_neither_trains_nor_samples_again(finished):
    study, folder = finished
    kept = [
        *(folder / "runs").glob("*/model/model.safetensors"),
        *(folder / "evaluation" / "generations").glob("*.jsonl"),
    ]
    assert len(kept) == 2 * 6 + 2 * 2 * 6
    before = [Path(file).stat().st_mtime_ns for file in kept]
    again = run_study(study_config(folder))
    assert [Path(file).stat().st_mtime_ns for file in kept] == before
    assert again.evaluation.table == study.evaluation.table
    assert tables(again) == tables(study)
