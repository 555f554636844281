"""Best-of-n as a responder: of n responses the one that a reward likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpo.data.rows import PreferenceRow
from dpo.evaluate.records import Generation
from dpo.train.reward_source import RewardFunction


def best_of_each(
    records: Sequence[Generation], rows: Sequence[PreferenceRow], reward: RewardFunction, *, n: int
) -> list[Generation]:
    """Of every n responses that follow each other, the one of the highest reward; of equal ones
    the first. `sample` numbers what is kept.

    Args:
        records: responses to the rows' prompts, a multiple of n to each prompt and temperature,
            those of one prompt together, as `sample_responses` gives them.
        rows: the evaluation set; a record's `prompt_index` is the place of its row.
    """
    assert len(records) % n == 0
    # An answer that comes several times, as at low temperatures, is scored once.
    asked = list(dict.fromkeys((record.prompt_index, record.generated) for record in records))
    rewards = reward([rows[i].prompt for i, _ in asked], [text for _, text in asked])
    score = dict(zip(asked, rewards.tolist(), strict=True))
    kept = []
    for start in range(0, len(records), n):
        drawn = records[start : start + n]
        assert len({(one.prompt_index, one.temperature) for one in drawn}) == 1
        best = max(drawn, key=lambda one: score[one.prompt_index, one.generated])
        kept.append(replace(best, sample=drawn[0].sample // n))
    return kept
