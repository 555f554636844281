"""What an evaluation's generations are like, model by model, and which wins length explains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.core.diagnostics import (
    LengthControlled,
    distinct_share,
    length_controlled_win_rate,
    repeated_share,
)
from dpo.core.stats import (
    Interval,
    clustered_mean_interval,
    clustered_wilson_interval,
    paired_proportion_interval,
)
from dpo.errors import InputError
from dpo.evaluate.readings import (
    Diagnosis,
    Level,
    Reading,
    join,
    percent,
    percents,
    read_json_lines,
)

Record = dict[str, Any]
Place = tuple[str, float | None, int, int]
"""Model, temperature, prompt, sample: where a response stands."""

COSINES = "cosines"
"""The judge that is always there: the response whose cosine margin is the higher wins."""

WORSE = 0.05
"""A share of cut, empty or repeated text this far above the baseline's is warned of."""
HARDLY_ANY = 0.05
"""Where one side is the longer in fewer comparisons, equal length is an extrapolation."""


def health_of(records: Sequence[Record]) -> dict[str, float]:
    """Shares and lengths of generated texts; words are what stands between white space.

    `truncated` and `empty` are shares of the responses, `repeated_4grams` the mean share of a
    response's sequences of four words that occurred in it before, `distinct_2grams` that of all
    pairs of words that are different. Empty without a record.
    """
    if not records:
        return {}
    words = [record["generated"].split() for record in records]
    return {
        "n": len(records),
        "truncated": sum(record["truncated"] for record in records) / len(records),
        "empty": sum(not own for own in words) / len(records),
        "repeated_4grams": float(np.mean([repeated_share(own) for own in words])),
        "distinct_2grams": distinct_share(words, 2),
        "words": float(np.mean([len(own) for own in words])),
        "characters": float(np.mean([len(record["generated"]) for record in records])),
    }


def diagnose_evaluation(folder: Path) -> Diagnosis:
    """The diagnosis of an evaluation, from `scored.jsonl` and, where there is one,
    `matchups.jsonl`.

    The baseline is the model called sft (or SFT), or else the first.

    Raises:
        InputError: a file is damaged, or no model has responded.
    """
    scored = [r for r in read_json_lines(folder / "scored.jsonl") if r["kind"] == "model"]
    if not scored:
        raise InputError(f"{folder / 'scored.jsonl'}: there is no response of a model.")
    names = list(dict.fromkeys(record["model"] for record in scored))
    baseline = next((name for name in names if name.lower() == "sft"), names[0])
    health, readings = _generations(scored, names, baseline)
    controlled = length_controlled_table(folder, scored, baseline)
    numbers = {
        "baseline": baseline,
        "generations": health,
        "length_controlled": [row.as_numbers() for row in controlled],
    }
    return Diagnosis("evaluation", numbers, [*readings, *_read_controlled(controlled)])


# -- what they are like --------------------------------------------------------------------------


def _generations(
    scored: Sequence[Record], names: Sequence[str], baseline: str
) -> tuple[list[dict[str, Any]], list[Reading]]:
    """A row for each model and temperature, and what is remarkable about it beside the baseline."""
    rows = []
    for name in names:
        for temperature in dict.fromkeys(r["temperature"] for r in scored if r["model"] == name):
            rows.append(_health_row(scored, name, temperature, baseline))
    readings = [
        _read_share(rows, baseline, "truncated", "Cut generations", "cut by the token limit"),
        _read_share(rows, baseline, "empty", "Empty generations", "empty responses"),
        _read_share(rows, baseline, "repeated_4grams", "Repetition", "repeated four-word runs"),
        *_read_lengths(rows, baseline),
    ]
    return rows, readings


