"""The sentiment study: parts that share nothing, a reward that is the classifier's log-odds, pairs
in its order, and a small whole study on made-up reviews.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from dpo.config import RewardSourceConfig
from dpo.config_files import read_config, validate
from dpo.core.frontier import Point
from dpo.data.reviews import (
    Review,
    as_demonstrations,
    labelled_passages,
    load_reviews,
    passages,
    split_reviews,
)
from dpo.data.sources import load_rows
from dpo.data.split import near_key
from dpo.errors import InputError
from dpo.experiment.methods import METHOD_KINDS
from dpo.experiment.sentiment import accuracy, pairs_of, run_sentiment
from dpo.experiment.sentiment_config import (
    SentimentConfig,
    plan,
    quick_form,
    reward_source,
    sft_config,
)
from dpo.models.text_classifier import (
    CLASSIFIER_FILE,
    TextClassifier,
    fit_classifier,
    load_classifier,
    save_classifier,
)
from dpo.report.sentiment_page import page
from dpo.train.reward_source import RewardFunction, open_reward
from dpo.train.run import read_manifest, read_metrics

STUDIES = Path(__file__).parents[2] / "studies"
GOOD, BAD = ("lovely", "moving", "bright", "funny"), ("dull", "noisy", "clumsy", "empty")
PLAIN = (
    "the",
    "film",
    "scene",
    "plot",
    "cast",
    "music",
    "story",
    "camera",
    "hero",
    "end",
    "a",
    "is",
)


def made_up_reviews(count, seed=0):
    """Rows of text and label: sentences of plain words, some of them of the label's kind."""
    draws = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        positive = number % 2 == 0
        words = [*PLAIN, *(GOOD if positive else BAD), (BAD if positive else GOOD)[0]]
        sentences = [
            f"{' '.join(draws.choice(words, size=int(draws.integers(6, 13))))} ." for _ in range(6)
        ]
        rows.append({"text": " ".join(sentences), "label": "pos" if positive else "neg"})
    return rows


