"""Sentence embeddings written down by content, so that no text is embedded twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dpo.atomic import replace_file, storage_errors

CHUNK_TEXTS = 512
"""Texts between two writes."""

Vectors = NDArray[np.float32]


class IdentifiedEmbed(Protocol):
    """A function from texts to vectors, (N,) -> (N, D), that says which one it is."""

    @property
    def digest(self) -> str:
        """Of all that decides the vectors."""
        ...

    def __call__(self, texts: Sequence[str], /) -> Vectors: ...


class EmbeddingCache:
    """An embedding that remembers, in files of a folder, what it was asked.

    A file holds the vectors of a chunk of texts. Its name is a digest of the model and the chunk,
    so another model's vectors are never used; and it holds a digest of its vectors, so damaged ones
    are made again. Chunks, not single texts, are remembered: the last bits of a vector depend on
    the texts that share its batch, and whatever was there before, equal calls get equal vectors.
    """

    def __init__(self, embed: IdentifiedEmbed, folder: Path) -> None:
        self._embed = embed
        self._folder = folder

    def __call__(self, texts: Sequence[str], /) -> Vectors:
        """The vector of each text: (N,) -> (N, D).

        Raises:
            StorageError: a file cannot be written.
        """
        starts = range(0, len(texts), CHUNK_TEXTS)
        chunks = [self._vectors(texts[start : start + CHUNK_TEXTS]) for start in starts]
        return np.concatenate(chunks) if chunks else np.zeros((0, 0), np.float32)

    def _vectors(self, texts: Sequence[str]) -> Vectors:
        key = hashlib.sha256(json.dumps([self._embed.digest, list(texts)]).encode()).hexdigest()
        file = self._folder / f"{key}.safetensors"
        vectors = _read(file)
        if vectors is None:
            vectors = np.ascontiguousarray(self._embed(texts))
            with storage_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(file) as temporary:
                temporary.write_bytes(save({"vectors": vectors, "sha256": _digest(vectors)}))
        return vectors


def _read(file: Path) -> Vectors | None:
    """Vectors written before; None where there is no such file, or it is damaged."""
    try:
        found = load(file.read_bytes())
        vectors: Vectors = found["vectors"]
        whole = np.array_equal(found["sha256"], _digest(vectors))
    except (OSError, SafetensorError, KeyError):
        return None
    return vectors if whole else None


def _digest(vectors: Vectors) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.sha256(vectors.tobytes()).digest(), np.uint8)
