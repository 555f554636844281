"""Sentence-BERT win rates: from generations to a table with null rows, intervals and paired tests.

A response wins when it is nearer to the chosen response than to the rejected one:
`cos(generated, chosen) > cos(generated, rejected)`. Equal cosines are a tie. The win rate is
`wins / (wins + losses)`: a tie says nothing about the direction, as in a sign test, so ties are
counted beside it and never hidden in it.

The judge rewards a manner as well as an answer. Therefore every table holds the null responses
(`null_responses`) on the same prompts: a model's win rate is read against theirs, not against 50%.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from dpo.core.stats import (
    clustered_wilson_interval,
    holm,
    mcnemar_exact,
    paired_permutation,
    paired_proportion_interval,
    wilson_interval,
)
from dpo.data.files import printable
from dpo.data.prompts import as_text
from dpo.data.rows import PreferenceRow
from dpo.errors import InputError, StorageError
from dpo.evaluate.records import Generation, Kind, ScoredGeneration, Verdict
from dpo.evaluate.sbert import Embed, margins, response_cosines

if TYPE_CHECKING:
    from rich.table import Table

Family = Literal["models", "null"]

POLITE = "I would be happy to help. Please let me know if there is anything else you need."
RUDE = "What a silly question. Work it out yourself."


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRateRow:
    """One line of the table: a model at a temperature, or a null response.

    `win_rate`, its interval and `truncated_share` are shares within [0, 1]; `win_rate` is None when
    nothing was decided, `mean_tokens` when no token was counted.
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
    low: float
    high: float
    confidence: float
    mean_margin: float
    truncated_share: float
    mean_tokens: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """Two responders on the same prompts: `difference` is the win rate of a minus that of b.

    The adjusted p-values are Holm's over the tests of the same family. `num_unshared` counts the
    prompts that only one of the two answered, which are left out.
    """

    family: Family
    model_a: str
    model_b: str
    temperature: float | None
    num_prompts: int
    num_unshared: int
    wins_only_a: int
    wins_only_b: int
    difference: float | None
    low: float
    high: float
    confidence: float
    mcnemar_p: float
    mcnemar_p_holm: float
    margin_difference: float | None
    permutation_p: float
    permutation_p_holm: float


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
    scored: Iterable[ScoredGeneration], *, confidence: float = 0.95
) -> list[WinRateRow]:
    """One row per model and temperature, in order of appearance, the null responses last.

    The interval of the win rate is Wilson's over the decided responses; with several samples a
    prompt it is the clustered one, prompts being the clusters.
    """
    table = [_table_row(*item, confidence) for item in _by_responder(scored).items()]
    return sorted(table, key=lambda row: row.kind == "null")


