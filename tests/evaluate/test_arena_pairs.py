"""From folders to pairs: who meets whom, in which order, on which side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from arena_folders import NAMES, evaluation_folder, run_folder, scored, write_evaluation
from dpo.errors import InputError
from dpo.evaluate.arena.pairs import (
    Answer,
    Pair,
    choose_responders,
    deal,
    make_pairs,
    read_answers,
)


def answer(responder="a", text="x", temperature=1.0, sample=0, prompt="p", margin=None):
    return Answer(
        responder=responder,
        temperature=temperature,
        sample=sample,
        prompt=prompt,
        text=text,
        margin=margin,
    )


def texts(pairs):
    return [(pair.prompt, pair.a.text, pair.b.text) for pair in pairs]


def many_pairs(num_prompts=40, samples=3):
    return [
        Pair(
            answer("a", f"a{i}/{s}", sample=s, prompt=f"p{i}"),
            answer("b", f"b{i}/{s}", sample=s, prompt=f"p{i}"),
        )
        for i in range(num_prompts)
        for s in range(samples)
    ]


# -- reading ---------------------------------------------------------------------------------------


def test_an_evaluation_gives_its_models_its_nulls_and_the_datas_own(tmp_path):
    records = [scored("m", 0, "Yes.", margin=0.25), scored("echo", 0, "?", temperature=None)]
    answers = read_answers([write_evaluation(tmp_path / "e", records)])
    assert {x.responder: (x.temperature, x.text, x.margin) for x in answers} == {
        "m": (1.0, "Yes.", 0.25),
        "chosen": (None, "Good 0.", None),
        "rejected": (None, "Bad 0.", None),
        "echo": (None, "?", 0.0),
    }


def test_a_run_answers_under_the_name_of_its_folder_at_its_own_temperature(tmp_path):
    pair = {"prompt": "p", "generated": "g", "chosen": "c", "rejected": "r"}
    run = run_folder(tmp_path / "sft", [pair], temperature=0.3)
    found = [(x.responder, x.temperature, x.text) for x in read_answers([run])]
    assert found == [(str(run), 0.3, "g"), ("chosen", None, "c"), ("rejected", None, "r")]


def test_a_run_on_data_without_pairs_has_only_its_own_answers(tmp_path):
    run = run_folder(tmp_path / "sft", [{"prompt": "p", "generated": "g", "response": "r"}])
    assert [x.responder for x in read_answers([run])] == [str(run)]


def break_line(folder: Path) -> None:
    file = folder / "scored.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], lines[1].replace('"margin": 0.25', '"margin": "much"')]))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "scored.jsonl").unlink(), "expected scored.jsonl of an evalu"),
        (lambda folder: (folder / "scored.jsonl").write_text('{"model": '), "scored.jsonl:1: not"),
        (lambda folder: (folder / "scored.jsonl").write_text("{}\n"), "scored.jsonl:1: model: f"),
        (break_line, "scored.jsonl:2: margin: input should be a valid number"),
        (lambda folder: write_evaluation(folder, [scored("chosen", 0, "x")]), "rename the model"),
    ],
    ids=["no file", "torn", "no fields", "a text for a number", "a model called chosen"],
)
def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path, damage, says):
    folder = evaluation_folder(tmp_path / "e")
    damage(folder)
    with pytest.raises(InputError, match=says) as caught:
        read_answers([folder])
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="missing: there is no such folder"):
        read_answers([tmp_path / "missing"])


def test_a_run_without_its_configuration_is_refused(tmp_path):
    run = run_folder(tmp_path / "sft", [{"prompt": "p", "generated": "g"}])
    (run / "config.json").unlink()
    with pytest.raises(InputError, match="sample_temperature"):
        read_answers([run])


# -- choosing --------------------------------------------------------------------------------------


def responders(*names):
    return [answer(name) for name in names] + [
        answer(name, temperature=None) for name in ("chosen", "rejected", "echo")
    ]


@pytest.mark.parametrize(
    ("models", "a", "b", "expected"),
    [
        (("m", "n"), None, None, ("m", "n")),
        (("m", "n"), "n", None, ("n", "m")),
        (("m", "n"), None, "m", ("n", "m")),
        (("m",), None, None, ("m", "chosen")),
        (("m",), "rejected", None, ("rejected", "m")),
        (("m", "n"), "n", "chosen", ("n", "chosen")),
        (("m", "n", "o"), "o", "echo", ("o", "echo")),
    ],
)
def test_who_is_compared(models, a, b, expected):
    assert choose_responders(responders(*models), a, b) == expected


@pytest.mark.parametrize(
    ("models", "a", "b", "says"),
    [
        (("m", "n", "o"), None, None, "name the two to compare, among 'm', 'n', 'o', 'chosen'"),
        (("m", "n", "o"), "m", None, "name the two"),
        (("m", "n"), "chosen", None, "name the two"),
        (("m", "n"), "M", "n", "--a: nobody is called 'M'; there are 'm', 'n'"),
        (("m", "n"), "m", "", "--b: nobody is called ''"),
        (("m", "n"), "m", "m", "both are 'm'"),
    ],
)
def test_what_leaves_a_choice_or_names_nobody_is_refused(models, a, b, says):
    with pytest.raises(InputError, match=says):
        choose_responders(responders(*models), a, b)


# -- pairing ---------------------------------------------------------------------------------------


def test_answers_meet_at_the_same_prompt_temperature_and_sample():
    answers = [
        answer("a", "a1", prompt="p"),
        answer("a", "a2", prompt="p", sample=1),
        answer("a", "a3", prompt="p", temperature=0.5),
        answer("a", "a4", prompt="q"),
        answer("b", "b1", prompt="p", sample=1),
        answer("b", "b2", prompt="p", temperature=0.5),
        answer("b", "b3", prompt="r"),
    ]
    assert texts(make_pairs(answers, "a", "b")) == [("p", "a2", "b1"), ("p", "a3", "b2")]
    assert texts(make_pairs(answers, "b", "a")) == [("p", "b1", "a2"), ("p", "b2", "a3")]
    assert texts(make_pairs(answers, "a", "b", temperature=0.5)) == [("p", "a3", "b2")]


@pytest.mark.parametrize("turn", [False, True], ids=["as b", "as a"])
def test_the_chosen_response_meets_every_answer_to_its_prompt(turn):
    answers = [
        answer("m", "m1", temperature=0.5),
        answer("m", "m2", temperature=1.0, sample=3),
        answer("chosen", "c", temperature=None),
        answer("chosen", "other", temperature=None, prompt="q"),
    ]
    names = ("chosen", "m") if turn else ("m", "chosen")
    pairs = make_pairs(answers, *names)
    expected = [("c", "m1"), ("c", "m2")] if turn else [("m1", "c"), ("m2", "c")]
    assert [(pair.a.text, pair.b.text) for pair in pairs] == expected
    assert [(pair.sampled.temperature, pair.sampled.sample) for pair in pairs] == [(0.5, 0), (1, 3)]


def test_the_two_responses_of_the_data_meet_once():
    answers = [*responders("m"), answer("m", "again", sample=1)]
    (pair,) = make_pairs(answers, "chosen", "rejected")
    assert pair.sampled.temperature is None


def test_a_run_meets_a_model_of_an_evaluation(tmp_path):
    evaluation = evaluation_folder(tmp_path / "e")
    sample = {"prompt": "Question 2?", "generated": "From the run."}
    run = run_folder(tmp_path / "run", [sample], temperature=1.0)
    pairs = make_pairs(read_answers([evaluation, run]), NAMES[0], str(run))
    assert texts(pairs) == [("Question 2?", "Answer x2.", "From the run.")]


@pytest.mark.parametrize(
    ("answers", "temperature", "says"),
    [
        ([answer("a"), answer("b", temperature=0.5)], None, "'a' and 'b' answer no prompt at the"),
        ([answer("a"), answer("b")], 0.5, "--temperature 0.5: 'a' and 'b' meet at 1."),
        ([answer("a"), answer("b"), answer("a", "y")], None, "two different answers at temperatu"),
        (
            [answer("a", temperature=None), answer("b", temperature=None)],
            1.0,
            "--temperature 1: 'a' and 'b' meet at none",
        ),
    ],
    ids=["no meeting", "another temperature", "two answers", "no temperature"],
)
def test_pairs_that_cannot_be_are_one_sentence(answers, temperature, says):
    with pytest.raises(InputError, match=says):
        make_pairs(answers, "a", "b", temperature=temperature)


def test_the_same_answer_read_twice_is_one():
    assert len(make_pairs([answer("a"), answer("b"), answer("a")], "a", "b")) == 1


def test_answers_that_differ_only_at_their_ends_are_identical():
    assert Pair(answer(text="Yes. \n"), answer("b", "Yes.")).identical
    assert not Pair(answer(text="Yes."), answer("b", "yes.")).identical


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [(0.3, 0.1, "win"), (-0.3, -0.1, "loss"), (0.2, 0.2 + 5e-7, "tie"), (0.2, None, None)],
)
def test_sentence_bert_prefers_the_larger_margin(a, b, verdict):
    assert Pair(answer(margin=a), answer("b", margin=b)).sentence_bert == verdict


def test_a_pair_is_known_by_all_that_is_compared():
    pair = Pair(answer(), answer("b", "y"))
    assert pair.id == Pair(answer(margin=0.5), answer("b", "y")).id
    others = [
        Pair(answer(text="z"), answer("b", "y")),
        Pair(answer("c"), answer("b", "y")),
        Pair(answer(prompt="q"), answer("b", "y", prompt="q")),
        Pair(answer(sample=1), answer("b", "y", sample=1)),
        Pair(answer(temperature=0.5), answer("b", "y", temperature=0.5)),
        Pair(pair.b, pair.a),
    ]
    assert len({pair.id, *(other.id for other in others)}) == 7


# -- order and sides -------------------------------------------------------------------------------


def test_every_prompt_has_its_first_pair_before_any_has_its_second():
    dealt = deal(many_pairs(40, 3), seed=0)
    assert sorted(pair.id for pair in dealt) == sorted(pair.id for pair in many_pairs(40, 3))
    for number in range(3):
        assert len({pair.prompt for pair in dealt[40 * number : 40 * (number + 1)]}) == 40


def test_the_order_is_random_and_a_function_of_the_seed():
    pairs = many_pairs(40, 3)
    dealt = deal(pairs, seed=1)
    assert dealt == deal(pairs[::-1], seed=1)
    assert dealt != deal(pairs, seed=2)
    assert {pair.a.sample for pair in dealt[:40]} == {0, 1, 2}


def test_a_choice_of_prompts_keeps_all_their_pairs():
    dealt = deal(many_pairs(40, 3), seed=0, max_prompts=5)
    assert set(Counter(pair.prompt for pair in dealt).values()) == {3}
    assert len(dealt) == 15
    assert dealt[:5] == deal(many_pairs(40, 3), seed=0)[:5]


def test_sides_are_a_fair_coin_of_seed_and_pair():
    pairs = many_pairs(400, 1)
    sides = [pair.left(0) for pair in pairs]
    assert sides == [pair.left(0) for pair in pairs]
    assert 160 < sides.count("a") < 240  # four standard deviations of 400 fair coins
    agree = sum(x == pair.left(1) for x, pair in zip(sides, pairs, strict=True))
    assert 160 < agree < 240
