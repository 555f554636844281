"""What the steps of a run send through the model: counted on the rows, in their order, without the
model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpo.config import RunConfig
from dpo.core.cost import StepCounts
from dpo.data.order import batch_rows, split_among, split_by_tokens, steps_per_epoch
from dpo.data.pack import Batch, pack, packed_groups, packed_tokens, pad, padded_groups
from dpo.data.tokenize import TokenSequence

MOST_STEPS = 200
"""Steps that are looked at."""

Row = Sequence[TokenSequence]
"""The sequences of a row that the gradient goes through."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The steps of an epoch, or of its beginning."""

    mean: StepCounts
    """Of a step, over all devices."""
    most_passes: int
    """Of a step, on one device."""
    heaviest: tuple[Batch, ...]
    """The pass that is expected to hold the most."""


def count_workload(
    rows: Sequence[Row],
    config: RunConfig,
    *,
    packed: bool,
    whole_batch: bool,
    weigh: Callable[[int, int], float],
    devices: int = 1,
) -> Workload:
    """Split the batches of the first steps into passes, as the loop does.

    Args:
        packed: how the model is run.
        whole_batch: the rows of a batch act on one another, so that it is one pass.
        weigh: what tokens and predicted positions of a pass hold, for comparison.
    """
    costs = [packed_tokens(row) for row in rows]
    num_steps = min(MOST_STEPS, steps_per_epoch(len(rows), config.batch.size))
    counts: list[StepCounts] = []
    passes_of_step: list[int] = []
    heaviest: tuple[Batch, ...] = ()
    most = -1.0
    for step in range(num_steps):
        chosen = batch_rows(
            step, num_rows=len(rows), batch_size=config.batch.size, seed=config.seed
        )
        shares = split_among([costs[row] for row in chosen], parts=devices)
        run: list[tuple[Batch, ...]] = []
        for share in shares:
            own = [chosen[i] for i in share]
            groups = [list(range(len(own)))] if whole_batch else _passes(own, costs, config)
            passes_of_step.append(len(groups))
            run += [
                _batches([rows[own[i]] for i in group], config, packed=packed) for group in groups
            ]
        counts.append(_added_up(run))
        for of_pass in run:
            found = _added_up([of_pass])
            weight = weigh(int(found.tokens), int(found.predicted))
            if weight > most:
                most, heaviest = weight, of_pass
    mean = StepCounts(
        *(statistics.fmean(values) for values in zip(*map(_fields, counts), strict=True))
    )
    return Workload(mean, max(passes_of_step), heaviest)


def _passes(own: Sequence[int], costs: Sequence[int], config: RunConfig) -> list[list[int]]:
    return split_by_tokens([costs[row] for row in own], max_tokens=config.batch.max_tokens)


def _batches(rows: Sequence[Row], config: RunConfig, *, packed: bool) -> tuple[Batch, ...]:
    """What the rows of a pass are for the model."""
    sequences = [sequence for row in rows for sequence in row]
    split, layout = (packed_groups, pack) if packed else (padded_groups, pad)
    groups = split(sequences, max_tokens=config.batch.max_tokens)
    return tuple(layout([sequences[i] for i in group]) for group in groups)


def _added_up(run: Sequence[Sequence[Batch]]) -> StepCounts:
    batches = [batch for batches in run for batch in batches]
    return StepCounts(
        sum(batch.ids.size for batch in batches),
        sum(batch.attended for batch in batches),
        sum(len(batch.column) for batch in batches),
    )


def _fields(counts: StepCounts) -> tuple[float, float, float]:
    return counts.tokens, counts.attended, counts.predicted