def _health_row(
    scored: Sequence[Record], name: str, temperature: float, baseline: str
) -> dict[str, Any]:
    own = [r for r in scored if r["model"] == name and r["temperature"] == temperature]
    prompts = [record["prompt_index"] for record in own]
    row: dict[str, Any] = {"model": name, "temperature": temperature, **health_of(own)}
    row["tokens"] = float(np.mean([record["num_tokens"] for record in own]))
    for share, is_so in (
        ("truncated", lambda r: r["truncated"]),
        ("empty", lambda r: not r["generated"].strip()),
    ):
        row[f"{share}_interval"] = clustered_wilson_interval([is_so(r) for r in own], prompts)
    others = {_place(r, baseline): r for r in scored if r["model"] == baseline}
    longer = [
        (record["num_tokens"] - others[place]["num_tokens"], record["prompt_index"])
        for record in own
        if (place := _place(record, baseline)) in others
    ]
    if name != baseline and longer:
        differences = [float(difference) for difference, _ in longer]
        row["tokens_longer"] = float(np.mean(differences))
        row["tokens_longer_interval"] = clustered_mean_interval(
            differences, [prompt for _, prompt in longer]
        )
    return row


def _place(record: Record, model: str) -> Place:
    return model, record["temperature"], record["prompt_index"], record["sample"]


def _read_share(
    rows: Sequence[dict[str, Any]], baseline: str, share: str, title: str, what: str
) -> Reading:
    """Who is worse than the baseline at the same temperature by more than `WORSE`."""
    at = {row["temperature"]: row[share] for row in rows if row["model"] == baseline}
    worse = [
        (row, usual)
        for row in rows
        if row[share] > (usual := at.get(row["temperature"], 0)) + WORSE
    ]
    if not worse:
        highest = max(row[share] for row in rows)
        return Reading("ok", title, f"At most {percent(highest)} {what}, of any model.")
    shown = [
        f"{row['model']} at temperature {row['temperature']:g} {percent(row[share])} against "
        f"{percent(usual)}"
        for row, usual in worse
    ]
    return Reading(
        "warning",
        title,
        f"More {what} than of {baseline}: {join(shown)}.",
        "Read some in scored.jsonl. A policy that has broken does this: take a larger loss.beta, "
        "fewer steps, or an earlier model (best/).",
    )


def _read_lengths(rows: Sequence[dict[str, Any]], baseline: str) -> list[Reading]:
    compared = [row for row in rows if "tokens_longer" in row]
    if not compared:
        return []
    other = [
        row
        for row in compared
        if not row["tokens_longer_interval"].low <= 0 <= row["tokens_longer_interval"].high
    ]
    if not other:
        sentence = f"No model's responses differ from {baseline}'s in length."
        return [Reading("ok", "Length of generations", sentence)]
    shown = [
        f"{row['model']} at temperature {row['temperature']:g}: {row['tokens_longer']:+.1f} "
        f"[{row['tokens_longer_interval'].low:+.1f}, {row['tokens_longer_interval'].high:+.1f}]"
        for row in other
    ]
    return [
        Reading(
            "note",
            "Length of generations",
            f"Tokens more or fewer than {baseline} on the same prompts: {join(shown)}. Judges "
            "often prefer a length.",
            "Read the length-controlled win rates beside the raw ones.",
        )
    ]


# -- wins and length -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlledRow:
    """The win rate of a over b, by one judge, raw and length-controlled; lengths in characters."""

    judge: str
    a: str
    b: str
    temperature: float | None
    raw_interval: Interval
    found: LengthControlled

    def as_numbers(self) -> dict[str, Any]:
        numbers = self.found._asdict()
        return {
            "judge": self.judge,
            "a": self.a,
            "b": self.b,
            "temperature": self.temperature,
            "n": numbers.pop("n"),
            "raw": numbers.pop("raw"),
            "raw_interval": self.raw_interval,
            **numbers,
        }


def length_controlled_table(
    folder: Path, scored: Sequence[Record], baseline: str
) -> list[ControlledRow]:
    """Every comparison of the judges' (`matchups.jsonl`: models, and models against the chosen
    response), and by the cosines each model against the baseline. Where no length differs there
    is no row.
    """
    verdicts: dict[tuple[str, str, str, float | None], list[tuple[float, float, int]]] = {}
    lengths = _lengths(scored)
    duels = [*read_json_lines(folder / "matchups.jsonl"), *_cosine_duels(scored, baseline)]
    for duel in duels:
        if duel["family"] not in ("models", "chosen"):
            continue
        a, b = (lengths(duel, duel[side]) for side in ("a", "b"))
        if a is not None and b is not None:
            key = (duel["judge"], duel["a"], duel["b"], duel["temperature"])
            outcome = {"win": 1.0, "tie": 0.5, "loss": 0.0}[duel["verdict"]]
            verdicts.setdefault(key, []).append((outcome, float(a - b), duel["prompt_index"]))
    rows = []
    for (judge, a_name, b_name, temperature), own in verdicts.items():
        outcomes, differences, prompts = (list(column) for column in zip(*own, strict=True))
        try:
            found = length_controlled_win_rate(outcomes, differences, prompts)
        except InputError:  # all of one length: nothing to control for
            continue
        rows.append(
            ControlledRow(
                judge=judge,
                a=a_name,
                b=b_name,
                temperature=temperature,
                raw_interval=_raw_interval(outcomes, prompts),
                found=found,
            )
        )
    return rows


