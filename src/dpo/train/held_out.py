"""`held_out.csv`: what a run's held-out pairs were given at its last evaluation."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo import atomic
from dpo.data.tokenize import Encoder, TokenSequence
from dpo.errors import InputError
from dpo.train.encoded import Encoded, EncodedPair, EncodedRanking
from dpo.train.run import Run

HELD_OUT = "held_out.csv"
DISPLACED = "displaced.jsonl"
NUM_DISPLACED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPair:
    """One preferred and one other response to a held-out prompt.

    Log-probabilities are sums over a response's tokens, in nats: of the policy, of the reference
    that the loss compares it with (None without one), and of the policy before the first step (None
    where a run was begun by a version that did not write this file).
    """

    row: int
    """Number of the row among the held-out rows, from 0; all pairs of a ranking share it."""
    source: str
    """Where the row was read from: `prefs.jsonl:417`."""
    subset: str
    """Empty where the data has no such column."""
    prompt: int
    """Equal for pairs of equal prompts."""
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    """Scored tokens, the end token included."""
    overlap: float
    """Share of the tokens that the two responses have in common (`token_overlap`)."""
    chosen_logp: float
    rejected_logp: float
    reference_chosen_logp: float | None
    reference_rejected_logp: float | None
    start_chosen_logp: float | None
    start_rejected_logp: float | None

    @property
    def chosen_change(self) -> float:
        """How much training changed the chosen response's log-probability, in nats: against the
        policy before the first step, or against the reference where that is not known; else NaN.
        """
        return _change(self.chosen_logp, self.start_chosen_logp, self.reference_chosen_logp)

    @property
    def rejected_change(self) -> float:
        """The same of the rejected response."""
        return _change(self.rejected_logp, self.start_rejected_logp, self.reference_rejected_logp)


def _change(now: float, start: float | None, reference: float | None) -> float:
    before = reference if start is None else start
    return math.nan if before is None else now - before


# -- from a batch to pairs -----------------------------------------------------------------------


def sequence_logps(tensors: dict[str, Tensor], model: str) -> Tensor | None:
    """The log-probabilities, (S,), that `Kind.tensors` has put under names of `model`, in the order
    of `Kind.sequences`; None where there are none.
    """
    if f"{model}_chosen_logps" in tensors:
        return torch.cat([tensors[f"{model}_{side}_logps"] for side in ("chosen", "rejected")])
    values = tensors.get(f"{model}_logps")
    if values is None:
        return None
    return values[tensors["mask"]] if "mask" in tensors else values


def compared(rows: Sequence[Encoded]) -> list[tuple[int, int, int]]:
    """(row, place of the preferred response, place of the other) of every pair, places among the
    sequences of all rows.

    Of a ranking, all pairs that are strictly ordered. Judged responses are paired within a prompt:
    its first desirable with its first undesirable one, and so on; what is left has no pair.
    """
    found: list[tuple[int, int, int]] = []
    start = 0
    judged: dict[tuple[int, ...], dict[bool, list[int]]] = defaultdict(
        lambda: {True: [], False: []}
    )
    for number, row in enumerate(rows):
        if isinstance(row, EncodedPair):  # all chosen come before all rejected
            found.append((number, number, len(rows) + number))
        elif isinstance(row, EncodedRanking):
            places = combinations(range(len(row.ranks)), 2)
            found += [
                (number, start + better, start + worse)
                for better, worse in places
                if row.ranks[better] < row.ranks[worse]
            ]
            start += len(row.ranks)
        else:
            judged[_prompt(row.sequence)][row.desirable].append(number)
    for of_prompt in judged.values():
        pairs = zip(of_prompt[True], of_prompt[False], strict=False)
        found += [(desirable, desirable, other) for desirable, other in pairs]
    return sorted(found)


def held_out_pairs(
    rows: Sequence[Encoded],
    sequences: Sequence[TokenSequence],
    policy: Mapping[int, float],
    reference: Mapping[int, float],
) -> list[HeldOutPair]:
    """The pairs of encoded rows.

    Args:
        sequences: of all rows, `Kind.sequences(rows)`.
        policy: the log-probability of each, by its place.
        reference: the same, or empty.
    """
    prompts: dict[tuple[int, ...], int] = {}
    found = []
    for number, better, worse in compared(rows):
        row, chosen, rejected = rows[number], sequences[better], sequences[worse]
        prompt = prompts.setdefault(_prompt(chosen), len(prompts))
        found.append(
            HeldOutPair(
                row=number,
                source=row.source,
                subset=row.subset,
                prompt=prompt,
                prompt_tokens=chosen.prompt_length,
                chosen_tokens=chosen.num_scored,
                rejected_tokens=rejected.num_scored,
                overlap=token_overlap(_response(chosen), _response(rejected)),
                chosen_logp=policy[better],
                rejected_logp=policy[worse],
                reference_chosen_logp=reference.get(better),
                reference_rejected_logp=reference.get(worse),
                start_chosen_logp=None,
                start_rejected_logp=None,
            )
        )
    return found


def token_overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Dice's coefficient of two bags of tokens, in [0, 1]: `2 |a ∩ b| / (|a| + |b|)`.

    Dice 1945. A cheap stand-in for how alike two responses are to the model.

    >>> token_overlap([1, 2, 2, 3], [2, 3, 4, 5])
    0.5
    """
    shared = (Counter(a) & Counter(b)).total()
    return 2 * shared / (len(a) + len(b))


