"""From folders of evaluations and runs to pairs of answers, in the order in which a person sees
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from dpo.data.files import Problem, existing, printable, read_file
from dpo.data.split import prompt_digest
from dpo.errors import InputError
from dpo.evaluate.matchups import CHOSEN, REJECTED
from dpo.evaluate.records import ScoredGeneration, Verdict
from dpo.evaluate.sbert import TIE_TOLERANCE

T = TypeVar("T")

Side = Literal["a", "b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one responder said to one prompt.

    An answer without a temperature (the data's, a null response) stands against any other to its
    prompt. `margin` is the Sentence-BERT score, cos(answer, chosen) - cos(answer, rejected), where
    it was measured.
    """

    responder: str
    temperature: float | None
    sample: int
    prompt: str
    text: str
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responders' answers to the same prompt, at the same temperature and sample."""

    a: Answer
    b: Answer

    @property
    def prompt(self) -> str:
        return self.a.prompt

    @property
    def prompt_digest(self) -> str:
        """Equal for prompts that are equal up to case and white space: one cluster."""
        return f"{prompt_digest(self.prompt):016x}"

    @property
    def sampled(self) -> Answer:
        """The one of the two that says at which temperature and sample they meet."""
        return self.b if self.a.temperature is None else self.a

    @property
    def id(self) -> str:
        """A digest of all that is compared: other weights make other answers, hence another id."""
        answers = [[x.responder, x.text] for x in (self.a, self.b)]
        return _digest(self.prompt, self.sampled.temperature, self.sampled.sample, answers)[:16]

    @property
    def identical(self) -> bool:
        """Whether a reader sees no difference."""
        return self.a.text.strip() == self.b.text.strip()

    @property
    def sentence_bert(self) -> Verdict | None:
        """The better answer by Sentence-BERT, from a's side; None where one was not scored."""
        if self.a.margin is None or self.b.margin is None:
            return None
        difference = self.a.margin - self.b.margin
        if abs(difference) <= TIE_TOLERANCE:
            return "tie"
        return "win" if difference > 0 else "loss"

    def left(self, seed: int) -> Side:
        """Which answer stands on the left: a fair coin, a function of the seed and the pair."""
        return "a" if _rank(seed, "side", self.id) < 0.5 else "b"


def read_answers(folders: Sequence[Path]) -> list[Answer]:
    """Every answer that the folders hold, the data's own included.

    A folder of `dpo evaluate` (with `scored.jsonl`) names its responders; a run (with
    `samples/final.jsonl`) is a responder by the name of its folder as it was given.

    Raises:
        InputError: a folder is neither, or a file of it cannot be used.
    """
    answers: list[Answer] = []
    for folder in folders:
        if existing(folder) is None:
            raise InputError(f"{printable(str(folder), limit=1000)}: there is no such folder.")
        if (folder / "scored.jsonl").is_file():
            answers += _of_evaluation(folder / "scored.jsonl")
        elif (folder / "samples" / "final.jsonl").is_file():
            answers += _of_run(folder)
        else:
            raise InputError(
                f"{printable(str(folder), limit=1000)}: expected scored.jsonl of an evaluation "
                "(dpo evaluate), or samples/final.jsonl of a run (evaluation.num_samples above 0)."
            )
    return answers


def choose_responders(answers: Iterable[Answer], a: str | None, b: str | None) -> tuple[str, str]:
    """The two to compare: as named, and otherwise the models, where no choice is left; a single
    model stands against the chosen responses.

    Raises:
        InputError: a choice is left, nobody is called so, or both are one.
    """
    known: dict[str, bool] = {}  # responder -> whether it is a model
    for answer in answers:
        known[answer.responder] = answer.temperature is not None
    names = ", ".join(map(repr, known))
    for option, name in (("--a", a), ("--b", b)):
        if name is not None and name not in known:
            raise InputError(f"{option}: nobody is called {name!r}; there are {names}.")
    free = [name for name, model in known.items() if model and name not in (a, b)]
    missing = [a, b].count(None)
    if len(free) < missing and CHOSEN in known and CHOSEN not in (a, b):
        free.append(CHOSEN)
    if missing and len(free) != missing:
        raise InputError(f"--a, --b: name the two to compare, among {names}.")
    first, second = (free.pop(0) if name is None else name for name in (a, b))
    if first == second:
        raise InputError(f"--a, --b: both are {first!r}; name two.")
    return first, second


def make_pairs(
    answers: Iterable[Answer], a: str, b: str, *, temperature: float | None = None
) -> list[Pair]:
    """The answers of a and b that meet: same prompt, temperature and sample.

    Args:
        temperature: only this one; all by default.

    Raises:
        InputError: none meet, or a responder answers one prompt twice.
    """
    answers = list(answers)
    of_a, of_b = _by_place(answers, a), _by_place(answers, b)
    places = dict.fromkeys([*of_a, *of_b])
    met = ((_at(of_a, place), _at(of_b, place)) for place in places)
    pairs = [Pair(x, y) for x, y in met if x is not None and y is not None]
    if not pairs:
        raise InputError(
            f"{a!r} and {b!r} answer no prompt at the same temperature and sample; evaluate both "
            "on the same prompts."
        )
    there = sorted({t for pair in pairs if (t := pair.sampled.temperature) is not None})
    if temperature is None:
        return pairs
    if temperature not in there:
        known = ", ".join(f"{t:g}" for t in there) or "none"
        raise InputError(f"--temperature {temperature:g}: {a!r} and {b!r} meet at {known}.")
    return [pair for pair in pairs if pair.sampled.temperature == temperature]


