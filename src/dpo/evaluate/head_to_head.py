"""Head to head: which of two responders the judges prefer, with intervals and tests, as files.

The win rate is `wins / (wins + losses)`; ties are counted beside it, as in `winrate.py`. The prompt
is the unit: several samples of one prompt are one cluster in the interval, and one vote, by
majority, in the test.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpo.atomic import write_json, write_text
from dpo.core.stats import clustered_wilson_interval, holm, mcnemar_exact
from dpo.evaluate.agreement import Agreement, agreement_table
from dpo.evaluate.judges import Judge
from dpo.evaluate.matchups import JudgedMatchup, Matchup, judged
from dpo.evaluate.records import prompts_won
from dpo.evaluate.tables import csv_text
from dpo.evaluation_config import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadToHead:
    """One judge's verdicts on a against b, from the side of a.

    `win_rate` is None when nothing was decided. `sign_p` is the two-sided sign test that a prompt
    is as likely won as lost, over the prompts that one side wins by majority (McNemar's exact test
    of a and b); `sign_p_holm` is Holm's over the comparisons of the same judge and family.
    """

    judge: str
    family: Comparison
    a: str
    b: str
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
    prompts_won: int
    prompts_lost: int
    sign_p: float
    sign_p_holm: float


@dataclass(frozen=True, slots=True)
class Duels:
    """What the judges said: the table, their agreement, and every verdict."""

    table: list[HeadToHead]
    agreement: list[Agreement]
    judged: list[JudgedMatchup]


def hold_duels(judges: Sequence[Judge], matchups: Sequence[Matchup], folder: Path) -> Duels:
    """Ask every judge about every matchup and write what they say.

    Files: head_to_head.csv, agreement.csv (of two judges or more), matchups.jsonl (a verdict a
    line) and judges.json (what each judge is, and what came up while it judged).

    Raises:
        InputError: a judge cannot judge.
        StorageError: a file cannot be written.
    """
    said = [
        judged(judge.name, matchup, verdict)
        for judge in judges
        for matchup, verdict in zip(matchups, judge.compare(matchups), strict=True)
    ]
    duels = Duels(head_to_head_table(said), agreement_table(said), said)
    lines = (json.dumps(asdict(verdict), ensure_ascii=False) + "\n" for verdict in said)
    write_text(folder / "matchups.jsonl", "".join(lines))
    write_text(folder / "head_to_head.csv", csv_text(HeadToHead, duels.table))
    if len(judges) > 1:
        write_text(folder / "agreement.csv", csv_text(Agreement, duels.agreement))
    write_json(folder / "judges.json", {judge.name: judge.describe() for judge in judges})
    return duels


def head_to_head_table(
    verdicts: Iterable[JudgedMatchup], *, confidence: float = 0.95
) -> list[HeadToHead]:
    """One row for each judge and comparison, in order of appearance."""
    groups: dict[tuple[Any, ...], list[JudgedMatchup]] = {}
    for verdict in verdicts:
        key = (verdict.judge, verdict.family, verdict.a, verdict.b, verdict.temperature)
        groups.setdefault(key, []).append(verdict)
    return _with_holm([_row(members, confidence) for members in groups.values()])


def _row(verdicts: Sequence[JudgedMatchup], confidence: float) -> HeadToHead:
    first = verdicts[0]
    decided = [verdict for verdict in verdicts if verdict.verdict != "tie"]
    won = [verdict.verdict == "win" for verdict in decided]
    prompts = [verdict.prompt_index for verdict in decided]
    interval = clustered_wilson_interval(won, prompts, confidence=confidence)
    of_a, of_b = prompts_won(won, prompts)
    p = mcnemar_exact(of_a, of_b)
    return HeadToHead(
        judge=first.judge,
        family=first.family,
        a=first.a,
        b=first.b,
        temperature=first.temperature,
        num_prompts=len({verdict.prompt_index for verdict in verdicts}),
        n=len(verdicts),
        wins=sum(won),
        losses=len(won) - sum(won),
        ties=len(verdicts) - len(won),
        win_rate=sum(won) / len(won) if won else None,
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        prompts_won=of_a,
        prompts_lost=of_b,
        sign_p=p,
        sign_p_holm=p,
    )


def _with_holm(rows: list[HeadToHead]) -> list[HeadToHead]:
    """The rows with p-values adjusted within each judge and family, order kept."""
    families: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        families[row.judge, row.family].append(i)
    adjusted = list(rows)
    for members in families.values():
        for i, p in zip(members, holm([rows[i].sign_p for i in members]), strict=True):
            adjusted[i] = replace(rows[i], sign_p_holm=p)
    return adjusted
