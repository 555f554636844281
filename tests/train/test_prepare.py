"""From rows to what is trained on: nothing leaks, nothing is dropped or cut without being said."""

import json

import pytest

from dpo.config import DataConfig
from dpo.config_files import validate
from dpo.data.prompts import resolve_template
from dpo.data.rows import DemonstrationRow, Message, PreferenceRow
from dpo.data.tokenize import Encoder
from dpo.errors import InputError
from dpo.train.encoded import encode_pairs
from dpo.train.prepare import (
    check_dropped,
    choose_template,
    encode_prompts,
    load_demonstrations,
    load_preferences,
    seeded_choice,
)
from dpo.train.sft import encode_demonstrations


def data(**values):
    return validate(DataConfig, values)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(prompts):
    return [{"prompt": p, "chosen": f"good {p}", "rejected": f"bad {p}"} for p in prompts]


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, resolve_template("plain"), 32)


def test_prompts_shared_with_the_held_out_source_are_refused_whatever_case_and_space(tmp_path):
    train = written(tmp_path / "train.jsonl", pairs(["What is two?", "What is three?"]))
    test = written(tmp_path / "test.jsonl", pairs(["what  is THREE? ", "What is four?"]))
    with pytest.raises(InputError) as caught:
        load_preferences(data(path=train, test=test))
    assert str(caught.value).startswith("data.test: 1 of its prompts are in the training data too")
    assert "what  is THREE? " in str(caught.value)


def test_a_held_out_source_of_its_own_is_used_whole(tmp_path):
    train = written(tmp_path / "train.jsonl", pairs(["one", "two"]))
    test = written(tmp_path / "test.jsonl", pairs(["three"]))
    loaded = load_preferences(data(path=train, test=test))
    assert [row.prompt for row in loaded.train] == ["one", "two"]
    assert [row.prompt for row in loaded.test] == ["three"]


def test_the_digest_is_that_of_both_sources(tmp_path):
    train = written(tmp_path / "train.jsonl", pairs(["one", "two"]))
    first = load_preferences(data(path=train, test=written(tmp_path / "a.jsonl", pairs(["x"]))))
    second = load_preferences(data(path=train, test=written(tmp_path / "b.jsonl", pairs(["y"]))))
    assert len({first.sha256, second.sha256, load_preferences(data(path=train)).sha256}) == 3


@pytest.mark.parametrize("changed", [{"seed": 1}, {"num_rows": 51}, {"num_facts": 79}])
def test_the_digest_of_the_embedded_data_changes_with_its_rows(changed):
    base = {"num_rows": 50, "seed": 0, "num_facts": 80}
    first = load_preferences(data(path="synthetic", synthetic=base))
    second = load_preferences(data(path="synthetic", synthetic=base | changed))
    assert first.sha256 != second.sha256


def test_demonstrations_and_preferences_of_the_embedded_data_are_split_alike():
    config = data(path="synthetic", synthetic={"num_rows": 800})
    sft, dpo = load_demonstrations(config), load_preferences(config)
    assert not {row.prompt for row in sft.train} & {row.prompt for row in dpo.test}
    assert not {row.prompt for row in dpo.train} & {row.prompt for row in sft.test}


def test_no_prompt_is_on_both_sides():
    loaded = load_preferences(data(path="synthetic", synthetic={"num_rows": 500}))
    assert not {row.prompt for row in loaded.train} & {row.prompt for row in loaded.test}
    assert len(loaded.train) + len(loaded.test) == 500


def test_the_embedded_demonstrations_have_no_rejected_response_to_imitate():
    with pytest.raises(InputError, match="a demonstration has no rejected response"):
        load_demonstrations(data(path="synthetic"), response="rejected")


@pytest.mark.parametrize("load", [load_demonstrations, load_preferences])
def test_who_forgets_the_data_is_told_what_is_trained_on(load, caplog):
    with caplog.at_level("INFO", "dpo"):
        load(data(synthetic={"num_rows": 20}))
    assert "Data synthetic: 20 embedded rows; data=FILE takes yours." in caplog.text


def test_sft_imitates_the_response_that_is_asked_for(tmp_path):
    path = written(tmp_path / "train.jsonl", pairs(["one", "two", "three"]))
    for response, word in (("chosen", "good"), ("rejected", "bad")):
        loaded = load_demonstrations(data(path=path), response=response)
        assert {row.response.split()[0] for row in loaded.train} == {word}


def test_identical_pairs_are_dropped_counted_and_said(encoder, caplog):
    rows = [
        PreferenceRow("a", "same", "same"),
        *[PreferenceRow("a", "x", str(i)) for i in range(9)],
    ]
    kept = encode_pairs(encoder, rows, max_dropped=0.1, what="training rows")
    assert len(kept) == 9
    assert (
        "1 of 10 rows are dropped: training rows: chosen and rejected are the same" in caplog.text
    )