def deal(pairs: Sequence[Pair], *, seed: int, max_prompts: int | None = None) -> list[Pair]:
    """The pairs of at most so many prompts, in a seeded order: one pair of every prompt, then a
    second of every prompt, and so on.

    The prompt is the unit of independence, so whoever stops early has judged as many as can be.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: _rank(seed, "order", pair.id)):
        by_prompt.setdefault(pair.prompt_digest, []).append(pair)
    prompts = sorted(by_prompt, key=lambda digest: _rank(seed, "prompt", digest))[:max_prompts]
    rounds = zip_longest(*(by_prompt[digest] for digest in prompts))
    return [pair for of_round in rounds for pair in of_round if pair is not None]


# -- reading folders -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sample:
    """What we need of a line of `samples/final.jsonl`; only pairs have chosen and rejected."""

    prompt: str
    generated: str
    chosen: str | None = None
    rejected: str | None = None


def _read(path: Path, kind: type[T]) -> list[tuple[str, T]]:
    """Every line of a JSONL file with its place (`scored.jsonl:7`), its fields checked."""
    check: TypeAdapter[T] = TypeAdapter(kind)
    rows: list[tuple[str, T]] = []
    for entry in read_file(path).entries:
        if isinstance(entry, Problem):
            raise InputError(str(entry))
        try:
            rows.append((entry.source, check.validate_python(entry.values)))
        except ValidationError as error:
            raise InputError(f"{entry.source}: {first_problem(error)}") from error
    return rows


def first_problem(error: ValidationError) -> str:
    """What is wrong with a line, as a sentence: `margin: input should be a valid number.`"""
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].lower()
    return f"{key}: {message}." if key else f"{message}."


def _of_evaluation(file: Path) -> list[Answer]:
    answers: list[Answer] = []
    for source, row in _read(file, ScoredGeneration):
        if row.model in (CHOSEN, REJECTED):
            raise InputError(f"{source}: {row.model!r} stands for the data's; rename the model.")
        answers.append(
            Answer(
                responder=row.model,
                temperature=row.temperature,
                sample=row.sample,
                prompt=row.prompt,
                text=row.generated,
                margin=row.margin,
            )
        )
        answers += _of_the_data(row.prompt, row.chosen, row.rejected)
    return answers


def _of_run(folder: Path) -> list[Answer]:
    temperature = _sample_temperature(folder / "config.json")
    answers: list[Answer] = []
    for _, row in _read(folder / "samples" / "final.jsonl", _Sample):
        answers.append(
            Answer(
                responder=str(folder),
                temperature=temperature,
                sample=0,
                prompt=row.prompt,
                text=row.generated,
            )
        )
        answers += _of_the_data(row.prompt, row.chosen, row.rejected)
    return answers


def _of_the_data(prompt: str, chosen: str | None, rejected: str | None) -> list[Answer]:
    return [
        Answer(responder=name, temperature=None, sample=0, prompt=prompt, text=text)
        for name, text in ((CHOSEN, chosen), (REJECTED, rejected))
        if text is not None
    ]


def _sample_temperature(file: Path) -> float:
    """At which temperature a run's samples were drawn, by its own configuration."""
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        return float(config["evaluation"]["sample_temperature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: expected a run's configuration with evaluation.sample_temperature."
        ) from error


# -- pairing ---------------------------------------------------------------------------------------

_Place = tuple[str, float | None, int]
"""Prompt, temperature, sample."""


def _by_place(answers: Iterable[Answer], responder: str) -> dict[_Place, Answer]:
    places: dict[_Place, Answer] = {}
    for answer in answers:
        if answer.responder != responder:
            continue
        place = (answer.prompt, answer.temperature, answer.sample)
        if places.setdefault(place, answer).text != answer.text:
            at = "" if answer.temperature is None else f" at temperature {answer.temperature:g}"
            raise InputError(
                f"{responder!r} has two different answers{at} to {printable(answer.prompt)!r}; "
                "give folders in which it has one."
            )
    return places


def _at(places: dict[_Place, Answer], place: _Place) -> Answer | None:
    """The answer there; failing that, the one that stands against any to the prompt."""
    prompt, _, _ = place
    return places.get(place) or places.get((prompt, None, 0))


# -- chance that is a function of a seed -----------------------------------------------------------


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _rank(seed: int, use: str, name: str) -> float:
    """Uniform in [0, 1), independent for each use and name."""
    return int(_digest(seed, use, name)[:16], 16) / 2**64
