"""Two responses to one prompt, side by side: what a judge is shown and what it says.

Four families of comparisons, each asked of every judge:

    chosen   each model's responses against the chosen one
    models   model against model: same prompt, same temperature, same sample
    nulls    the null responses against the chosen one: what knowing nothing earns
    labels   chosen against rejected: how often the judge agrees with the data

The last two are controls. A judge that a constant sentence wins over, or that does not see what the
labels see, says little in the first two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

from dpo.data.rows import PreferenceRow, Prompt
from dpo.evaluate.records import Generation, Verdict
from dpo.evaluation_config import Comparison

CHOSEN, REJECTED = "chosen", "rejected"
"""Names of the data's own responses as sides of a comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which comparison this is; `prompt_index` and `sample` are those of `Generation`."""

    family: Comparison
    a: str
    b: str
    temperature: float | None
    prompt_index: int
    sample: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Matchup:
    """Response a against response b, with the prompt and the prompt's preference pair."""

    place: Place
    prompt: Prompt
    response_a: str
    response_b: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedMatchup(Place):
    """What a judge said of one comparison: `verdict` is from the side of a."""

    judge: str
    verdict: Verdict


def judged(judge: str, matchup: Matchup, verdict: Verdict) -> JudgedMatchup:
    """The comparison with its verdict, without the texts."""
    return JudgedMatchup(**asdict(matchup.place), judge=judge, verdict=verdict)


def make_matchups(
    rows: Sequence[PreferenceRow],
    records: Sequence[Generation],
    families: Sequence[Comparison],
) -> list[Matchup]:
    """All comparisons of the families named, in their order.

    Args:
        rows: the evaluation set; a record's `prompt_index` is its row's place here.
        records: responses of models and null responses.
        families: which comparisons to make.
    """
    models = [record for record in records if record.kind == "model"]
    nulls = [record for record in records if record.kind == "null"]
    make = {
        "chosen": lambda: _against_chosen("chosen", rows, models),
        "models": lambda: _between_models(rows, models),
        "nulls": lambda: _against_chosen("nulls", rows, nulls),
        "labels": lambda: _labels(rows),
    }
    return [matchup for family in families for matchup in make[family]()]


def _against_chosen(
    family: Comparison, rows: Sequence[PreferenceRow], records: Sequence[Generation]
) -> Iterator[Matchup]:
    for record in records:
        chosen = rows[record.prompt_index].chosen
        yield _matchup(_place(family, record, CHOSEN), rows, record.generated, chosen)


def _between_models(
    rows: Sequence[PreferenceRow], records: Sequence[Generation]
) -> Iterator[Matchup]:
    """Every two models, where both have a response at the same place."""
    by_model: dict[str, dict[tuple[float | None, int, int], Generation]] = {}
    for record in records:
        here = (record.temperature, record.prompt_index, record.sample)
        by_model.setdefault(record.model, {})[here] = record
    for a, b in combinations(by_model, 2):
        for here, record in by_model[a].items():
            if here in by_model[b]:
                other = by_model[b][here].generated
                yield _matchup(_place("models", record, b), rows, record.generated, other)


def _labels(rows: Sequence[PreferenceRow]) -> Iterator[Matchup]:
    for i, row in enumerate(rows):
        place = Place(
            family="labels", a=CHOSEN, b=REJECTED, temperature=None, prompt_index=i, sample=0
        )
        yield _matchup(place, rows, row.chosen, row.rejected)


def _place(family: Comparison, record: Generation, opponent: str) -> Place:
    return Place(
        family=family,
        a=record.model,
        b=opponent,
        temperature=record.temperature,
        prompt_index=record.prompt_index,
        sample=record.sample,
    )


def _matchup(
    place: Place, rows: Sequence[PreferenceRow], response_a: str, response_b: str
) -> Matchup:
    row = rows[place.prompt_index]
    return Matchup(
        place=place,
        prompt=row.prompt,
        response_a=response_a,
        response_b=response_b,
        chosen=row.chosen,
        rejected=row.rejected,
    )
