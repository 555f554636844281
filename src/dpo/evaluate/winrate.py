"""Sentence-BERT win rates: from generations to a table with null rows and intervals.

A response wins when it is nearer to the chosen response than to the rejected one:
`cos(generated, chosen) > cos(generated, rejected)`. Equal cosines are a tie. The win rate is
`wins / (wins + losses)`: a tie says nothing about the direction, as in a sign test, so ties are
counted beside it and never hidden in it.

The judge rewards a manner as well as an answer. Therefore every table holds the null responses
(`null_responses`) on the same prompts: a model's win rate is read against theirs, not against 50%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dpo.core.stats import clustered_bootstrap_interval, clustered_wilson_interval
from dpo.data.prompts import as_text
from dpo.data.rows import PreferenceRow
from dpo.errors import InputError
from dpo.evaluate.records import (
    Generation,
    Kind,
    Responder,
    SamplesByPrompt,
    ScoredGeneration,
    Verdict,
    by_responder,
    win_share,
)
from dpo.evaluate.sbert import Embed, margins, response_cosines

POLITE = "I would be happy to help. Please let me know if there is anything else you need."
RUDE = "What a silly question. Work it out yourself."


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRateRow:
    """One line of the table: a model at a temperature, or a null response.

    `win_rate`, its intervals and `truncated_share` are shares within [0, 1]; `win_rate` is None
    when nothing was decided, `mean_tokens` when no token was counted. `tie_half` is the win rate
    with every tie as half a win, of all n responses: where it is far from `win_rate`, ties matter.
    `low` and `high` are Wilson's; `bootstrap_low` and `bootstrap_high` come from drawing prompts
    again, and are None where all prompts say the same.
    """

    model: str
    kind: Kind
    temperature: float | None
    num_prompts: int
    n: int
    wins: int
    losses: int
    ties: int
    win_rate: float | None
    tie_half: float
    low: float
    high: float
    bootstrap_low: float | None
    bootstrap_high: float | None
    confidence: float
    mean_margin: float
    truncated_share: float
    mean_tokens: float | None


def null_responses(rows: Sequence[PreferenceRow], *, seed: int = 0) -> list[Generation]:
    """The responses that know nothing, one of each kind to each row's prompt, to be scored as any.

    Another prompt's chosen and another's rejected response (each prompt gets those of the next one
    in a seeded circular order, so no prompt keeps its own), a constant polite and a constant rude
    sentence, the prompt echoed, and the empty string. A row's index is its `prompt_index`.

    Raises:
        InputError: with fewer than two distinct prompts, where there is no other prompt.
    """
    prompts = [as_text(row.prompt) for row in rows]
    other = [rows[i] for i in _other_prompt(prompts, seed)]
    respond: dict[str, Callable[[int], str]] = {
        "another prompt's chosen": lambda i: other[i].chosen,
        "another prompt's rejected": lambda i: other[i].rejected,
        "constant polite sentence": lambda i: POLITE,
        "constant rude sentence": lambda i: RUDE,
        "prompt echoed": lambda i: prompts[i],
        "empty string": lambda i: "",
    }
    return [
        Generation(
            model=name,
            kind="null",
            temperature=None,
            prompt_index=i,
            sample=0,
            prompt=prompts[i],
            chosen=row.chosen,
            rejected=row.rejected,
            generated=response(i),
            num_tokens=None,
            truncated=False,
        )
        for name, response in respond.items()
        for i, row in enumerate(rows)
    ]


def score_generations(records: Sequence[Generation], embed: Embed) -> list[ScoredGeneration]:
    """Each record with its cosines, margin and verdict, in order; each distinct text embedded once.

    Raises:
        InputError: when a response occurs twice, or a prompt comes with two different pairs.
    """
    _check_records(records)
    cos_chosen, cos_rejected = response_cosines(
        embed,
        [record.generated for record in records],
        [record.chosen for record in records],
        [record.rejected for record in records],
    )
    scores = zip(records, cos_chosen, cos_rejected, margins(cos_chosen, cos_rejected), strict=True)
    return [
        ScoredGeneration(
            **asdict(record),
            cos_chosen=float(to_chosen),
            cos_rejected=float(to_rejected),
            margin=float(margin),
            verdict=_verdict(margin),
        )
        for record, to_chosen, to_rejected, margin in scores
    ]


def win_rate_table(
    scored: Iterable[ScoredGeneration], *, confidence: float = 0.95, seed: int = 0
) -> list[WinRateRow]:
    """One row per model and temperature, in order of appearance, the null responses last.

    The interval of the win rate is Wilson's over the decided responses; with several samples a
    prompt it is the clustered one, prompts being the clusters. Beside it stands a bootstrap
    interval over prompts, whose draws `seed` decides.
    """
    table = [_table_row(*item, confidence, seed) for item in by_responder(scored).items()]
    return sorted(table, key=lambda row: row.kind == "null")


def _other_prompt(prompts: Sequence[str], seed: int) -> list[int]:
    """For each prompt the index of another: the next in a random circle whose text differs."""
    if len(set(prompts)) < 2:
        raise InputError("null responses need at least two distinct prompts.")
    circle = [int(i) for i in np.random.default_rng(seed).permutation(len(prompts))]
    other = [0] * len(prompts)
    for place, i in enumerate(circle):
        step = 1
        while prompts[circle[(place + step) % len(circle)]] == prompts[i]:
            step += 1
        other[i] = circle[(place + step) % len(circle)]
    return other


def _check_records(records: Sequence[Generation]) -> None:
    seen: set[tuple[object, ...]] = set()
    pairs: dict[int, tuple[str, str]] = {}
    for record in records:
        at = f"model {record.model!r}, temperature {record.temperature}, prompt"
        at = f"{at} {record.prompt_index}, sample {record.sample}"
        key = (record.kind, record.model, record.temperature, record.prompt_index, record.sample)
        if key in seen:
            raise InputError(f"{at}: this response occurs twice.")
        seen.add(key)
        pair = (record.chosen, record.rejected)
        if pairs.setdefault(record.prompt_index, pair) != pair:
            raise InputError(
                f"{at}: its chosen and rejected differ from another record's of this prompt; "
                "all records must come from one evaluation set."
            )


def _verdict(margin: float) -> Verdict:
    return "win" if margin > 0 else "loss" if margin < 0 else "tie"


def _table_row(
    responder: Responder, prompts: SamplesByPrompt, confidence: float, seed: int
) -> WinRateRow:
    records = [record for samples in prompts.values() for record in samples]
    decided = [record for record in records if record.verdict != "tie"]
    won = [record.verdict == "win" for record in decided]
    of_prompt = [record.prompt_index for record in decided]
    wins, ties = sum(won), len(records) - len(decided)
    interval = clustered_wilson_interval(won, of_prompt, confidence=confidence)
    bootstrap = clustered_bootstrap_interval(won, of_prompt, confidence=confidence, seed=seed)
    tokens = [record.num_tokens for record in records if record.num_tokens is not None]
    return WinRateRow(
        model=responder.model,
        kind=responder.kind,
        temperature=responder.temperature,
        num_prompts=len(prompts),
        n=len(records),
        wins=wins,
        losses=len(decided) - wins,
        ties=ties,
        win_rate=win_share(records),
        tie_half=(wins + ties / 2) / len(records),
        low=interval.low,
        high=interval.high,
        bootstrap_low=bootstrap.low if bootstrap else None,
        bootstrap_high=bootstrap.high if bootstrap else None,
        confidence=confidence,
        mean_margin=float(np.mean([record.margin for record in records])),
        truncated_share=float(np.mean([record.truncated for record in records])),
        mean_tokens=sum(tokens) / len(tokens) if tokens else None,
    )
