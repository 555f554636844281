"""The study of all losses: one judge, one start, one budget, and a table that can be recomputed."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.config_files import read_config, validate
from dpo.core.stats import holm
from dpo.data.sources import as_pairs, load_rows
from dpo.data.split import split_by_prompt
from dpo.data.synthetic import World
from dpo.errors import InputError
from dpo.experiment import losses
from dpo.experiment.embedded import MAX_NEW_TOKENS, TEST_FRACTION, open_model
from dpo.experiment.loss_results import compared_with_dpo
from dpo.experiment.losses import RESPONSES, LossStudyConfig, plan, run_losses
from dpo.experiment.ratings import label_accuracy, rated_rows
from dpo.loss_config import LOSS_CONFIGS, takes_reference
from dpo.models.generate import generate
from dpo.report.loss_study import LossRow, LossStudy, loss_figure, page

ROOT = Path(__file__).parents[2]
TINY = {
    "seeds": [0],
    "names": ["plackett_luce", "dpo"],
    "steps": 3,
    "responses_per_step": 16,
    "learning_rate": 1e-3,
    "sft_steps": 30,
    "num_facts": 8,
    "rankings_per_question": 2,
    "samples_per_question": 2,
}
WORLD = World(8)


def study_config(folder, **changes):
    return validate(LossStudyConfig, {**TINY, **changes, "out": str(folder)})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study, its folder, and the two files that a later study there would overwrite."""
    folder = tmp_path_factory.mktemp("losses") / "study"
    study = run_losses(study_config(folder))
    texts = {name: (folder / name).read_text("utf-8") for name in ("table.csv", "README.md")}
    return study, folder, texts


# -- the judge -----------------------------------------------------------------------------------


def test_labels_follow_bradley_terry_and_rankings_plackett_luce():
    prompt = "What is the capital of Peru?"
    answers = [  # true rewards 3, 2, 1, -2
        "Happy to help! The capital of Peru is Lima.",
        "The capital of Peru is Lima.",
        "Obviously. The capital of Peru is Lima.",
        "Ugh. The capital of Peru is Rome.",
    ]
    rewards = np.array([World().reward(prompt, answer) for answer in answers])
    assert rewards.tolist() == [3, 2, 1, -2]
    n = 4000
    rows = rated_rows(World(), [prompt] * n, [answers] * n, seed=0)
    best = Counter(row.responses[0] for row in rows.rankings)
    softmax = np.exp(rewards) / np.exp(rewards).sum()
    assert [best[a] / n for a in answers] == pytest.approx(softmax, abs=0.03)
    second = Counter(row.responses[1] for row in rows.rankings if row.responses[0] == answers[0])
    others = np.exp(rewards[1:]) / np.exp(rewards[1:]).sum()
    expected = [second[a] / best[answers[0]] for a in answers[1:]]
    assert expected == pytest.approx(others, abs=0.03)
    right_label = np.mean([pair.chosen == answers[0] for pair in rows.pairs[::2]])
    assert right_label == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.03)
    ceiling = (1 / (1 + np.exp(-1.0)) + 1 / (1 + np.exp(-3.0))) / 2
    assert label_accuracy(World(), rows.pairs) == pytest.approx(ceiling, abs=0.02)


def test_pairs_and_scores_say_what_the_ranking_of_the_same_answers_says():
    prompts = WORLD.prompts[:20]
    answers = [[f"answer {i} {k}" for k in range(8)] for i in range(20)]
    rows = rated_rows(WORLD, prompts, answers, seed=1)
    assert (len(rows.rankings), len(rows.pairs)) == (40, 80)
    for number, ranking in enumerate(rows.rankings):
        assert all(a > b for a, b in pairwise(ranking.scores))
        for pair in rows.pairs[2 * number : 2 * number + 2]:
            better, worse = map(ranking.responses.index, (pair.chosen, pair.rejected))
            assert better < worse
            assert pair.scores == (ranking.scores[better], ranking.scores[worse])
    of_first_question = sorted(score for row in rows.rankings[:2] for score in row.scores)
    assert of_first_question == pytest.approx([k / 7 for k in range(8)])


