"""The true reward of generated responses, where the data has one: the embedded language."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.atomic import write_text
from dpo.core.stats import clustered_mean_interval
from dpo.data.synthetic import World
from dpo.evaluate.records import Generation
from dpo.evaluate.tables import csv_text


@dataclass(frozen=True, slots=True)
class RewardRow:
    """Mean true reward of a model at a temperature, with its interval over prompts."""

    model: str
    temperature: float
    num_prompts: int
    n: int
    reward: float
    low: float
    high: float
    right: float
    wrong: float
    polite: float
    rude: float
    foreign: float
    """Mean number of sentences that are not of the language."""


def true_reward_table(records: Iterable[Generation], world: World) -> list[RewardRow]:
    """One row for each model and temperature, in order of appearance; null responses are left out.

    The interval is Student's 95% interval over the prompts' means: samples of one prompt are not
    independent of each other.
    """
    groups: dict[tuple[str, float], list[Generation]] = {}
    for record in records:
        if record.temperature is not None:
            groups.setdefault((record.model, record.temperature), []).append(record)
    return [_row(*key, members, world) for key, members in groups.items()]


def _row(model: str, temperature: float, members: Sequence[Generation], world: World) -> RewardRow:
    rewards = [world.reward(record.prompt, record.generated) for record in members]
    parts = [world.parts(record.prompt, record.generated) for record in members]
    clusters = [record.prompt_index for record in members]
    low, high = clustered_mean_interval(rewards, clusters)
    n = len(members)
    return RewardRow(
        model=model,
        temperature=temperature,
        num_prompts=len(set(clusters)),
        n=n,
        reward=sum(rewards) / n,
        low=low,
        high=high,
        right=sum(p.right for p in parts) / n,
        wrong=sum(p.wrong for p in parts) / n,
        polite=sum(p.polite for p in parts) / n,
        rude=sum(p.rude for p in parts) / n,
        foreign=sum(p.foreign for p in parts) / n,
    )


def write_true_rewards(path: Path, table: Sequence[RewardRow]) -> None:
    """Write the table as CSV."""
    write_text(path, csv_text(RewardRow, table))
