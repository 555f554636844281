"""Judgements of people: written down one by one, read back, and summed up."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

from pydantic import TypeAdapter, ValidationError

from dpo.atomic import storage_errors
from dpo.core.stats import Interval, clustered_wilson_interval, mcnemar_exact
from dpo.data.files import printable
from dpo.errors import InputError
from dpo.evaluate.agreement import Agreement, agreement_table
from dpo.evaluate.arena.pairs import Side, first_problem
from dpo.evaluate.matchups import CHOSEN, JudgedMatchup
from dpo.evaluate.records import Verdict, prompts_won

JudgementVerdict = Literal["win", "loss", "tie", "skip"]

JUDGEMENTS = "judgements.jsonl"
"""In the first folder that an arena was held on, where nothing else is asked for."""

SENTENCE_BERT = "Sentence-BERT"
"""What a summary calls it, beside the names of annotators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What one person said about one pair: `verdict` is from a's side.

    Identical answers are a tie that nobody was shown: then `left` and `seconds` are None. A skip is
    no verdict; the pair is shown again at the next start. `sentence_bert` is what Sentence-BERT
    says about the pair, None where it was not asked. `timestamp` is ISO 8601, UTC.
    """

    pair: str
    prompt_digest: str
    a: str
    b: str
    temperature: float | None
    sample: int
    left: Side | None
    verdict: JudgementVerdict
    annotator: str
    seconds: float | None
    timestamp: str
    sentence_bert: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraction:
    """The annotator takes back what was said last about that pair."""

    retracts: str
    annotator: str
    timestamp: str


Event = Judgement | Retraction
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class JudgementFile:
    """A JSONL file that judgements are appended to, one writer at a time. No line is ever changed:
    to take a judgement back is another line.
    """

    def __init__(self, path: Path) -> None:
        """Open it, make it where there is none, and read what stands in it.

        Raises:
            InputError: another process writes to it, or a line of it is no judgement.
            StorageError: it cannot be written.
        """
        if path.suffix != ".jsonl":
            raise InputError(f"--out {_named(path)}: expected a name that ends in .jsonl.")
        self.path = path
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a+b", buffering=0)
        try:
            self._lock()
            events, torn = read_events(path)
            with storage_errors(path):
                self._end_last_line(torn)
        except BaseException:
            self.close()
            raise
        self.standing = standing_judgements(events)
        """What stood when it was opened."""

    def append(self, event: Event) -> None:
        """Write one line, whole or not at all; it is on the disk when this returns.

        Raises:
            StorageError: it cannot be written.
        """
        line = json.dumps(asdict(event)).encode() + b"\n"
        with storage_errors(self.path):
            end = self._stream.seek(0, os.SEEK_END)
            try:
                if self._stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._stream.fileno())
            except OSError:
                self._stream.truncate(end)
                raise

    def close(self) -> None:
        """Give the file back."""
        self._stream.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"--out {_named(self.path)}: another dpo arena is writing to it."
            ) from error

    def _end_last_line(self, torn: int) -> None:
        """Remove the torn bytes at the end, and end the line before them."""
        end = self._stream.seek(0, os.SEEK_END) - torn
        self._stream.truncate(end)
        if end:
            self._stream.seek(end - 1)
            if self._stream.read(1) != b"\n":
                self._stream.write(b"\n")


def read_events(path: Path) -> tuple[list[Event], int]:
    """Every line of a file of judgements, and the size in bytes of a last line that a killed
    process left torn: nobody was told that it was kept.

    Raises:
        InputError: the file cannot be read, or another line of it is no judgement.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{_named(path)}: cannot be read: {error.strerror}.") from error
    events: list[Event] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError as error:
            if events and number == len(lines):
                return events, len(line)
            raise InputError(
                f"{_named(path)}:{number}: not a line of dpo arena: {first_problem(error)}"
            ) from error
    return events, 0


def read_judgements(files: Sequence[Path]) -> list[Judgement]:
    """What stands in the files. Annotators of one name in several files are several people: the
    file's name is put behind theirs.

    Raises:
        InputError: a file cannot be read, or a line of it is no judgement.
    """
    of_files = [(file, standing_judgements(read_events(file)[0])) for file in files]
    found = Counter(name for _, standing in of_files for name in {x.annotator for x in standing})
    return [
        replace(x, annotator=f"{x.annotator} ({_named(file)})") if found[x.annotator] > 1 else x
        for file, standing in of_files
        for x in standing
    ]


def standing_judgements(events: Iterable[Event]) -> list[Judgement]:
    """What stands after all that was said and taken back, in the order in which it was said; about
    a pair, an annotator's last word counts.
    """
    standing: dict[tuple[str, str], Judgement] = {}
    for event in events:
        if isinstance(event, Retraction):
            standing.pop((event.annotator, event.retracts), None)
        else:
            standing.pop((event.annotator, event.pair), None)  # so that it goes to the end
            standing[event.annotator, event.pair] = event
    return list(standing.values())


def _named(path: Path) -> str:
    return printable(str(path), limit=1000)


