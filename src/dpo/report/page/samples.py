"""Samples side by side: what was asked, what the data answers, and what each model answers.

A page holds a bounded number of them, whole prompts only, and says how many it leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.data.files import page_text
from dpo.report.page.folders import Record, number, read_jsonl
from dpo.train.reward import SCORED

MAX_RESPONSES = 2_000
"""Responses of models in one page, at most."""

MAX_CHARACTERS = 3_000_000
"""Characters of all texts in one page, at most."""

GENERATIONS = "samples/final.jsonl"
"""In a run's folder: what its last model answers."""

MAX_TEXT = 20_000
"""Characters of a single text that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One answer to a prompt: the data's own (`name` is "chosen", "rejected", ...) or a model's."""

    name: str
    text: str
    given: bool = False
    temperature: str = ""
    verdict: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with its answers."""

    prompt: str
    responses: Sequence[Response]


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a page, and where those are that it leaves out."""

    samples: Sequence[Sample]
    num_prompts: int
    """Of all samples, those left out included."""
    source: str
    """Where all are, relative to the page."""

    @property
    def models(self) -> list[str]:
        """The names of the models, in order of appearance."""
        return _distinct(r.name for r in self._answers())

    @property
    def temperatures(self) -> list[str]:
        return sorted(_distinct(r.temperature for r in self._answers()), key=number)

    @property
    def shown_first(self) -> str:
        """The temperature whose responses are shown before another is asked for."""
        known = self.temperatures
        return "1" if "1" in known else known[-1] if known else ""

    @property
    def verdicts(self) -> list[str]:
        return sorted(_distinct(r.verdict for r in self._answers()))

    def _answers(self) -> Iterator[Response]:
        return (r for sample in self.samples for r in sample.responses if not r.given)

    def origin(self) -> str:
        """Where they are from, and how many of them the page leaves out."""
        if self.num_prompts <= len(self.samples):
            return f"All of {self.source}."
        return (
            f"The page holds {len(self.samples):,} of {self.num_prompts:,} prompts (at most "
            f"{MAX_RESPONSES:,} responses); all are in {self.source}."
        )

    def as_json(self) -> str:
        """The samples for the page's script, inside a `<script>` that is data.

        ASCII only, and no `<`, `>` or `&`: no text can end the element, open a comment or hold a
        line separator, whatever it says.
        """
        value = [
            {
                "prompt": page_text(sample.prompt),
                "responses": [
                    {
                        "name": page_text(r.name),
                        "text": page_text(r.text),
                        "given": r.given,
                        "temperature": r.temperature,
                        "verdict": r.verdict,
                        "note": page_text(r.note),
                    }
                    for r in sample.responses
                ],
            }
            for sample in self.samples
        ]
        text = json.dumps(value, separators=(",", ":"))
        for character in "<>&":
            text = text.replace(character, f"\\u{ord(character):04x}")
        return text


def of_evaluation(folder: Path) -> Samples | None:
    """The responses of an evaluation by prompt; None where there is none.

    Null responses are left out: they are the same sentences everywhere. The file is read twice,
    so that what is left out is never in memory.
    """
    file = folder / "scored.jsonl"
    sizes: dict[int, list[int]] = {}
    for record in _responses_of_models(file):
        size = sizes.setdefault(record["prompt_index"], [0, 0])
        size[0] += 1
        size[1] += len(record["generated"])
    kept = set(_fitting(sizes))
    prompts: dict[int, Record] = {}
    answers: dict[int, list[Response]] = {}
    for record in _responses_of_models(file):
        index = record["prompt_index"]
        if index in kept:
            prompts.setdefault(index, record)
            answers.setdefault(index, []).append(_scored_response(record))
    if not prompts:
        return None
    samples = [
        Sample(_cut(record["prompt"]), [*_of_data(record), *answers[index]])
        for index, record in sorted(prompts.items())
    ]
    return Samples(samples, len(sizes), file.name)


def _responses_of_models(file: Path) -> Iterator[Record]:
    with suppress(OSError), file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and record.get("kind") == "model":
                    yield record


def _scored_response(record: Record) -> Response:
    notes = [f"cosine to chosen {record['cos_chosen']:.3f}, rejected {record['cos_rejected']:.3f}"]
    if record.get("truncated"):
        notes.append("cut at the token limit")
    return Response(
        name=str(record["model"]),
        text=_cut(record["generated"]),
        temperature=f"{record['temperature']:g}",
        verdict=str(record["verdict"]),
        note="; ".join(notes),
    )


