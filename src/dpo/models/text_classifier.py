"""A linear classifier of texts, fitted in seconds: logistic regression on TF-IDF of words.

    log-odds(x) = w . u(x) / |u(x)| + b,   u_t(x) = (1 + log count_t(x)) idf_t

where a term t is absent u_t is 0. It serves as a reward where no trained sentiment model can be
had. Saved as one JSON file, without pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.errors import InputError

CLASSIFIER_FILE = "text_classifier.json"
MIN_DOCUMENTS = 3
"""A term in fewer texts is left out: what it says of a label is chance."""
MAX_TERMS = 20_000


@dataclass(frozen=True)
class TextClassifier:
    """Terms with their inverse document frequencies and weights, and the bias."""

    terms: tuple[str, ...]
    idf: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    @cached_property
    def _features(self) -> Any:
        features = _vectorizer(vocabulary=list(self.terms))
        features.idf_ = np.array(self.idf)
        return features

    def log_odds(self, texts: Sequence[str]) -> Tensor:
        """log p(positive)/p(negative) of each text, (N,), float64."""
        found = self._features.transform(texts) @ np.array(self.weights) + self.bias
        return torch.from_numpy(np.asarray(found, dtype=np.float64))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.as_json().encode()).hexdigest()

    def as_json(self) -> str:
        """All of it, as it is saved."""
        fields = {name: getattr(self, name) for name in ("bias", "terms", "idf", "weights")}
        return json.dumps(fields, ensure_ascii=False) + "\n"


def _vectorizer(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, **options)


def fit_classifier(texts: Sequence[str], labels: Sequence[bool]) -> TextClassifier:
    """Fit by maximum likelihood with the usual penalty |w|^2/2.

    Raises:
        InputError: the labels are all the same, or hardly any word comes in several texts.
    """
    from sklearn.linear_model import LogisticRegression

    if len({*labels}) < 2:
        raise InputError("A classifier needs texts of both labels; all have one.")
    features = _vectorizer(min_df=MIN_DOCUMENTS, max_features=MAX_TERMS)
    try:
        table = features.fit_transform(texts)
    except ValueError as error:  # "no terms remain"
        raise InputError(
            f"A classifier needs words that come in {MIN_DOCUMENTS} texts at least; of "
            f"{len(texts)} texts none does."
        ) from error
    model = LogisticRegression(max_iter=1000).fit(table, labels)
    return TextClassifier(
        terms=tuple(features.get_feature_names_out().tolist()),
        idf=tuple(features.idf_.tolist()),
        weights=tuple(model.coef_[0].tolist()),
        bias=float(model.intercept_[0]),
    )


def save_classifier(classifier: TextClassifier, folder: Path) -> None:
    """Write it into a folder, which `reward.model` can name."""
    (folder / CLASSIFIER_FILE).write_text(classifier.as_json(), encoding="utf-8")


def load_classifier(folder: Path) -> TextClassifier | None:
    """The classifier of a folder, or None where the folder has none.

    Raises:
        InputError: its file is damaged.
    """
    file = folder / CLASSIFIER_FILE
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        lists = {name: tuple(fields[name]) for name in ("terms", "idf", "weights")}
        classifier = TextClassifier(**lists, bias=float(fields["bias"]))
        if not len(classifier.terms) == len(classifier.idf) == len(classifier.weights):
            raise ValueError("lists of different lengths")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected a text classifier; it is damaged.") from error
    return classifier