def paired_tests(
    scored: Iterable[ScoredGeneration],
    *,
    num_permutations: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[PairedTest]:
    """Tests on the same prompts: every two models at each temperature, and each against the nulls.

    Family "models" holds the pairs of models that share a temperature. Family "null" holds each
    model at each temperature against the null response with the highest win rate: the one to beat.

    The prompt is the unit. `difference` is the mean, over the prompts that both have a decided
    response to, of the difference of their win shares there, with Bonett and Price's interval;
    McNemar's exact test counts the prompts that only one of them wins (by majority, where there
    are several samples). The permutation test takes the differences of mean margins on all shared
    prompts.
    """
    responders = _by_responder(scored)
    models = [key for key in responders if key.kind == "model"]
    nulls = [key for key in responders if key.kind == "null"]
    best_null = max(nulls, key=lambda key: _win_share(responders[key]) or 0.0, default=None)
    pairs = [(a, b) for a, b in combinations(models, 2) if a.temperature == b.temperature]
    against_null = [(model, best_null) for model in models if best_null]

    def tests_of(family: Family, pairs: list[tuple[_Responder, _Responder]]) -> list[PairedTest]:
        compared = [
            _compare(family, a, b, responders, num_permutations, seed, confidence) for a, b in pairs
        ]
        return _with_holm(compared)

    return tests_of("models", pairs) + tests_of("null", against_null)


def write_results(
    folder: Path,
    *,
    scored: Sequence[ScoredGeneration],
    table: Sequence[WinRateRow],
    tests: Sequence[PairedTest],
    meta: Mapping[str, object],
) -> None:
    """Write win_rates.csv and .json, paired_tests.csv and scored.jsonl, each whole or not at all.

    `meta` says how the numbers came to be (sentence model, seeds, data); it is the "meta" of the
    JSON file, with the counts of prompts and responses added.

    Raises:
        StorageError: when a file cannot be written.
    """
    prompts = {record.prompt_index for record in scored}
    content = {
        "meta": {**meta, "num_prompts": len(prompts), "num_responses": len(scored)},
        "win_rates": [asdict(row) for row in table],
        "paired_tests": [asdict(test) for test in tests],
    }
    lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in scored)
    _write(folder / "scored.jsonl", "".join(lines))
    _write(folder / "win_rates.csv", _csv_text(WinRateRow, table))
    _write(folder / "paired_tests.csv", _csv_text(PairedTest, tests))
    _write(folder / "win_rates.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def render_win_rates(table: Sequence[WinRateRow]) -> Table:
    """The table for a terminal: `rich.console.Console().print(render_win_rates(table))`."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title="Sentence-BERT win rates (wins among decided responses)")
    shown.add_column("model")
    confidence = f"{table[0].confidence:.0%} " if table else ""
    for name in ("temperature", "n", "win rate", f"{confidence}interval", "ties"):
        shown.add_column(name, justify="right")
    for name in ("mean margin", "truncated", "mean tokens"):
        shown.add_column(name, justify="right")
    for row, previous in zip(table, [None, *table], strict=False):
        if previous and row.kind != previous.kind:
            shown.add_section()
        # Text, not str: a name with brackets is a name, never markup.
        shown.add_row(Text(printable(row.model)), *_cells(row))
    return shown


class _Responder(NamedTuple):
    """Who responded: one line of the table."""

    kind: Kind
    model: str
    temperature: float | None


_Prompts = dict[int, list[ScoredGeneration]]
"""One responder's scored samples by prompt."""


def _by_responder(scored: Iterable[ScoredGeneration]) -> dict[_Responder, _Prompts]:
    responders: dict[_Responder, _Prompts] = {}
    for record in scored:
        responder = _Responder(record.kind, record.model, record.temperature)
        prompts = responders.setdefault(responder, defaultdict(list))
        prompts[record.prompt_index].append(record)
    return responders


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


def _win_share(prompts: _Prompts) -> float | None:
    """Wins among the decided responses; None where there is none."""
    verdicts = Counter(record.verdict for samples in prompts.values() for record in samples)
    decided = verdicts["win"] + verdicts["loss"]
    return verdicts["win"] / decided if decided else None


def _table_row(responder: _Responder, prompts: _Prompts, confidence: float) -> WinRateRow:
    records = [record for samples in prompts.values() for record in samples]
    decided = [record for record in records if record.verdict != "tie"]
    wins = sum(record.verdict == "win" for record in decided)
    if len(records) == len(prompts):
        interval = wilson_interval(wins, len(decided), confidence=confidence)
    else:
        interval = clustered_wilson_interval(
            [record.verdict == "win" for record in decided],
            [record.prompt_index for record in decided],
            confidence=confidence,
        )
    tokens = [record.num_tokens for record in records if record.num_tokens is not None]
    return WinRateRow(
        model=responder.model,
        kind=responder.kind,
        temperature=responder.temperature,
        num_prompts=len(prompts),
        n=len(records),
        wins=wins,
        losses=len(decided) - wins,
        ties=len(records) - len(decided),
        win_rate=_win_share(prompts),
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        mean_margin=float(np.mean([record.margin for record in records])),
        truncated_share=float(np.mean([record.truncated for record in records])),
        mean_tokens=_mean(tokens),
    )


def _compare(
    family: Family,
    a: _Responder,
    b: _Responder,
    responders: Mapping[_Responder, _Prompts],
    num_permutations: int,
    seed: int,
    confidence: float,
) -> PairedTest:
    prompts_a, prompts_b = responders[a], responders[b]
    shared = sorted(prompts_a.keys() & prompts_b.keys())
    shares = [
        (share_a, share_b)
        for i in shared
        if (share_a := _win_share({i: prompts_a[i]})) is not None
        and (share_b := _win_share({i: prompts_b[i]})) is not None
    ]
    differences = [share_a - share_b for share_a, share_b in shares]
    wins_only_a = sum(share_a > 0.5 > share_b for share_a, share_b in shares)
    wins_only_b = sum(share_b > 0.5 > share_a for share_a, share_b in shares)
    margin_differences = [_mean_margin(prompts_a[i]) - _mean_margin(prompts_b[i]) for i in shared]
    interval = paired_proportion_interval(differences, confidence=confidence)
    mcnemar_p = mcnemar_exact(wins_only_a, wins_only_b)
    permutation_p = paired_permutation(
        margin_differences, num_permutations=num_permutations, seed=seed
    )
    return PairedTest(
        family=family,
        model_a=a.model,
        model_b=b.model,
        temperature=a.temperature,
        num_prompts=len(shared),
        num_unshared=len(prompts_a.keys() ^ prompts_b.keys()),
        wins_only_a=wins_only_a,
        wins_only_b=wins_only_b,
        difference=_mean(differences),
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        mcnemar_p=mcnemar_p,
        mcnemar_p_holm=mcnemar_p,
        margin_difference=_mean(margin_differences),
        permutation_p=permutation_p,
        permutation_p_holm=permutation_p,
    )


def _with_holm(family: Sequence[PairedTest]) -> list[PairedTest]:
    mcnemar = holm([test.mcnemar_p for test in family])
    permutation = holm([test.permutation_p for test in family])
    return [
        replace(test, mcnemar_p_holm=p, permutation_p_holm=q)
        for test, p, q in zip(family, mcnemar, permutation, strict=True)
    ]


def _mean_margin(samples: Sequence[ScoredGeneration]) -> float:
    return sum(record.margin for record in samples) / len(samples)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _cells(row: WinRateRow) -> list[str]:
    return [
        "" if row.temperature is None else f"{row.temperature:g}",
        str(row.n),
        "-" if row.win_rate is None else f"{row.win_rate:.1%}",
        f"[{100 * row.low:.1f}, {100 * row.high:.1f}]",
        str(row.ties),
        f"{row.mean_margin:+.4f}",
        f"{row.truncated_share:.1%}" if row.kind == "model" else "",
        "" if row.mean_tokens is None else f"{row.mean_tokens:.1f}",
    ]


def _csv_text(
    kind: type[WinRateRow] | type[PairedTest], rows: Sequence[WinRateRow] | Sequence[PairedTest]
) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            # A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape.
            file.write(text.encode("utf-8", errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StorageError(f"{path}: cannot be written: {error.strerror}.") from error