def _prompt(sequence: TokenSequence) -> tuple[int, ...]:
    return sequence.ids[: sequence.prompt_length]


def _response(sequence: TokenSequence) -> tuple[int, ...]:
    return sequence.ids[sequence.prompt_length :]


# -- the file ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutFile:
    """Writes `held_out.csv` of a run, anew at every evaluation."""

    run: Run

    def write(self, pairs: Sequence[HeldOutPair]) -> None:
        """The pairs, with the log-probabilities of the first evaluation beside those of this one.

        A resumed run does not evaluate its start again, so these are carried from file to file.

        Raises:
            StorageError: the file cannot be written.
        """
        if not pairs or not self.run.writes:
            return
        if any("eval/loss" in row for row in self.run.metrics()):
            first = [(p.start_chosen_logp, p.start_rejected_logp) for p in self._before(pairs)]
        else:
            first = [(pair.chosen_logp, pair.rejected_logp) for pair in pairs]
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for pair, start in zip(pairs, first, strict=True):
            names = ("start_chosen_logp", "start_rejected_logp")
            writer.writerow(asdict(pair) | dict(zip(names, start, strict=True)))
        atomic.write_text(self.run.folder / HELD_OUT, text.getvalue())

    def _before(self, pairs: Sequence[HeldOutPair]) -> Sequence[HeldOutPair]:
        """The pairs of the evaluation before; without their file, pairs that know of no start."""
        known = read_held_out(self.run.folder)
        return known if len(known) == len(pairs) else pairs


_COLUMNS = [field.name for field in fields(HeldOutPair)]
_INTEGERS = {"row", "prompt", "prompt_tokens", "chosen_tokens", "rejected_tokens"}
_TEXTS = {"source", "subset"}


def read_held_out(folder: Path) -> list[HeldOutPair]:
    """The pairs of a run directory; empty where it has no such file.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / HELD_OUT
    if not file.is_file():
        return []
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if reader.fieldnames != _COLUMNS:
                raise ValueError("other columns")
            return [HeldOutPair(**_parsed(row)) for row in reader]
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: expected the held-out pairs of a run; it is damaged.") from error


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    def value(name: str, text: str) -> object:
        if name in _TEXTS:
            return text
        if name in _INTEGERS:
            return int(text)
        return float(text) if text else None

    return {name: value(name, text) for name, text in row.items()}


def write_displaced(
    folder: Path, encoder: Encoder, rows: Sequence[Encoded], sequences: Sequence[TokenSequence]
) -> None:
    """The pairs whose chosen response lost the most, as the model read them, worst first, in
    `samples/displaced.jsonl`: the file to look at where a run is warned of displacement.
    """
    pairs = [
        (pair, sequences[better], sequences[worse])
        for pair, (_, better, worse) in zip(read_held_out(folder), compared(rows), strict=False)
        if math.isfinite(pair.chosen_change)
    ]
    lines = []
    for pair, chosen, rejected in sorted(pairs, key=lambda p: p[0].chosen_change)[:NUM_DISPLACED]:
        line = {
            "row": pair.row,
            "source": pair.source,
            "chosen_change": pair.chosen_change,
            "rejected_change": pair.rejected_change,
            "overlap": pair.overlap,
            "prompt": encoder.decode(_prompt(chosen)),
            "chosen": encoder.decode(_response(chosen)),
            "rejected": encoder.decode(_response(rejected)),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if lines:
        (folder / "samples").mkdir(exist_ok=True)
        atomic.write_text(folder / "samples" / DISPLACED, "".join(lines))
