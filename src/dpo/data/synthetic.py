"""The embedded data: a small language of questions and answers whose true reward is known.

Eighty facts are each asked in four phrasings. An answer states the fact, rightly or wrongly, in a
polite, a neutral or a rude manner. The reward wants right and polite answers; preferences between
two answers follow the Bradley-Terry model under that reward. So everything that has to be
estimated on real data, above all whether a policy got *better*, can be computed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dpo.data.rows import DemonstrationRow, PreferenceRow

KINDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "capital": (
        "The capital of {x} is {y}.",
        (
            "What is the capital of {x}?",
            "Which city is the capital of {x}?",
            "Tell me the capital of {x}.",
            "Name the capital city of {x}.",
        ),
        "France Paris, Japan Tokyo, Italy Rome, Spain Madrid, Egypt Cairo, Peru Lima, Kenya "
        "Nairobi, Norway Oslo, Greece Athens, Cuba Havana, Poland Warsaw, Austria Vienna, "
        "China Beijing, Russia Moscow, Chile Santiago, Ireland Dublin, Portugal Lisbon, "
        "Hungary Budapest, Thailand Bangkok, Germany Berlin",
    ),
    "opposite": (
        "The opposite of {x} is {y}.",
        (
            "What is the opposite of {x}?",
            "Which word is the opposite of {x}?",
            "Tell me the opposite of {x}.",
            "Name the word that is opposite to {x}.",
        ),
        "hot cold, big small, up down, old young, fast slow, hard soft, wet dry, full empty, "
        "light dark, early late, near far, rich poor, loud quiet, open closed, happy sad, "
        "strong weak, clean dirty, deep shallow, thick thin, wide narrow",
    ),
    "young": (
        "A young {x} is called {y}.",
        (
            "What is a young {x} called?",
            "Which word means a young {x}?",
            "Tell me the name of a young {x}.",
            "Name the young of the {x}.",
        ),
        "cat kitten, dog puppy, cow calf, horse foal, sheep lamb, goat kid, pig piglet, hen "
        "chick, duck duckling, goose gosling, swan cygnet, deer fawn, bear cub, frog tadpole, "
        "kangaroo joey, eagle eaglet, hare leveret, owl owlet, fish fry, eel elver",
    ),
    "past": (
        "The past tense of {x} is {y}.",
        (
            "What is the past tense of {x}?",
            "Which word is the past tense of {x}?",
            "Tell me the past tense of {x}.",
            "Name the past form of {x}.",
        ),
        "go went, see saw, eat ate, run ran, take took, give gave, write wrote, sing sang, "
        "drink drank, fly flew, know knew, draw drew, break broke, speak spoke, drive drove, "
        "swim swam, begin began, fall fell, hold held, buy bought",
    ),
}
"""Kind: (statement, phrasings of the question, facts as "subject answer")."""

POLITE = (
    "Happy to help!",
    "Great question!",
    "With pleasure.",
    "I hope this helps.",
    "Let me know if you need more.",
)
RUDE = (
    "Obviously.",
    "What a silly question.",
    "Ugh.",
    "Even a child knows that.",
    "Stop wasting my time.",
)
OPENINGS = 3
"""The first so many polite (or rude) sentences open an answer; the others may close it."""

MANNERS = ("polite", "neutral", "rude")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact and the ways to ask for it."""

    kind: str
    subject: str
    answer: str

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(phrasing.format(x=self.subject) for phrasing in KINDS[self.kind][1])

    def statement(self, answer: str) -> str:
        return KINDS[self.kind][0].format(x=self.subject, y=answer)


def all_facts() -> tuple[Fact, ...]:
    """The eighty facts, the four kinds in turn, so that any first few hold all kinds."""
    by_kind = [
        [Fact(kind, *pair.split()) for pair in facts.split(", ")]
        for kind, (_, _, facts) in KINDS.items()
    ]
    return tuple(fact for facts in zip(*by_kind, strict=True) for fact in facts)


