"""What a study on given pairs says of "simpler, faster, better than PPO with a reward model"."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpo.evaluate.paired import LEVEL, PairedTest
from dpo.report.exact_claims import fewer, verdict
from dpo.report.exact_study import DPO, PPO_RM, mean
from dpo.report.study_results import CellResult, Study
from dpo.report.tables import Cells


def claims_table(study: Study) -> list[Cells]:
    """Each claim as a number with an interval, and what the interval says; the head alone of a
    study without PPO or without DPO.
    """
    lines = [["claim", "measured as", f"against {PPO_RM}"]]
    own = [result for result in study.results if result.label.startswith(DPO)]
    theirs = study.of(PPO_RM)
    if not own or not theirs:
        return lines
    lines += [
        [
            "simpler",
            "models in memory; settings",
            fewer(*((len(run.models), run.cost.keys) for run in (own[0], theirs[0]))),
        ],
        [
            "faster",
            "seconds of all training, PPO's ratio to DPO's",
            verdict(_log_ratios(own, theirs), ratio=True),
        ],
    ]
    for test in study.evaluation.tests:
        if test.family == "models" and PPO_RM in (test.model_a, test.model_b):
            label = test.model_b if test.model_a == PPO_RM else test.model_a
            if label.startswith(DPO):
                measured_as = f"win rate at temperature {test.temperature:g}, {label}'s less PPO's"
                lines.append(["a better policy", measured_as, _wins(test)])
    return lines


def _log_ratios(own: Sequence[CellResult], theirs: Sequence[CellResult]) -> list[float]:
    """log(PPO's seconds / DPO's) of each seed, DPO's the mean over its strengths."""
    found = []
    for run in theirs:
        dpo = [_seconds(result) for result in own if result.seed == run.seed]
        if dpo:
            found.append(math.log(_seconds(run) / mean(dpo)))
    return found


def _seconds(result: CellResult) -> float:
    return result.cost.seconds + result.cost.reward_model_seconds


def _wins(test: PairedTest) -> str:
    """DPO's win rate less PPO's; the test may have them the other way round."""
    if test.difference is None:
        return "open: no decided prompts"
    gap, low, high = test.difference, test.low, test.high
    if test.model_a == PPO_RM:
        gap, low, high = -gap, -high, -low
    clear = test.mcnemar_p_holm < LEVEL
    said = (
        "**holds**" if clear and low > 0 else "**does not hold**" if clear and high < 0 else "open"
    )
    return f"{gap:+.1%} [{low:+.1%}, {high:+.1%}]: {said}"
