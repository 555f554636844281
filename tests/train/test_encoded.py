"""Pairs, rankings and judged responses as tokens and as the named tensors of a batch."""

from __future__ import annotations

import pytest
import torch

from dpo.data.prompts import resolve_template
from dpo.data.rows import PreferenceRow, RankedRow, UnpairedRow
from dpo.data.tokenize import Encoder, TokenSequence
from dpo.errors import InputError
from dpo.models.fresh import train_tokenizer
from dpo.train.encoded import (
    KINDS,
    EncodedJudgement,
    EncodedPair,
    EncodedRanking,
    encode_judgements,
    encode_pairs,
    encode_rankings,
)

S = [TokenSequence((1, 2, *range(3, 4 + n)), 2) for n in range(6)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = train_tokenizer(["some text"], vocab_size=300)
    return Encoder(tokenizer, resolve_template("plain"), 64)


def test_pairs_give_lengths_scores_and_places() -> None:
    kind = KINDS["pair"]
    pairs = [EncodedPair(S[0], S[1], "", (3.0, 1.0)), EncodedPair(S[2], S[3], "", (2.0, 0.5))]
    assert kind.sequences(pairs) == [S[0], S[2], S[1], S[3]]
    assert kind.places(pairs, [1]) == [1, 3]
    facts = kind.facts(pairs, torch.device("cpu"))
    assert facts["chosen_lengths"].tolist() == [1, 3]
    assert facts["rejected_lengths"].tolist() == [2, 4]
    assert facts["rejected_scores"].tolist() == [1.0, 0.5]
    bare = kind.facts([EncodedPair(S[0], S[1], "")], torch.device("cpu"))
    assert "chosen_scores" not in bare


def test_rankings_are_padded_and_their_places_are_those_of_their_rows() -> None:
    kind = KINDS["list"]
    rows = [
        EncodedRanking((S[0], S[1]), (0, 1), ""),
        EncodedRanking((S[2], S[3], S[4]), (0, 1, 1), "", (3.0, 1.0, 1.0)),
    ]
    assert kind.sequences(rows) == S[:5]
    assert kind.places(rows, [1]) == [2, 3, 4]
    assert kind.places(rows, [1, 0]) == [2, 3, 4, 0, 1]
    tensors = kind.tensors(rows, "policy", torch.arange(5.0))
    assert tensors["policy_logps"].tolist() == [[0, 1, 0], [2, 3, 4]]
    facts = kind.facts(rows, torch.device("cpu"))
    assert facts["mask"].tolist() == [[True, True, False], [True, True, True]]
    assert facts["ranks"].tolist() == [[0, 1, 0], [0, 1, 1]]
    assert "scores" not in facts, "one of the rows has none"


def test_accuracy_of_a_ranking_counts_strictly_ordered_pairs_that_exist() -> None:
    """Best, middle, tie of two: five ordered pairs; the rewards get three right, one tied."""
    tensors = {
        "policy_logps": torch.tensor([[2.0, 2.0, 1.0, 3.0, 99.0]]),
        "reference_logps": torch.zeros(1, 5),
        "ranks": torch.tensor([[0, 1, 2, 2, 0]]),
        "mask": torch.tensor([[True, True, True, True, False]]),
    }
    found = KINDS["list"].metrics(tensors, 0.5)
    assert found["rewards/accuracy"].tolist() == pytest.approx([2 / 5])
    assert found["rewards/ties"].tolist() == pytest.approx([1 / 5])
    margins = [0, 1, -1, 1, -1]
    assert found["rewards/margin"].tolist() == pytest.approx([0.5 * sum(margins) / 5])
    assert found["logps/best_change"].tolist() == [2.0]
    assert found["logps/others_change"].tolist() == [2.0]


def test_equal_scores_are_ties_and_a_ranking_of_ties_is_dropped_and_counted(encoder) -> None:
    rows = [
        RankedRow("p", ("a", "b", "c"), (2.0, 1.0, 1.0)),
        RankedRow("q", ("a", "b"), (1.0, 1.0)),
        RankedRow("r", ("a", "b")),
    ]
    found = encode_rankings(encoder, rows, max_dropped=0.5, what="rows")
    assert [ranking.ranks for ranking in found] == [(0, 1, 1), (0, 1)]
    with pytest.raises(InputError, match="all responses of the ranking are tied"):
        encode_rankings(encoder, rows, max_dropped=0.1, what="rows")


def test_a_judged_response_gets_the_completion_of_the_next_row_with_another_prompt(encoder) -> None:
    rows = [
        UnpairedRow("p", "one", True),
        UnpairedRow("p", "two", False),
        UnpairedRow("q", "three", True),
    ]
    found = encode_judgements(encoder, rows, max_dropped=0, what="rows")
    texts = [encoder.decode(row.mismatched.ids) for row in found]
    assert texts == ["pthree", "pthree", "qone"]
    assert [row.desirable for row in found] == [True, False, True]
    assert [encoder.decode(row.sequence.ids) for row in found] == ["pone", "ptwo", "qthree"]


def test_rewards_of_judged_responses_are_shares_that_add_up() -> None:
    tensors = {
        "policy_logps": torch.tensor([3.0, 1.0, 5.0]),
        "reference_logps": torch.tensor([1.0, 2.0, 1.0]),
        "desirable": torch.tensor([True, False, True]),
    }
    found = KINDS["unpaired"].metrics(tensors, 0.1)
    mean = found["rewards/desirable"].sum() / found["share_desirable"].sum()
    assert mean.item() == pytest.approx(0.3)
    assert found["rewards/undesirable"].sum().item() == pytest.approx(-0.1)


def test_pairs_keep_their_scores_and_equal_ones_are_dropped(encoder) -> None:
    rows = [PreferenceRow("p", "a", "b", scores=(1.0, 0.0)), PreferenceRow("p", "a", "a")]
    found = encode_pairs(encoder, rows, max_dropped=0.5, what="rows")
    assert [pair.scores for pair in found] == [(1.0, 0.0)]
    assert isinstance(found[0], EncodedPair)


def test_tokens_of_a_judged_row_do_not_count_what_carries_no_gradient() -> None:
    row = EncodedJudgement(S[0], S[5], True, "")
    assert row.sequences == (S[0],)