def _raw_interval(outcomes: Sequence[float], prompts: Sequence[int]) -> Interval:
    """Of the mean outcome: Bonett and Price's of wins minus losses a prompt, taken back to [0, 1].
    It keeps a width where everything is won, and lets ties count half.
    """
    of_prompt: dict[int, list[float]] = {}
    for outcome, prompt in zip(outcomes, prompts, strict=True):
        of_prompt.setdefault(prompt, []).append(2 * outcome - 1)
    found = paired_proportion_interval([float(np.mean(own)) for own in of_prompt.values()])
    return Interval((found.low + 1) / 2, (found.high + 1) / 2)


def _lengths(scored: Sequence[Record]) -> Callable[[Record, str], int | None]:
    """The characters of a side's response in a comparison; None where it is not known."""
    of_place = {_place(r, r["model"]): len(r["generated"]) for r in scored}
    of_chosen = {r["prompt_index"]: len(r["chosen"]) for r in scored}

    def length(duel: Record, side: str) -> int | None:
        if side == "chosen":
            return of_chosen.get(duel["prompt_index"])
        return of_place.get(_place(duel, side))

    return length


def _cosine_duels(scored: Sequence[Record], baseline: str) -> list[Record]:
    """Each model's response against the baseline's at the same place: the higher margin wins."""
    others = {_place(r, baseline): r for r in scored if r["model"] == baseline}
    duels = []
    for record in scored:
        other = others.get(_place(record, baseline))
        if record["model"] != baseline and other is not None:
            gap = record["margin"] - other["margin"]
            duels.append(
                {
                    "judge": COSINES,
                    "family": "models",
                    "a": record["model"],
                    "b": baseline,
                    "temperature": record["temperature"],
                    "prompt_index": record["prompt_index"],
                    "sample": record["sample"],
                    "verdict": "win" if gap > 0 else "loss" if gap < 0 else "tie",
                }
            )
    return duels


def _read_controlled(rows: Sequence[ControlledRow]) -> list[Reading]:
    """One reading for each comparison in which length matters; one if there is none."""
    readings = [reading for row in rows if (reading := _read_one(row)) is not None]
    if readings or not rows:
        return readings
    sentence = f"None of the {len(rows)} comparisons turns when length is controlled for."
    return [Reading("ok", "Wins and length", sentence)]


def _read_one(row: ControlledRow) -> Reading | None:
    """What length has to do with who wins, where it has anything."""
    found = row.found
    at = "" if row.temperature is None else f" at temperature {row.temperature:g}"
    sentence = (
        f"{row.a} against {row.b}{at}, judged by {row.judge}: wins {percent(found.raw)} "
        f"{percents(row.raw_interval)}, at equal length {percent(found.win_rate)} "
        f"{percents(found.interval)}."
    )
    a_lost_it = row.raw_interval.low > 0.5 >= found.interval.low
    b_lost_it = row.raw_interval.high < 0.5 <= found.interval.high
    if a_lost_it or b_lost_it:
        better, worse = (row.a, row.b) if a_lost_it else (row.b, row.a)
        level: Level = "warning"
        sentence += f" At equal length {better} is not shown to be better than {worse}."
    elif min(found.longer, 1 - found.longer) < HARDLY_ANY:
        level = "note"
        sentence += (
            f" {row.a}'s response is the longer in {percent(found.longer)}, so equal length is "
            "hardly seen and the second number is an extrapolation."
        )
    else:
        return None
    todo = "Report both numbers. If length is part of what was asked for, the raw one counts."
    return Reading(level, "Wins and length", sentence, todo)
