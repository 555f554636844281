"""Shared pieces of the tests: tiny models and tokenizers made on the spot, and the shared data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)  # on any machine alike
settings.load_profile("steady")

# One thread: some tests fork, and a child must not wait for the threads of a pool it does not have.
# Tiny models are no slower for it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEXTS = [
    "What is the capital of Peru? The capital of Peru is Lima.",
    "Name the young of the cat. A young cat is called kitten. Happy to help!",
    "Tell me the opposite of hot. The opposite of hot is cold. Ugh.",
] * 10


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 300 entries."""
    from dpo.models.fresh import train_tokenizer

    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Reference log-probabilities of a test are its own."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared_data():
    """The real data beside the project's root; tests that need it are skipped where it is not."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data is not beside the project (../shared/data)")
    return folder