def test_pairs_that_become_identical_by_being_cut_are_dropped_too(encoder, caplog):
    long = "word " * 60
    rows = [PreferenceRow("a", long + "yes", long + "no"), PreferenceRow("a", "yes", "no")]
    assert len(encode_pairs(encoder, rows, max_dropped=0.5, what="training rows")) == 1
    assert "2 responses their end" in caplog.text
    assert "1 of 2 rows are dropped" in caplog.text


def test_a_dropped_share_above_the_limit_stops_and_says_how_to_allow_it(encoder):
    rows = [
        PreferenceRow("a", "same", "same"),
        *[PreferenceRow("a", "x", str(i)) for i in range(9)],
    ]
    with pytest.raises(InputError) as caught:
        encode_pairs(encoder, rows, max_dropped=0.01, what="training rows")
    assert "1 of 10 rows (10.0%) would be dropped" in str(caught.value)
    allowed = float(str(caught.value).rpartition("data.max_dropped=")[2].rstrip("."))
    assert len(encode_pairs(encoder, rows, max_dropped=allowed, what="training rows")) == 9


def test_dropping_everything_is_never_allowed():
    check_dropped(0, 0, reason="none", allowed=0.0)
    with pytest.raises(InputError, match=r"All 3 rows would be dropped: all\. Mend them"):
        check_dropped(3, 3, reason="all", allowed=1.0)


def test_truncation_is_counted_and_said(encoder, caplog):
    rows = [
        DemonstrationRow("long prompt " * 30, "short"),
        DemonstrationRow("short", "long response " * 30),
        DemonstrationRow("short", "short"),
    ]
    encoded = encode_demonstrations(encoder, rows, train_on_prompt=False, what="held-out rows")
    assert all(len(sequence) <= 32 and sequence.num_scored >= 1 for sequence in encoded)
    message = "held-out rows: 1 of 3 prompts lost their beginning and 1 responses their end"
    assert message in caplog.text


def test_nothing_is_said_where_nothing_was_cut(encoder, caplog):
    encode_demonstrations(
        encoder, [DemonstrationRow("a", "b")], train_on_prompt=False, what="training rows"
    )
    assert not caplog.text


def test_training_on_the_prompt_scores_all_tokens_but_the_first(encoder):
    rows = [DemonstrationRow("What is two?", "It is two.")]
    (response_only,) = encode_demonstrations(encoder, rows, train_on_prompt=False, what="rows")
    (everything,) = encode_demonstrations(encoder, rows, train_on_prompt=True, what="rows")
    assert everything.ids == response_only.ids
    assert everything.num_scored == len(everything) - 1 > response_only.num_scored


def test_prompts_cut_to_make_room_for_generation_are_counted_and_said(encoder, caplog):
    prompts = ["short", "a long prompt " * 20]
    short, long = encode_prompts(encoder, prompts, max_new_tokens=40, positions=64)
    assert long == encoder.prompt_ids(prompts[1])[-24:]
    assert short == encoder.prompt_ids("short")
    assert "1 of 2 prompts lost their beginning: 40 new tokens leave room for 24" in caplog.text


def test_a_prompt_that_just_fits_is_not_called_cut(encoder, caplog):
    ids = encoder.prompt_ids("What is the capital of Peru?")
    (found,) = encode_prompts(
        encoder, ["What is the capital of Peru?"], max_new_tokens=5, positions=len(ids) + 5
    )
    assert found == ids
    assert not caplog.text


def test_the_template_is_the_models_own_and_another_is_refused():
    own = resolve_template("hh")
    found = choose_template(None, own, shape="preference", conversational=False)
    assert found == own
    assert choose_template("hh", own, shape="preference", conversational=False) == own
    with pytest.raises(InputError, match="the model was trained with the template hh, not alpaca"):
        choose_template("alpaca", own, shape="preference", conversational=False)


def test_conversations_take_the_chat_template_by_default():
    row = PreferenceRow((Message("user", "hi"),), "a", "b")
    assert not isinstance(row.prompt, str)
    found = choose_template(None, None, shape="preference", conversational=True)
    assert found.text is None


def test_a_seeded_choice_is_distinct_ordered_and_a_function_of_the_seed():
    chosen = seeded_choice(1000, 50, seed=3)
    assert chosen == seeded_choice(1000, 50, seed=3) == sorted(set(chosen))
    assert len(chosen) == 50
    assert chosen != seeded_choice(1000, 50, seed=4)
    assert seeded_choice(5, 50, seed=3) == [0, 1, 2, 3, 4]