def as_reviews(rows):
    return [Review(row["text"], row["label"] == "pos") for row in rows]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """200 made-up reviews."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made_up_reviews(200)), "utf-8")
    return path


@pytest.fixture(scope="module")
def classifier():
    """Fitted on passages of made-up reviews."""
    found = labelled_passages(
        as_reviews(made_up_reviews(100)), min_words=9, max_words=30, most=None
    )
    return fit_classifier(*zip(*found, strict=True))


# -- reviews -------------------------------------------------------------------------------------


def test_every_review_is_in_one_part_that_depends_on_its_text_alone():
    reviews = as_reviews(made_up_reviews(400))
    parts = split_reviews(reviews, classifier_share=0.4, held_out_share=0.2)
    every = [*parts.classifier, *parts.model, *parts.held_out]
    assert Counter(every) == Counter(reviews)
    assert len(parts.classifier) == pytest.approx(160, abs=35)
    assert len(parts.held_out) == pytest.approx(80, abs=30)
    fewer = split_reviews(reviews[::3], classifier_share=0.4, held_out_share=0.2)
    assert {*fewer.model} == {*parts.model} & {*reviews[::3]}
    copies = [Review(review.text.upper(), review.positive) for review in parts.held_out]
    again = split_reviews([*reviews, *copies], classifier_share=0.4, held_out_share=0.2)
    assert again.held_out == [*parts.held_out, *copies]


def test_passages_are_whole_sentences_in_a_row_and_prompts_are_their_beginnings():
    (review,) = as_reviews(made_up_reviews(1))
    found = passages(review.text, min_words=9, max_words=20)
    sentences = {part.strip() for part in review.text.split(" .")}
    assert len(found) > 1
    for text in found:
        assert text in review.text
        assert all(part.strip() in sentences for part in text.split(" ."))
        assert 9 <= len(text.split()) <= 20
    rows = as_demonstrations(found * 30, prefix_words=(2, 8), seed=0)
    assert {len(row.prompt.split()) for row in rows} == {*range(2, 9)}
    for row, text in zip(rows, found * 30, strict=True):
        assert row.prompt + row.response == text
        assert row.response.startswith(" ")


def test_a_sentence_that_does_not_fit_is_left_out_and_line_breaks_are_spaces(tmp_path):
    assert passages("a b c d e f. g h.", min_words=1, max_words=4) == ["g h."]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "So<br /><br />good  .", "label": 1}\n{"text": "x", "label": 0}\n')
    reviews, _ = load_reviews(path, positive="1")
    assert [(review.text, review.positive) for review in reviews] == [
        ("So good .", True),
        ("x", False),
    ]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "x"}', r"rows.jsonl:3: 'label' is missing; every review needs text and label"),
        ('{"text": 3, "label": "pos"}', "rows.jsonl:3: 'text' is int, expected text"),
        ('{"text": "x", "label": "so-so"}', "data.positive: expected 'pos' and one other label"),
    ],
)
def test_a_row_that_is_no_review_is_named(tmp_path, line, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "pos"}\n{"text": "b", "label": "neg"}\n' + line + "\n")
    with pytest.raises(InputError, match=sentence):
        load_reviews(path)


# -- the reward ----------------------------------------------------------------------------------


def test_log_odds_follow_the_formula():
    found = TextClassifier(terms=("bad", "good"), idf=(2.0, 1.5), weights=(-1.0, 3.0), bias=0.25)
    bad, good = 2.0, (1 + math.log(2)) * 1.5
    expected = (-1.0 * bad + 3.0 * good) / math.hypot(bad, good) + 0.25
    assert found.log_odds(["Good, bad; other words: good", "nothing"]).tolist() == pytest.approx(
        [expected, 0.25]
    )


def test_the_reward_is_the_log_odds_of_the_fitted_model(classifier, tmp_path):
    texts, labels = zip(
        *labelled_passages(as_reviews(made_up_reviews(100)), min_words=9, max_words=30, most=None),
        strict=True,
    )
    other = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=3), LogisticRegression())
    expected = other.fit(texts, labels).predict_log_proba(texts[:5]) @ [-1, 1]
    save_classifier(classifier, tmp_path)
    reward = open_reward(validate(RewardSourceConfig, {"model": str(tmp_path)}))
    cut = [text.index(" ", 10) for text in texts[:5]]
    found = reward(
        [text[:i] for text, i in zip(texts, cut, strict=False)],
        [text[i:] for text, i in zip(texts, cut, strict=False)],
    )
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert load_classifier(tmp_path) == classifier
    assert reward.digest == classifier.digest


def test_it_tells_held_out_labels_better_than_chance(classifier):
    reward = RewardFunction(
        "fitted", "", lambda p, r: classifier.log_odds(list(map("".join, zip(p, r, strict=True))))
    )
    fresh = [(r.text, r.positive) for r in as_reviews(made_up_reviews(100, seed=1))]
    told = accuracy(reward, fresh)
    assert told.total == 100
    assert told.right > 90
    assert accuracy(reward, [(text, not label) for text, label in fresh]).right == 100 - told.right


def test_another_classifier_is_another_reward_and_a_damaged_one_is_named(classifier, tmp_path):
    save_classifier(classifier, tmp_path)
    text = (tmp_path / CLASSIFIER_FILE).read_text("utf-8")
    assert fit_classifier(["a cat", "a dog"] * 9, [True, False] * 9).digest != classifier.digest
    with pytest.raises(InputError, match=r"reward\.label: .* of positive and negative"):
        open_reward(validate(RewardSourceConfig, {"model": str(tmp_path), "label": "joy"}))
    (tmp_path / CLASSIFIER_FILE).write_text(text[: len(text) // 2], "utf-8")
    with pytest.raises(InputError, match="expected a text classifier; it is damaged"):
        load_classifier(tmp_path)


def test_labels_of_one_kind_are_refused():
    with pytest.raises(InputError, match="needs texts of both labels"):
        fit_classifier(["a cat"] * 5, [True] * 5)


# -- pairs ---------------------------------------------------------------------------------------


def pairs(responses, rewards, labels="hard", seed=0):
    return pairs_of("p", responses, rewards, labels=labels, draws=np.random.default_rng(seed))


def test_four_samples_make_six_pairs_in_the_order_of_the_reward():
    rewards = dict(zip("abcd", (0.5, -1.0, 2.0, 0.1), strict=True))
    rows = pairs("abcd", [*rewards.values()])
    assert len(rows) == 6
    for row in rows:
        assert rewards[row.chosen] > rewards[row.rejected]
        assert row.scores == (rewards[row.chosen], rewards[row.rejected])


def test_equal_responses_and_equal_rewards_make_no_pair():
    assert len(pairs("aabc", [1.0, 1.0, 1.0, 2.0])) == 3  # c with a, a and b
    assert len(pairs("aabc", [1.0, 1.0, 1.0, 2.0], "bradley_terry")) == 5  # but a with a


def test_bradley_terry_labels_have_the_probability_of_the_rewards():
    drawn = [pairs("ab", [1.0, 0.0], "bradley_terry", seed)[0].chosen for seed in range(2000)]
    assert drawn.count("a") / 2000 == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


# -- the plan ------------------------------------------------------------------------------------

FRESH = {"fresh": {"width": 16, "layers": 1, "heads": 2, "positions": 64, "vocab_size": 280}}
ON_SAMPLES = {"rounds": 2, "prompts_per_round": 4, "batch.size": 4, "epochs_per_round": 1}
TINY = {
    "model": FRESH,
    "data": {"passage_words": 20},
    "max_length": 64,
    "max_new_tokens": 12,
    "sft": {"max_steps": 30, "optimizer": {"learning_rate": 1e-2}},
    "pairs": {"prefixes": 8},
    "budget": {"steps": 2, "pairs_per_step": 4, "learning_rate": 1e-3},
    "strengths": {"dpo": [0.1, 1.0], "ppo_true": [0.1]},
    "settings": {"ppo_true": ON_SAMPLES},
    "measure": {
        "prefixes": 5,
        "samples": 2,
        "evaluations": 2,
        "reference_samples": 32,
        "best_of": [1, 4],
    },
}


def tiny(folder, file, **changes):
    values = {**TINY, **changes, "out": str(folder)}
    values["data"] = {"path": str(file), **values["data"]}
    return validate(SentimentConfig, values)


def test_the_files_plan_their_runs_from_one_sft_model_a_seed():
    for name in ("sentiment.yaml", "sentiment-small.yaml"):
        config = read_config(SentimentConfig, STUDIES / name)
        runs = plan(config)
        assert len(runs) == len(config.seeds) * sum(map(len, config.strengths.values()))
        assert {Path(run.config.model.path).name for run in runs} == {"sft"}
        assert {run.config.evaluation.reward.model for run in runs} == {
            reward_source(config)["model"]
        }
        for run in runs:
            if run.method == "ppo_true":
                assert run.config.reward == run.config.evaluation.reward
            if run.method == "ppo_rm":
                assert Path(run.config.reward.model).name == "reward"
        assert {run.method for run in plan(quick_form(config))} == {*config.strengths}


def test_the_papers_form_starts_from_gpt2_large_and_asks_the_papers_classifier():
    config = read_config(SentimentConfig, STUDIES / "sentiment.yaml")
    assert sft_config(config, 0).model.path == "gpt2-large"
    assert reward_source(config) == {
        "model": "siebert/sentiment-roberta-large-english",
        "label": "POSITIVE",
    }
    assert {run.config.precision for run in plan(config)} == {"bf16"}
    assert read_config(SentimentConfig, STUDIES / "sentiment-small.yaml").model.fresh is not None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"strengths": {"dpoo": [0.1]}}, "strengths.dpoo: expected one of dpo, ipo"),
        ({"strengths": {"dpo": [1, 1]}}, "strengths.dpo: expected different ones"),
        ({"seeds": [1, 1]}, "seeds: expected different ones"),
        ({"settings": {"dpo": {"loss.beta": 1}}}, "settings.dpo.loss.beta: the study sets this"),
        ({"settings": {"dpo": {"loss": {"bet": 1}}}}, "settings.dpo: loss.bet: unknown key"),
        ({"sft": {"data": {"max_length": 3}}}, "sft.data.max_length: the study sets this itself"),
        ({"sft": {"epoch": 1}}, "sft: epoch: unknown key; did you mean epochs"),
        ({"every_run": {"seed": 1}}, "every_run.seed: the study sets this itself"),
        ({"reward": {"model": "x", "share": 0.4}}, "reward: share has no effect with a model"),
        ({"reward": {"label": "x"}}, "reward: label has no effect without a model"),
        ({"reward": {"share": 0.9}}, "leave no reviews for the model"),
        ({"data": {"passage_words": 8}}, "prefix_words: expected fewest <= most < passage_words"),
        ({"data": {"prefix_words": [3, 2]}}, "prefix_words: expected fewest <= most"),
        ({"data": {"passage_words": 20, "positive": "good"}}, "data.positive: expected 'good'"),
        ({"measure": {"best_of": [512]}}, "measure.best_of: 512 is more than the measure.ref"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_anything_runs(tmp_path, file, changes, sentence):
    with pytest.raises(InputError, match=sentence) as raised:
        run_sentiment(tiny(tmp_path / "study", file, **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "study").exists()


# -- a whole study -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, file):
    """A small study and its folder."""
    folder = tmp_path_factory.mktemp("sentiment") / "study"
    return run_sentiment(tiny(folder, file)), folder


def test_the_reward_in_the_study_is_the_fitted_classifier_on_the_pairs(finished):
    _, folder = finished
    classifier = load_classifier(folder / "classifier")
    rows = load_rows(folder / "seed-0" / "pairs" / "pairs.jsonl").rows
    assert 5 <= len({row.prompt for row in rows}) <= 8  # all four samples of some are alike
    for row in rows:
        scores = classifier.log_odds([row.prompt + row.chosen, row.prompt + row.rejected])
        assert row.scores == pytest.approx(scores.tolist())
        assert row.scores[0] > row.scores[1]
    facts = json.loads((folder / "data" / "facts.json").read_text("utf-8"))
    assert facts["of_passages"]["right"] > 0.7 * facts["of_passages"]["total"]


def test_held_out_prefixes_come_from_held_out_reviews_and_were_never_trained_on(finished, file):
    _, folder = finished
    reviews, _ = load_reviews(file)
    parts = split_reviews(reviews, classifier_share=0.4, held_out_share=0.15)
    trained_on = {near_key(row.prompt) for row in load_rows(folder / "data/passages.jsonl").rows}
    held_out = load_rows(folder / "seed-0/pairs/held-out.jsonl").rows
    for prompt in {row.prompt for row in held_out}:
        assert near_key(prompt) not in trained_on
        assert any(prompt in review.text for review in parts.held_out)
    model_texts = [review.text for review in parts.model]
    for row in load_rows(folder / "data/passages.jsonl").rows:
        assert any(row.prompt + row.response in text for text in model_texts)


def test_the_table_has_the_numbers_of_the_runs(finished):
    study, folder = finished
    rows = list(csv.DictReader((folder / "table.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 3
    starts = set()
    for row in rows:
        key = next(key for key, kind in METHOD_KINDS.items() if kind.title == row["method"])
        run = folder / "seed-0" / "runs" / f"{key}-{float(row['strength']):g}"
        measured = [m for m in read_metrics(run) if "eval/reward" in m]
        assert float(row["reward"]) == measured[-1]["eval/reward"]
        assert float(row["kl"]) == measured[-1]["eval/kl"] > 0
        assert float(row["seconds"]) == read_manifest(run)["seconds_training"]
        assert float(row["reward_model_seconds"]) == 0
        starts.add((measured[0]["eval/kl"], measured[0]["eval/reward"]))
    assert len(starts) == 1  # all methods are measured on the same samples of the same SFT model
    tables = load_file(folder / "seed-0" / "samples" / "samples.safetensors")
    assert tables["rewards"].shape == (5, 32)
    assert study.seeds[0].curve[0] == Point(0, pytest.approx(tables["rewards"].mean().item()))


def test_the_page_says_what_the_model_is_and_shows_no_text_of_anybody(finished):
    study, folder = finished
    text = (folder / "README.md").read_text("utf-8")
    assert "from random weights" in text
    assert "One seed" in text
    files = [*folder.glob("seed-0/pairs/*.jsonl")]
    shown = [r for f in files for row in load_rows(f).rows for r in (row.chosen, row.rejected)]
    human = [row.response for row in load_rows(folder / "data" / "passages.jsonl").rows]
    assert not [part for part in (*shown, *human) if len(part) > 20 and part in text]
    for name in ("frontier.svg", "frontier.csv"):
        assert (folder / "figures" / name).stat().st_size > 0
    assert page(study, _facts(folder, study)) == text


def _facts(folder, study):
    from dpo.experiment.sentiment import read_facts

    return read_facts(validate(SentimentConfig, study.config))


def test_the_same_command_does_only_what_is_missing(finished, file):
    _, folder = finished
    table = (folder / "table.csv").read_text("utf-8")
    lost = folder / "seed-0" / "runs" / "dpo-1"
    kept = [folder / "seed-0" / name for name in ("sft", "runs/dpo-0.1", "runs/ppo_true-0.1")]
    before = [(run / "metrics.jsonl").stat().st_mtime_ns for run in kept]
    shutil.rmtree(lost)
    (folder / "table.csv").unlink()
    run_sentiment(tiny(folder, file))
    assert [(run / "metrics.jsonl").stat().st_mtime_ns for run in kept] == before
    columns = ("method", "strength", "kl", "reward", "efficiency")
    first, second = (
        [[row[c] for c in columns] for row in csv.DictReader(text.splitlines())]
        for text in (table, (folder / "table.csv").read_text("utf-8"))
    )
    assert first == second


def test_other_settings_in_the_same_folder_are_refused(finished, file):
    _, folder = finished
    with pytest.raises(InputError, match=r"budget\.steps: 2 there, 3 now"):
        run_sentiment(tiny(folder, file, budget={**TINY["budget"], "steps": 3}))


# -- human reviews -------------------------------------------------------------------------------


def test_on_human_reviews_the_classifier_beats_chance_by_far(shared_data):
    file = shared_data / "movie-reviews.jsonl.gz"
    if not file.is_file():
        pytest.skip("movie-reviews.jsonl.gz is not beside the project (shared/data)")
    reviews, _ = load_reviews(file)
    parts = split_reviews(reviews, classifier_share=0.4, held_out_share=0.15)
    cut = {"min_words": 9, "max_words": 30, "most": 10}
    classifier = fit_classifier(*zip(*labelled_passages(parts.classifier, **cut), strict=True))
    right = [
        (odds > 0) == review.positive
        for review, odds in zip(
            parts.held_out,
            classifier.log_odds([review.text for review in parts.held_out]).tolist(),
            strict=True,
        )
    ]
    assert sum(right) / len(right) > 0.7


def test_the_parts_of_all_shares_are_disjoint():
    reviews = as_reviews(made_up_reviews(60))
    for first, second in itertools.product((0.2, 0.5), (0.1, 0.3)):
        parts = split_reviews(reviews, classifier_share=first, held_out_share=second)
        texts = [{r.text for r in getattr(parts, n)} for n in ("classifier", "model", "held_out")]
        assert all(not a & b for a, b in itertools.combinations(texts, 2))
