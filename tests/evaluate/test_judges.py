"""Judges that score one response at a time, and which comparisons judges are shown."""

import itertools
import random

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from dpo.config_files import validate
from dpo.data.rows import Message, PreferenceRow
from dpo.data.synthetic import World
from dpo.errors import InputError
from dpo.evaluate.judges import ScalarJudge, open_judges, sentence_judge
from dpo.evaluate.matchups import Matchup, Place, make_matchups
from dpo.evaluate.records import Generation
from dpo.evaluate.winrate import null_responses
from dpo.evaluation_config import EvaluateConfig

MIRROR = {"win": "loss", "loss": "win", "tie": "tie"}
ROWS = [PreferenceRow(f"prompt {i}", f"chosen {i}", f"rejected {i}") for i in range(4)]


def matchup(a, b, *, prompt="p", index=0, chosen="w", rejected="l"):
    place = Place(family="models", a="x", b="y", temperature=1.0, prompt_index=index, sample=0)
    return Matchup(
        place=place, prompt=prompt, response_a=a, response_b=b, chosen=chosen, rejected=rejected
    )


class Letters:
    """Two axes: how many w and how many l. "w" is the chosen response, "l" the rejected one."""

    name = "letters"

    def __call__(self, texts):
        return np.array([[text.count("w"), text.count("l")] for text in texts], np.float32)


def opened(**values):
    start = {"models": {"m": "runs/m"}, "out": "x"}
    return open_judges(validate(EvaluateConfig, start | values), Letters())


def by_length(**changes):
    def score(candidates):
        return np.array([float(len(c.response)) for c in candidates])

    return ScalarJudge("length", changes.get("score", score), {})


# -- scores to verdicts ---------------------------------------------------------------------------


def test_the_higher_score_wins():
    pairs = [matchup("abc", "a"), matchup("a", "abc"), matchup("ab", "cd")]
    assert by_length().compare(pairs) == ["win", "loss", "tie"]
    assert by_length().compare([]) == []


def test_scores_that_differ_by_rounding_only_tie():
    def noisy(candidates):
        return np.array([5e-7 if c.response == "a" else 0.0 for c in candidates])

    assert by_length(score=noisy).compare([matchup("a", "b")]) == ["tie"]


def test_each_response_to_a_prompt_is_scored_once():
    seen = []

    def score(candidates):
        seen.extend(candidates)
        return np.zeros(len(candidates))

    pairs = [matchup("a", "b"), matchup("b", "c"), matchup("a", "b", prompt="q"), matchup("a", "a")]
    by_length(score=score).compare(pairs)
    assert sorted((c.prompt, c.response) for c in seen) == [
        ("p", "a"),
        ("p", "b"),
        ("p", "c"),
        ("q", "a"),
        ("q", "b"),
    ]


def test_neither_order_nor_side_of_the_pairs_changes_a_verdict():
    """Even with a scorer whose scores depend on the place in the batch."""

    def by_place(candidates):
        return np.array([len(c.response) + 0.6 * (i % 3) for i, c in enumerate(candidates)])

    draw = random.Random(1)
    texts = ["x" * draw.randrange(6) + draw.choice("ab") for _ in range(60)]
    prompts = ["p", (Message("user", "hi"),), "q"]
    pairs = [matchup(a, b, prompt=draw.choice(prompts)) for a, b in itertools.pairwise(texts)]
    judge = by_length(score=by_place)
    verdicts = judge.compare(pairs)
    order = draw.sample(range(len(pairs)), len(pairs))
    assert judge.compare([pairs[i] for i in order]) == [verdicts[i] for i in order]
    swapped = [matchup(m.response_b, m.response_a, prompt=m.prompt) for m in pairs]
    assert judge.compare(swapped) == [MIRROR[v] for v in verdicts]
    assert {"win", "loss", "tie"} == {*verdicts}


# -- Sentence-BERT --------------------------------------------------------------------------------


def test_sentence_bert_prefers_what_is_further_from_rejected_to_chosen():
    judge = sentence_judge(Letters())
    pairs = [matchup("wwl", "wl"), matchup("l", "wll"), matchup("wl", "wwll"), matchup("w", "l")]
    assert judge.compare(pairs) == ["win", "loss", "tie", "win"]
    assert judge.describe()["model"] == "letters"


def test_against_itself_as_a_ruler_the_chosen_response_is_hard_to_beat():
    judge = sentence_judge(Letters())
    near = {"chosen": "wwl", "rejected": "wll"}
    assert judge.compare([matchup("wl", "wwl", **near)]) == ["loss"]
    assert judge.compare([matchup("w", "wwl", **near)]) == ["win"]  # further along than the chosen


# -- rewards --------------------------------------------------------------------------------------


