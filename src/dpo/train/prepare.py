"""From a configuration to rows split by prompt, and to the encoder that both sides are written
with.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from dpo.config import DataConfig
from dpo.data import synthetic
from dpo.data.audit import responses_of
from dpo.data.pairs import Losses
from dpo.data.prompts import PromptTemplate, default_template, resolve_template
from dpo.data.rows import (
    DemonstrationRow,
    PreferenceRow,
    Prompt,
    PromptRow,
    RankedRow,
    Row,
    UnpairedRow,
)
from dpo.data.sources import (
    LoadedRows,
    as_demonstrations,
    as_pairs,
    as_rankings,
    as_unpaired,
    load_rows,
)
from dpo.data.split import overlap, split_by_prompt
from dpo.data.store import cache_folder
from dpo.data.stored_rows import prompts_on_both_sides, stored_preferences
from dpo.data.tokenize import EncodedRow, Encoder
from dpo.errors import InputError

log = logging.getLogger("dpo")

R = TypeVar("R", bound=DemonstrationRow | PreferenceRow | RankedRow | UnpairedRow | PromptRow)


@dataclass(frozen=True, slots=True)
class SplitData(Generic[R]):
    """Rows to train on and held-out rows, and what identifies them."""

    train: Sequence[R]
    test: Sequence[R]
    shape: str
    conversational: bool
    sha256: str


def load_demonstrations(
    data: DataConfig, *, response: Literal["chosen", "rejected"] = "chosen"
) -> SplitData[DemonstrationRow]:
    """What SFT trains on: demonstrations, or one response of each preference row.

    Raises:
        InputError: the source cannot be read, or has nothing to imitate.
    """
    if data.path == "synthetic":
        made = _embedded(synthetic.demonstrations(**data.synthetic.model_dump()))
        return _split(data, as_demonstrations(made, response=response), None, "synthetic")
    return _load(data, lambda rows: as_demonstrations(rows, response=response))


def load_preferences(data: DataConfig) -> SplitData[PreferenceRow]:
    """Pairs of a chosen and a rejected response.

    Raises:
        InputError: the source cannot be read, or its rows are no preferences.
    """
    if data.path == "synthetic":
        made = _embedded(synthetic.preferences(**data.synthetic.model_dump()))
        return _split(data, made, None, "synthetic")
    if data.store == "arrow":
        return _load_stored(data)
    return _load(data, as_pairs)


def load_rankings(data: DataConfig) -> SplitData[RankedRow]:
    """Responses in order, best first; pairs are rankings of two.

    Raises:
        InputError: the source cannot be read, or its rows have no order.
    """
    if data.path == "synthetic":
        made = _embedded(synthetic.preferences(**data.synthetic.model_dump()))
        return _split(data, as_rankings(made), None, "synthetic")
    return _load(data, as_rankings)


def load_judgements(data: DataConfig) -> SplitData[UnpairedRow]:
    """Single responses, desirable or not; a pair is one of each.

    Raises:
        InputError: the source cannot be read, or its rows have no labels.
    """
    if data.path == "synthetic":
        made = _embedded(synthetic.preferences(**data.synthetic.model_dump()))
        return _split(data, as_unpaired(made), None, "synthetic")
    return _load(data, as_unpaired)


def load_prompts(data: DataConfig) -> SplitData[Any]:
    """Rows of any kind, of which only the prompts are wanted.

    Raises:
        InputError: the source cannot be read.
    """
    if data.path == "synthetic":
        return load_preferences(data)
    return _load(data, lambda rows: tuple(rows))


def _embedded(rows: tuple[R, ...]) -> tuple[R, ...]:
    """The rows, said to be the embedded ones: whoever forgot `data` has not asked for them."""
    log.info("Data synthetic: %d embedded rows; data=FILE takes yours.", len(rows))
    return rows


def _load(data: DataConfig, convert: Callable[[Sequence[Row]], tuple[R, ...]]) -> SplitData[R]:
    """Read the source (and the held-out source, where it is one of its own), convert and split.

    Raises:
        InputError: the source cannot be read, or is asked to be kept in a store of pairs.
    """
    if data.store == "arrow":
        raise InputError(
            "data.store: arrow keeps preference pairs (dpo train with a loss on pairs, dpo reward "
            "with loss=bradley_terry, dpo evaluate); here the rows are used in another form, so "
            "leave it out."
        )
    loaded = load_rows(data.path, columns=data.columns, split=data.split, revision=data.revision)
    log.info("Data %s: %s.", data.path, loaded)
    rows = convert(loaded.rows)
    if len(rows) < len(loaded.rows):
        log.info("%d of %d rows are used.", len(rows), len(loaded.rows))
    if data.test is None:
        return _split(data, rows, None, loaded.shape, loaded.sha256)
    test: LoadedRows = load_rows(data.test, columns=data.columns)
    log.info("Held-out data %s: %s.", data.test, test)
    digest = hashlib.sha256(f"{loaded.sha256}{test.sha256}".encode()).hexdigest()
    return _split(data, rows, convert(test.rows), loaded.shape, digest)


def _split(
    data: DataConfig,
    rows: tuple[R, ...],
    test: tuple[R, ...] | None,
    shape: str,
    sha256: str | None = None,
) -> SplitData[R]:
    """Hold out rows by prompt, unless they came apart; then no training prompt may be among
    them.
    """
    conversational = not isinstance(rows[0].prompt, str)
    train = rows
    if test is None:
        split = split_by_prompt(rows, test_fraction=data.test_fraction, seed=data.split_seed)
        train, test = split.train, split.test
    else:
        shared = overlap(rows, test)
        if shared:
            raise prompts_on_both_sides(shared)
    digest = sha256 or hashlib.sha256(repr([*train, *test]).encode()).hexdigest()
    responses = [text for row in (*train, *test) for _, text in responses_of(row)]
    _report_split(
        len(train), len(test), sum(not text.strip() for text in responses), len(responses)
    )
    return SplitData(train, test, shape, conversational, digest)


def _report_split(num_train: int, num_test: int, num_empty: int, num_responses: int) -> None:
    log.info("%d training rows and %d held-out rows, split by prompt.", num_train, num_test)
    if num_empty:
        log.warning("%d of %d responses are empty.", num_empty, num_responses)


def _load_stored(data: DataConfig) -> SplitData[PreferenceRow]:
    """The same pairs as in memory, from the store, which is made where it is not there."""
    cache = cache_folder() if data.cache is None else Path(data.cache).expanduser()
    stored = stored_preferences(
        cache,
        data.path,
        data.test,
        columns=data.columns,
        split=data.split,
        revision=data.revision,
        test_fraction=data.test_fraction,
        seed=data.split_seed,
    )
    facts = stored.facts
    log.info("Data %s: %s.", data.path, facts["sources"][0])
    if facts["num_used"] < facts["num_rows"]:
        log.info("%d of %d rows are used.", facts["num_used"], facts["num_rows"])
    if data.test is not None:
        log.info("Held-out data %s: %s.", data.test, facts["sources"][1])
    where = "read from the store" if stored.found else "written to the store"
    log.info("Pairs are %s in %s.", where, cache)
    num_train, num_test = len(stored.train), len(stored.test)
    _report_split(num_train, num_test, facts["num_empty"], facts["num_responses"])
    return SplitData(
        stored.train, stored.test, facts["shape"], facts["conversational"], facts["sha256"]
    )


def choose_template(
    asked: str | None, own: PromptTemplate | None, *, shape: str, conversational: bool
) -> PromptTemplate:
    """The run's one template: the model's own where it was trained with one, else what is asked
    for.

    Raises:
        InputError: another one is asked for than the model was trained with, or a text template
            would have to write conversations.
    """
    if asked is None:
        template = own or default_template(shape, conversational=conversational)
    else:
        template = resolve_template(asked)
        if own is not None and own != template:
            raise InputError(
                f"data.template: the model was trained with the template {own}, not {template}; "
                "leave data.template out."
            )
    if conversational and template.text is not None:
        whose = " of the model" if template == own else ""
        raise InputError(
            f"data.template: the prompts are conversations, which the template {template}{whose} "
            "cannot write; use prompts that are text, or a model with a chat template."
        )
    log.info("Prompts are written with the template %s.", template)
    return template


def make_encoder(
    tokenizer: Any, template: PromptTemplate, *, max_length: int, positions: int
) -> Encoder:
    """An encoder that never gives more tokens than the model has positions."""
    if max_length > positions:
        log.info("Sequences are cut at the model's %d positions.", positions)
    return Encoder(tokenizer, template, min(max_length, positions))


def encode_prompts(
    encoder: Encoder, prompts: Sequence[Prompt], *, max_new_tokens: int, positions: int
) -> list[list[int]]:
    """Token ids of prompts to generate from; says how many lost their beginning to make room."""
    encoded = [
        encoder.encode_prompt(prompt, max_new_tokens=max_new_tokens, max_positions=positions)
        for prompt in prompts
    ]
    room = positions - max_new_tokens
    cut = sum(
        len(ids) == room and len(encoder.prompt_ids(prompt)) > room
        for ids, prompt in zip(encoded, prompts, strict=True)
    )
    if cut:
        log.warning(
            "%d of %d prompts lost their beginning: %d new tokens leave room for %d in the model's "
            "%d positions.",
            cut,
            len(prompts),
            max_new_tokens,
            room,
            positions,
        )
    return encoded


def report_cuts(encoded: Sequence[EncodedRow], *, what: str) -> None:
    """Say how many rows were cut."""
    losses = Losses()
    for row in encoded:
        losses.count(row)
    report_losses(losses, what=what)


def report_losses(losses: Losses, *, what: str) -> None:
    """Say how many rows were cut, by their counts."""
    if losses.prompts_cut or losses.responses_cut:
        log.warning(
            "%s: %d of %d prompts lost their beginning and %d responses their end "
            "(data.max_length).",
            what,
            losses.prompts_cut,
            losses.num_rows,
            losses.responses_cut,
        )


def check_dropped(num_dropped: int, num_rows: int, *, reason: str, allowed: float) -> None:
    """Count what is dropped, and stop where it is too much.

    Raises:
        InputError: a larger share than `data.max_dropped`, or everything.
    """
    if num_dropped == 0:
        return
    share = num_dropped / num_rows
    log.warning("%d of %d rows are dropped: %s.", num_dropped, num_rows, reason)
    if num_dropped == num_rows:
        raise InputError(f"All {num_rows} rows would be dropped: {reason}. Mend them.")
    if share > allowed:
        raise InputError(
            f"{num_dropped} of {num_rows} rows ({share:.1%}) would be dropped: {reason}. "
            f"Mend them, or allow it with data.max_dropped={min(1.0, share + 0.001):.3f}."
        )


def seeded_choice(num_rows: int, most: int, *, seed: int) -> list[int]:
    """At most `most` of `range(num_rows)`, a function of the seed, in order."""
    if num_rows <= most:
        return list(range(num_rows))
    chosen = np.random.default_rng([seed, num_rows]).choice(num_rows, size=most, replace=False)
    return sorted(int(i) for i in chosen)