def of_run(folder: Path, name: str) -> Samples | None:
    """What a run left in `samples/`: generations, scored held-out rows, or the last round."""
    generations = generations_of_run(folder, name)
    if generations:
        return within_limits(generations, GENERATIONS)
    rated = [folder / "samples" / SCORED, *sorted(folder.glob("samples/round-*.jsonl"))[-1:]]
    for file in rated:
        found = [sample for line in read_jsonl(file) if (sample := _rated(line)) is not None]
        if found:
            return within_limits(found, file.relative_to(folder).as_posix())
    return None


def generations_of_run(folder: Path, name: str) -> list[Sample]:
    """What the run's last model answered to held-out prompts, under the name given."""
    return [
        _generated(line, name) for line in read_jsonl(folder / GENERATIONS) if "generated" in line
    ]


def within_limits(samples: Sequence[Sample], source: str) -> Samples | None:
    """The first samples that fit into a page; None where there is none."""
    kept = _fitting({i: _size(sample) for i, sample in enumerate(samples)})
    return Samples([samples[i] for i in kept], len(samples), source) if kept else None


def _generated(line: Record, name: str) -> Sample:
    """A prompt with what the data has for it and what the model said."""
    note = "cut at the token limit" if line.get("truncated") else ""
    answer = Response(name=name, text=_cut(line["generated"]), note=note)
    return Sample(_prompt(line), [*_of_data(line), answer])


def _of_data(line: Mapping[str, Any]) -> list[Response]:
    """The data's own answers, under the names of its fields."""
    found = [
        Response(name=name, text=_cut(line[name]), given=True)
        for name in ("chosen", "rejected", "response")
        if name in line
    ]
    if "completion" in line:
        name = "desirable" if line.get("label") else "undesirable"
        found.append(Response(name=name, text=_cut(line["completion"]), given=True))
    found += [
        Response(name=f"ranked {rank}", text=_cut(text), given=True)
        for rank, text in enumerate(line.get("responses", ()), 1)
    ]
    return found


def _rated(line: Record) -> Sample | None:
    """A prompt with responses and the reward of each, best first."""
    texts = line.get("responses")
    rewards = line.get("rewards") or line.get("scores")
    if not texts or not rewards or len(texts) != len(rewards):
        return None
    ranks = line.get("ranks", range(len(texts)))
    verdict = ""
    if "ranks" in line and len(texts) == 2 and ranks[0] != ranks[1]:
        preferred, other = (rewards[0], rewards[1]) if ranks[0] < ranks[1] else rewards[::-1]
        verdict = "right" if preferred > other else "wrong" if preferred < other else "tie"
    responses = [
        Response(name=f"rank {rank + 1}", text=_cut(text), verdict=verdict, note=f"reward {r:+.3f}")
        for rank, text, r in zip(ranks, texts, rewards, strict=True)
    ]
    return Sample(_prompt(line), responses)


def _prompt(line: Record) -> str:
    """A prompt as text; a conversation with who says what."""
    prompt = line.get("prompt", "")
    if isinstance(prompt, list):
        turns = [f"{turn.get('role')}: {turn.get('content')}" for turn in prompt]
        return _cut("\n\n".join(turns))
    return _cut(prompt)


def _size(sample: Sample) -> list[int]:
    return [len(sample.responses), sum(len(r.text) for r in sample.responses)]


def _fitting(sizes: Mapping[int, Sequence[int]]) -> list[int]:
    """The first samples that fit into a page, by responses and characters; at least one."""
    kept: list[int] = []
    num_responses = num_characters = 0
    for index in sorted(sizes):
        responses, characters = sizes[index]
        num_responses += responses
        num_characters += min(characters, responses * MAX_TEXT)
        if kept and (num_responses > MAX_RESPONSES or num_characters > MAX_CHARACTERS):
            break
        kept.append(index)
    return kept


def _cut(text: object) -> str:
    """A text, its end left out where it is very long."""
    whole = str(text)
    if len(whole) <= MAX_TEXT:
        return whole
    return f"{whole[:MAX_TEXT]}… ({len(whole) - MAX_TEXT:,} more characters)"


def _distinct(values: Iterable[str]) -> list[str]:
    return [value for value in dict.fromkeys(values) if value]