def test_the_true_reward_judges_by_what_it_is():
    prompt = "What is the capital of Peru?"
    answers = ["The capital of Peru is Lima.", "Ugh. The capital of Peru is Rome.", "Who knows?"]
    pairs = [matchup(a, b, prompt=prompt) for a, b in itertools.permutations(answers, 2)]
    (judge,) = opened(judges=["true_reward"])
    rewards = {a: World().reward(prompt, a) for a in answers}
    expected = ["win" if rewards[m.response_a] > rewards[m.response_b] else "loss" for m in pairs]
    assert judge.compare(pairs) == expected
    with pytest.raises(InputError, match="data=synthetic"):
        judge.compare([matchup("a", "b", prompt="Who are you?")])


def test_a_users_function_judges(tmp_path):
    (tmp_path / "f.py").write_text(
        "def f(prompts, responses):\n    return [-len(r) for r in responses]"
    )
    judges = opened(
        judges=["reward", "sentence_bert"], reward={"function": f"{tmp_path / 'f.py'}:f"}
    )
    assert [judge.name for judge in judges] == ["reward", "sentence_bert"]
    assert judges[0].compare([matchup("short", "much longer")]) == ["win"]
    assert len(judges[0].describe()["digest"]) == 64


def test_a_classifiers_verdicts_are_those_of_its_own_logits(tokenizer, tmp_path):
    torch.manual_seed(0)
    size = len(tokenizer) + 1
    config = GPT2Config(
        vocab_size=size, n_positions=24, n_embd=32, n_layer=2, n_head=2, num_labels=1,
        pad_token_id=size - 1,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.mul_(50)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def logit(response):
        ids = [*tokenizer("Why?").input_ids, *tokenizer(response).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            return model(torch.tensor([ids])).logits.item()

    texts = ["Lima", "Oslo is", "", "A young cat", "the the the"]
    pairs = [matchup(a, b, prompt="Why?") for a, b in itertools.permutations(texts, 2)]
    (judge,) = opened(judges=["reward"], reward=str(tmp_path))
    expected = ["win" if logit(m.response_a) > logit(m.response_b) else "loss" for m in pairs]
    assert judge.compare(pairs) == expected
    assert judge.describe()["model"] == str(tmp_path)


# -- which comparisons ----------------------------------------------------------------------------


def generation(model, index, text, *, sample=0, temperature=0.5):
    row = ROWS[index]
    return Generation(
        model=model,
        temperature=temperature,
        prompt_index=index,
        sample=sample,
        prompt=row.prompt,
        chosen=row.chosen,
        rejected=row.rejected,
        generated=text,
        num_tokens=3,
        truncated=False,
    )


RECORDS = [
    generation(m, i, f"{m} {i} {s} {t}", sample=s, temperature=t)
    for m in ("a", "b", "c")
    for t in (0.5, 1.0)
    for i in range(4)
    for s in range(2)
]


def test_models_meet_at_the_same_prompt_temperature_and_sample_only():
    made = make_matchups(ROWS, RECORDS, ["models"])
    assert {(m.place.a, m.place.b) for m in made} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert len(made) == 3 * 2 * 4 * 2
    for m in made:
        at = f"{m.place.prompt_index} {m.place.sample} {m.place.temperature}"
        assert (m.response_a, m.response_b) == (f"{m.place.a} {at}", f"{m.place.b} {at}")
        assert m.prompt == f"prompt {m.place.prompt_index}"


def test_where_only_one_model_answered_there_is_no_match():
    made = make_matchups(ROWS, [RECORDS[0], *RECORDS[16:18]], ["models"])
    assert [(m.place.prompt_index, m.place.sample) for m in made] == [(0, 0)]


def test_chosen_responses_are_met_by_models_and_by_nulls():
    records = [*RECORDS, *null_responses(ROWS)]
    chosen = make_matchups(ROWS, records, ["chosen"])
    assert len(chosen) == len(RECORDS)
    assert all(m.response_b == f"chosen {m.place.prompt_index}" for m in chosen)
    nulls = make_matchups(ROWS, records, ["nulls"])
    assert len(nulls) == 6 * 4
    assert {m.place.temperature for m in nulls} == {None}
    labels = make_matchups(ROWS, records, ["labels"])
    assert [(m.response_a, m.response_b) for m in labels] == [(r.chosen, r.rejected) for r in ROWS]
    every = make_matchups(ROWS, records, ["labels", "nulls", "chosen"])
    assert every == labels + nulls + chosen


def test_a_conversation_reaches_the_judge_as_one():
    prompt = (Message("user", "hi"),)
    rows = [PreferenceRow(prompt, "c", "r"), *ROWS[1:]]
    (first, *_) = make_matchups(rows, RECORDS, ["chosen"])
    assert first.prompt == prompt