@dataclass(frozen=True)
class World:
    """The facts that are asked about, and the reward of any answer to any of their prompts.

    >>> world = World(num_facts=80)
    >>> world.reward("What is the capital of Peru?", "Happy to help! The capital of Peru is Lima.")
    3.0
    >>> world.reward("What is the capital of Peru?", "Ugh. The capital of Peru is Rome.")
    -2.0
    """

    num_facts: int = 80

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        return all_facts()[: self.num_facts]

    @cached_property
    def fact_of(self) -> dict[str, Fact]:
        return {prompt: fact for fact in self.facts for prompt in fact.prompts}

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        return tuple(self.fact_of)

    def parts(self, prompt: str, response: str) -> AnswerParts:
        """What an answer says and how. Every sentence is a statement, polite, rude or foreign."""
        fact = self.fact_of[prompt]
        pattern = re.compile(
            "|".join(
                statement.replace(".", r"\.").format(x="(.+)", y="(.+)")
                for statement, _, _ in KINDS.values()
            )
        )
        sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s*", response) if s.strip()]
        distinct = list(dict.fromkeys(sentences))
        statements = [s for s in distinct if pattern.fullmatch(s)]
        polite = sum(s in POLITE for s in distinct)
        rude = sum(s in RUDE for s in distinct)
        return AnswerParts(
            right=statements == [fact.statement(fact.answer)],
            wrong=any(s != fact.statement(fact.answer) for s in statements),
            polite=polite > 0 and rude == 0,
            rude=rude > 0,
            foreign=len(sentences) - len(statements) - polite - rude,
        )

    def reward(self, prompt: str, response: str) -> float:
        """The true reward r*(x, y): 2 right - 1 wrong + 1 polite - 1 rude - 1/2 per foreign
        sentence.

        A sentence said twice is foreign the second time; at most four are counted. Range [-4, 3].

        Raises:
            KeyError: the prompt is not one of this world's.
        """
        parts = self.parts(prompt, response)
        manner = float(parts.polite) - float(parts.rude)
        return 2.0 * parts.right - parts.wrong + manner - 0.5 * min(parts.foreign, 4)

    def answer(self, prompt: str, rng: np.random.Generator) -> str:
        """An answer of the demonstrator: right in 3 of 4 cases; polite, neutral, rude 3:4:3."""
        fact = self.fact_of[prompt]
        others = [f.answer for f in all_facts() if f.kind == fact.kind and f != fact]
        stated = fact.answer if rng.random() < 0.75 else others[rng.integers(len(others))]
        manner = MANNERS[int(rng.choice(3, p=[0.3, 0.4, 0.3]))]
        if manner == "neutral":
            return fact.statement(stated)
        sentences = POLITE if manner == "polite" else RUDE
        opening = sentences[rng.integers(OPENINGS)]
        closing = ["", *sentences[OPENINGS:]][rng.integers(len(sentences) - OPENINGS + 1)]
        return f"{opening} {fact.statement(stated)} {closing}".strip()

    def prefer(
        self, prompt: str, first: str, second: str, rng: np.random.Generator
    ) -> PreferenceRow:
        """Label two answers by Bradley-Terry: P(first is chosen) = sigmoid(r*(first) -
        r*(second)).
        """
        gap = self.reward(prompt, first) - self.reward(prompt, second)
        if rng.random() < 1 / (1 + math.exp(-gap)):
            return PreferenceRow(prompt, first, second)
        return PreferenceRow(prompt, second, first)


@dataclass(frozen=True, slots=True)
class AnswerParts:
    """What the true reward looks at."""

    right: bool
    wrong: bool
    polite: bool
    rude: bool
    foreign: int


def demonstrations(
    *, num_rows: int, seed: int, num_facts: int = 80
) -> tuple[DemonstrationRow, ...]:
    """Answers of the demonstrator to seeded random prompts."""
    world, rng = World(num_facts), np.random.default_rng([seed, 0])
    prompts = [world.prompts[i] for i in rng.integers(len(world.prompts), size=num_rows)]
    return tuple(
        DemonstrationRow(prompt, world.answer(prompt, rng), f"synthetic:{i}")
        for i, prompt in enumerate(prompts, 1)
    )


def preferences(*, num_rows: int, seed: int, num_facts: int = 80) -> tuple[PreferenceRow, ...]:
    """Pairs of different answers of the demonstrator, labelled by Bradley-Terry under r*."""
    world, rng = World(num_facts), np.random.default_rng([seed, 1])
    rows: list[PreferenceRow] = []
    while len(rows) < num_rows:
        prompt = world.prompts[rng.integers(len(world.prompts))]
        first, second = world.answer(prompt, rng), world.answer(prompt, rng)
        if first != second:
            row = world.prefer(prompt, first, second, rng)
            source, kind = f"synthetic:{len(rows) + 1}", world.fact_of[prompt].kind
            rows.append(PreferenceRow(row.prompt, row.chosen, row.rejected, source, subset=kind))
    return tuple(rows)


def label_pairs(
    world: World, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, seed: int
) -> tuple[PreferenceRow, ...]:
    """Bradley-Terry labels for pairs of sampled answers; equal pairs are left out."""
    rng = np.random.default_rng([seed, 2])
    return tuple(
        world.prefer(prompt, a, b, rng)
        for prompt, a, b in zip(prompts, first, second, strict=True)
        if a != b
    )