# -- summing up ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """A proportion with its 95% interval over prompts; `value` is None where n is 0."""

    value: float | None
    interval: Interval
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What people said about a against b. Ties and skips are no part of the win rate."""

    a: str
    b: str
    annotators: tuple[str, ...]
    num_prompts: int
    wins: int
    losses: int
    ties: int
    identical: int
    """Pairs with identical answers, which nobody was shown; not counted in `ties`."""
    skipped: int
    win_rate: Share
    prompts_a: int
    """Prompts to which a wins more often than it loses."""
    prompts_b: int
    sign_test_p: float
    left_wins: Share
    """How often the answer on the left won; 50% without a position bias."""
    median_seconds: float | None
    agreements: tuple[Agreement, ...]


def summarise(judgements: Iterable[Judgement]) -> list[Summary]:
    """One summary for each two responders that were compared, in order of appearance."""
    compared: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        compared[judgement.a, judgement.b].append(judgement)
    return [summary_of(a, b, members) for (a, b), members in compared.items()]


def summary_of(a: str, b: str, judgements: Sequence[Judgement]) -> Summary:
    """The summary of judgements that are all of a against b.

    The prompt is the unit: intervals are clustered by it, and the sign test counts the prompts that
    a wins more often than it loses against those that it loses more often.
    """
    seen = [x for x in judgements if x.left is not None and x.verdict != "skip"]
    decided = [x for x in seen if x.verdict != "tie"]
    prompts = [x.prompt_digest for x in decided]
    won = [x.verdict == "win" for x in decided]
    for_a, for_b = prompts_won(won, prompts)
    seconds = [x.seconds for x in seen if x.seconds is not None]
    verdicts = Counter(x.verdict for x in seen)
    return Summary(
        a=a,
        b=b,
        annotators=tuple(dict.fromkeys(x.annotator for x in seen)),
        num_prompts=len({x.prompt_digest for x in seen}),
        wins=verdicts["win"],
        losses=verdicts["loss"],
        ties=verdicts["tie"],
        identical=len({x.pair for x in judgements if x.left is None}),
        skipped=sum(x.verdict == "skip" for x in judgements),
        win_rate=_share(won, prompts),
        prompts_a=for_a,
        prompts_b=for_b,
        sign_test_p=mcnemar_exact(for_a, for_b),
        left_wins=_share([(x.verdict == "win") == (x.left == "a") for x in decided], prompts),
        median_seconds=statistics.median(seconds) if seconds else None,
        agreements=tuple(_agreements(seen)),
    )


def _share(successes: Sequence[bool], prompts: Sequence[Hashable]) -> Share:
    n = len(successes)
    value = sum(successes) / n if n else None
    return Share(value, clustered_wilson_interval(successes, prompts), n)


def _agreements(seen: Sequence[Judgement]) -> list[Agreement]:
    """Annotators with each other, and each with Sentence-BERT where it has a verdict."""
    prompts = _numbered(x.prompt_digest for x in seen)
    pairs = _numbered(x.pair for x in seen)

    def said(judge: str, verdict: str, x: Judgement) -> JudgedMatchup:
        return JudgedMatchup(
            judge=judge,
            verdict=cast(Verdict, verdict),
            family="chosen" if CHOSEN in (x.a, x.b) else "models",
            a=x.a,
            b=x.b,
            temperature=x.temperature,
            prompt_index=prompts[x.prompt_digest],
            sample=pairs[x.pair],  # texts that changed in between are not the same comparison
        )

    people = [said(x.annotator, x.verdict, x) for x in seen]
    machine = [said(SENTENCE_BERT, x.sentence_bert, x) for x in seen if x.sentence_bert]
    return agreement_table([*people, *machine])


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def describe(summary: Summary) -> list[tuple[str, str]]:
    """The summary as labels with their values, for a terminal and for the page."""
    a, b = printable(summary.a), printable(summary.b)
    lines = [
        (f"Win rate of {a} against {b}", _percent(summary.win_rate)),
        (
            "Verdicts",
            f"{summary.wins} won, {summary.losses} lost, {summary.ties} tied, on "
            f"{summary.num_prompts} prompts; ties are no part of the win rate",
        ),
        (
            "Sign test over prompts",
            f"{summary.prompts_a} to {a}, {summary.prompts_b} to {b}, "
            f"p = {summary.sign_test_p:.3f}",
        ),
        ("Answer on the left won", _percent(summary.left_wins) + "; 50% without a position bias"),
    ]
    if summary.identical:
        lines.append(
            ("Identical answers", f"{summary.identical} pairs, not shown: ties by themselves")
        )
    if summary.skipped:
        lines.append(("Skipped", f"{summary.skipped}; shown again at the next start"))
    if summary.median_seconds is not None:
        lines.append(("Median time for a pair", f"{summary.median_seconds:.1f} s"))
    for x in summary.agreements:
        lines.append((f"{printable(x.judge_a)} and {printable(x.judge_b)} agree", _agreed(x)))
    return lines


def _agreed(row: Agreement) -> str:
    """`80.0% of 30 pairs; Cohen's kappa 0.61 [0.32, 0.83]`, over win, loss and tie."""
    if row.agreement is None:
        return "no pair judged by both"
    text = f"{row.agreement:.1%} of {row.n} pairs"
    if row.kappa is not None:
        text += f"; Cohen's kappa {row.kappa:.2f}"
    if row.low is not None and row.high is not None:
        text += f" [{row.low:.2f}, {row.high:.2f}]"
    return text


def _percent(share: Share) -> str:
    """`61.5% [55.0, 67.7], n = 220`."""
    if share.value is None:
        return "nothing decided"
    low, high = share.interval
    return f"{share.value:.1%} [{100 * low:.1f}, {100 * high:.1f}], n = {share.n}"