def test_equal_answers_make_no_pair_and_no_ranking_of_their_own():
    texts = ["a", "a", "a", "b", "c", "c", "c", "c"]
    rows = rated_rows(WORLD, WORLD.prompts[:1], [texts], seed=0)
    assert [sorted(row.responses) for row in rows.rankings] == [["a", "a", "a", "b"]]
    assert [{pair.chosen, pair.rejected} for pair in rows.pairs] == [{"a", "b"}]


# -- the plan ------------------------------------------------------------------------------------


def test_the_study_runs_every_loss_with_its_papers_options_and_one_budget():
    config = read_config(LossStudyConfig, ROOT / "studies" / "losses.yaml")
    runs = plan(config)
    assert [run.name for run in runs] == 3 * list(LOSS_CONFIGS)
    for run in runs:
        assert run.config.loss == LOSS_CONFIGS[run.name]()
        assert run.config.batch.size * RESPONSES[run.kind] == 128
        assert run.config.max_steps == 100
        assert run.config.optimizer.learning_rate == 2e-4
        assert run.config.reference is None  # the model it starts from, where it takes one
        assert Path(run.config.model.path) == Path(f"runs/losses/seed-{run.seed}/sft")


def test_the_file_shows_every_key_and_its_default():
    config = read_config(LossStudyConfig, ROOT / "studies" / "losses.yaml")
    assert config.model_fields_set == LossStudyConfig.model_fields.keys()
    assert config == LossStudyConfig(out="runs/losses")


@pytest.mark.parametrize("own", [{"loss.beta": 0.5}, {"loss": {"beta": 0.5}}])
def test_a_loss_can_be_given_settings_of_its_own(tmp_path, own):
    own = {**own, "optimizer.learning_rate": 1e-5}
    runs = plan(study_config(tmp_path, names=["dpo", "ipo"], losses={"ipo": own}))
    found = {run.name: (run.config.loss.beta, run.config.optimizer.learning_rate) for run in runs}
    assert found == {"dpo": (0.1, 1e-3), "ipo": (0.5, 1e-5)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"names": ["dpo", "ipoo"]}, r"names: there is no such loss \(got 'ipoo'\); did you mean"),
        ({"names": ["dpo", "dpo"]}, "names: expected different ones"),
        ({"seeds": [1, 1]}, "seeds: expected different ones"),
        ({"losses": {"ipoo": {}}}, "losses: there is no such loss"),
        ({"losses": {"kto": {"loss.beta": 1}}}, "losses.kto: has no effect, for names"),
        ({"losses": {"dpo": {"seed": 1}}}, "losses.dpo.seed: the study sets this itself"),
        ({"losses": {"dpo": {"loss": {"name": "ipo"}}}}, "losses.dpo.loss.name: the study sets"),
        ({"losses": {"dpo": {"data.path": "x"}}}, "losses.dpo.data.path: the study sets this"),
        ({"losses": {"dpo": {"loss.gamma": 1}}}, "losses.dpo: loss.gamma: has no effect with"),
        ({"responses_per_step": 30}, "responses_per_step: input should be a multiple of 4"),
        ({"names": []}, "names: list should have at least 1 item"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_anything_runs(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence) as raised:
        run_losses(study_config(tmp_path / "study", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "study").exists()


# -- the study -----------------------------------------------------------------------------------


def test_all_losses_of_a_seed_start_from_its_sft_model(finished):
    _, folder, _ = finished
    for name in TINY["names"]:
        run = folder / "seed-0" / "losses" / name
        resolved = json.loads((run / "config.json").read_text("utf-8"))["resolved"]
        assert resolved["model_sha256"] == resolved["reference_sha256"]
    assert takes_reference(LOSS_CONFIGS["dpo"]())
    answers = json.loads((folder / "seed-0" / "answers" / "config.json").read_text("utf-8"))
    assert answers["model_sha256"] == resolved["model_sha256"]


def test_the_table_has_sft_and_nulls_on_top_then_the_losses_by_kind(finished):
    _, _, texts = finished
    rows = list(csv.DictReader(texts["table.csv"].splitlines()))
    assert [row["kind"] for row in rows] == ["start", *["null"] * 6, "pair", "list"]
    assert [row["model"] for row in rows if row["kind"] != "null"] == [
        "SFT",
        "dpo",
        "plackett_luce",
    ]
    promised = {"reward", "reward_low", "reward_high", "right", "polite", "kl", "kl_stderr"}
    promised |= {"win_rate", "accuracy", "chosen_change", "seconds", "p_holm", "said"}
    assert promised <= rows[0].keys()
    for row in rows[-2:]:
        assert all(row[name] for name in promised - {"p_holm", "said"})
        assert float(row["reward_low"]) <= float(row["reward"]) <= float(row["reward_high"])
        assert float(row["seconds"]) > 0
    assert (float(rows[0]["kl"]), float(rows[0]["chosen_change"])) == (0, 0)
    assert [bool(row["p_holm"]) for row in rows] == [False] * 8 + [True]


def test_the_page_says_what_it_proves_and_shows_the_figure(finished):
    _, folder, texts = finished
    assert "It does not show which loss is best" in texts["README.md"]
    assert "read no win rate without it" in texts["README.md"]
    assert "![True reward against KL](figures/reward_kl.svg)" in texts["README.md"]
    for suffix in ("svg", "png", "csv"):
        assert (folder / "figures" / f"reward_kl.{suffix}").stat().st_size > 100
    told = json.loads((folder / "study.json").read_text("utf-8"))
    assert {"config", "environment"} <= told.keys()


def held_out_pairs(folder):
    rows = as_pairs(load_rows(folder / "seed-0" / "answers" / "pairs.jsonl").rows)
    return split_by_prompt(rows, test_fraction=TEST_FRACTION, seed=0).test


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


@torch.no_grad()
def token_logps(model, ids):
    """Next-token log-probabilities along one sequence, by transformers alone, (T - 1, V)."""
    return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def response_logp(model, encoder, prompt, response):
    (sequence,) = encoder.encode(prompt, [response]).sequences
    logps = token_logps(model, sequence.ids)
    start = sequence.prompt_length
    return sum(logps[t - 1, sequence.ids[t]].item() for t in range(start, len(sequence.ids)))


@pytest.mark.parametrize("name", TINY["names"])
def test_accuracy_and_change_are_those_of_the_models_in_the_run_directories(finished, name):
    study, folder, _ = finished
    run, sft = folder / "seed-0" / "losses" / name, folder / "seed-0" / "sft"
    encoder, _ = open_model(run)
    policy, reference = plain_model(run), plain_model(sft)
    gains = np.array(
        [
            [
                response_logp(policy, encoder, pair.prompt, text)
                - response_logp(reference, encoder, pair.prompt, text)
                for text in (pair.chosen, pair.rejected)
            ]
            for pair in held_out_pairs(folder)
        ]
    )
    (row,) = [row for row in study.rows if row.model == name]
    assert row.chosen_change == pytest.approx(gains[:, 0].mean(), abs=1e-3)
    assert row.accuracy == pytest.approx((gains[:, 0] > gains[:, 1]).mean(), abs=1e-9)


def test_kl_is_that_of_the_models_in_the_run_directories(finished):
    study, folder, _ = finished
    run, sft = folder / "seed-0" / "losses" / "dpo", folder / "seed-0" / "sft"
    encoder, own = open_model(run)
    policy, reference = plain_model(run), plain_model(sft)
    questions = list(dict.fromkeys(pair.prompt for pair in held_out_pairs(folder)))
    prompts = [encoder.prompt_ids(question) for question in questions]
    samples = generate(
        own,
        [ids for ids in prompts for _ in range(2)],
        keys=[f"kl/{i}/{s}" for i in range(len(prompts)) for s in range(2)],
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        stop_ids=encoder.stop_ids,
        seed=0,
    )
    sums = []
    for number, sample in enumerate(samples):
        prompt = prompts[number // 2]
        ids = [*prompt, *sample.ids, *([] if sample.truncated else encoder.stop_ids[:1])]
        p, q = (token_logps(model, ids)[len(prompt) - 1 :] for model in (policy, reference))
        sums.append((p.exp() * (p - q)).sum().item())
    of_question = np.array(sums).reshape(-1, 2).mean(axis=1)
    (row,) = [row for row in study.rows if row.model == "dpo"]
    assert row.kl == pytest.approx(of_question.mean(), rel=1e-3)
    expected = of_question.std(ddof=1) / len(of_question) ** 0.5
    assert row.kl_stderr == pytest.approx(expected, rel=1e-3)


def test_rewards_are_those_of_the_answers_that_were_written_down(finished):
    study, folder, _ = finished
    questions = list(dict.fromkeys(pair.prompt for pair in held_out_pairs(folder)))
    assert study.num_questions == len(questions)
    means = {}
    for row in (row for row in study.rows if row.kind in ("start", "pair", "list")):
        (file,) = (folder / "evaluation" / "generations").glob(f"{row.model} seed 0-*.jsonl")
        texts = [json.loads(line)["generated"] for line in file.read_text("utf-8").splitlines()]
        prompts = [question for question in questions for _ in range(2)]
        rewards = [WORLD.reward(p, text) for p, text in zip(prompts, texts, strict=True)]
        parts = [WORLD.parts(p, text) for p, text in zip(prompts, texts, strict=True)]
        assert row.reward == pytest.approx(np.mean(rewards))
        assert row.right == pytest.approx(np.mean([part.right for part in parts]))
        assert row.polite == pytest.approx(np.mean([part.polite for part in parts]))
        means[row.model] = np.array(rewards).reshape(-1, 2).mean(axis=1)
    (row,) = [row for row in study.rows if row.model == "plackett_luce"]
    assert row.difference == pytest.approx((means["plackett_luce"] - means["dpo"]).mean())


def test_a_finished_study_runs_nothing_again(finished, monkeypatch):
    study, folder, _ = finished

    def files():
        kept = [*folder.glob("seed-0/**/*"), *folder.glob("evaluation/**/*")]
        return {f: f.stat().st_mtime_ns for f in kept if f.is_file() and f.name != ".lock"}

    def refused(*args, **kwargs):
        raise AssertionError("sampled or trained again")

    before = files()
    monkeypatch.setattr("dpo.train.jobs.fit", refused)
    for place in ("dpo.experiment.embedded", "dpo.evaluate.generations", "dpo.models.divergence"):
        monkeypatch.setattr(f"{place}.generate", refused)
    again = run_losses(study_config(folder))
    assert again.rows == study.rows
    assert files() == before


def test_answers_sampled_with_other_settings_are_not_taken_for_these(finished):
    _, folder, _ = finished
    with pytest.raises(InputError, match="rankings_per_question: 2 there, 3 now"):
        run_losses(study_config(folder, rankings_per_question=3))


def test_a_run_that_diverges_is_a_row_with_its_sentence_and_is_not_repeated(finished, monkeypatch):
    _, folder, _ = finished
    broken = {"ipo": {"optimizer.learning_rate": 1e30, "optimizer.warmup": 0}}
    config = study_config(folder, names=["ipo", "dpo"], losses=broken)
    study = run_losses(config)
    (row,) = [row for row in study.rows if row.model == "ipo"]
    assert (row.seeds, row.failed, row.reward, row.p) == (0, 1, None, None)
    assert "seed 0: Step 2: the loss is nan" in row.said
    text = (folder / "README.md").read_text("utf-8")
    assert "ipo (1 of 1 diverged)" in text
    assert row.said in text
    assert "`ipo`: `optimizer.learning_rate=1e+30`" in text
    trained = []
    monkeypatch.setattr(losses, "train_preference", lambda config: trained.append(config.loss.name))
    assert run_losses(config).rows == study.rows
    assert trained == ["dpo"]  # asked, and found finished
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"learning_rate: 1e\+30 there, 0\.001 now"):
        run_losses(study_config(folder, names=["ipo"]))


# -- the test against DPO, the figure ------------------------------------------------------------


def test_holm_is_over_all_losses_and_only_shared_seeds_are_compared():
    draw = np.random.default_rng(0)
    questions = range(30)
    base = {seed: draw.normal(size=30) for seed in (0, 1)}
    shifts = {("better", 0): 0.5, ("better", 1): 0.7, ("same", 1): 0.0}
    of_seed = {("dpo", seed): dict(zip(questions, base[seed], strict=True)) for seed in base}
    for (label, seed), shift in shifts.items():
        values = base[seed] + shift + 0.3 * draw.normal(size=30)
        of_seed[label, seed] = dict(zip(questions, values, strict=True))
    rows = [LossRow(name, "pair", 1, 0) for name in ("better", "dpo", "gone", "same")]
    better, dpo, gone, same = compared_with_dpo(rows, of_seed)
    assert better.difference == pytest.approx(0.6, abs=0.1)
    assert better.difference_low < better.difference < better.difference_high
    assert better.seeds_above_dpo == 2
    assert (dpo.p, gone.p) == (None, None)
    by_hand = [of_seed["same", 1][q] - of_seed["dpo", 1][q] for q in questions]
    assert same.difference == pytest.approx(np.mean(by_hand))
    assert [better.p_holm, same.p_holm] == holm([better.p, same.p])
    assert better.p_holm < 0.001 < same.p_holm


def test_every_loss_with_a_finished_run_is_a_named_point_and_the_others_are_not(tmp_path):
    measured = {"reward_low": 0.5, "reward_high": 1.5, "kl_stderr": 0.1}
    rows = [LossRow("SFT", "start", 1, 0, reward=0.9, kl=0.0)]
    drawn = ["dpo", "ipo", "nll", "cpo", "plackett_luce", "all_pairs", "kto"]
    rows += [
        LossRow(name, LOSS_CONFIGS[name].kind, 1, 0, reward=1 + i / 20, kl=i / 10, **measured)
        for i, name in enumerate(drawn)
    ]
    rows.append(LossRow("slic", "pair", 0, 3, said="seed 0: it diverged."))
    loss_figure(rows, tmp_path / "figure")
    drawing = (tmp_path / "figure.svg").read_text("utf-8")
    assert [name for name in (*drawn, "slic") if f"<!-- {name} -->" in drawing] == drawn
    lines = (tmp_path / "figure.csv").read_text("utf-8").splitlines()
    assert len(lines) == 1 + len(rows)  # the numbers of all are beside it


def test_a_study_in_which_everything_diverged_still_has_its_page(tmp_path):
    config = LossStudyConfig(out=str(tmp_path)).model_dump(mode="json")
    rows = [
        LossRow("SFT", "start", 3, 0, reward=0.9, reward_low=0.8, reward_high=1.0, kl=0.0),
        LossRow("ipo", "pair", 0, 3, said="seed 0: it diverged."),
    ]
    rows[0] = replace(rows[0], kl_stderr=0.0, reward_lowest_seed=0.8, reward_highest_seed=1.1)
    text = page(LossStudy(tmp_path, rows, 0.7, 77, config))
    assert "| ipo (3 of 3 diverged) | pair |" in text
    assert "- `ipo`, seed 0: it diverged." in text
    assert loss_figure(rows, tmp_path / "figure")
