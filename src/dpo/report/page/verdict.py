"""From numbers to the sentences at the top of a page.

A sentence says that something is higher or lower only where an interval or a test says so;
elsewhere it says that the two cannot be told apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from dpo.core.stats import Interval, clustered_wilson_interval, wilson_interval
from dpo.report.page.folders import EvaluationFolder, Margin, Record, RunFolder, StudyFolder, number
from dpo.report.page.words import (
    CHANCE,
    decimal,
    interval_of_shares,
    listed,
    p_value,
    points,
    share,
)
from dpo.report.tables import Cells

ALPHA = 0.05
Z_95 = 1.959964


# -- runs ----------------------------------------------------------------------------------------


def run_verdict(run: RunFolder) -> list[str]:
    """What the held-out rows say of a run, from its first evaluation to its last."""
    held_out = run.held_out
    if not held_out:
        return ["Nothing has been measured on held-out rows yet."]
    first, last = held_out[0], held_out[-1]
    sentences = [] if run.finished else [_unfinished(run)]
    sentences += _accuracy(run, last)
    sentences += _reward_of_samples(first, last)
    sentences += _loss(run, first, last)
    sentences += _kl(last)
    sentences += _displacement(last)
    return sentences


def _unfinished(run: RunFolder) -> str:
    steps = max(int(row["step"]) for row in run.metrics)
    return f"This run is not finished: it stands at step {steps}, and its numbers are of that step."


def _accuracy(run: RunFolder, last: Record) -> list[str]:
    accuracy = number(last.get("eval/rewards/accuracy"))
    if math.isnan(accuracy):
        return []
    judge = "reward model" if run.command == "reward" else "policy's implicit reward"
    ties = number(last.get("eval/rewards/ties"))
    tied = f" ({share(ties)} are ties)" if ties > 0 else ""
    start = f"The {judge} ranks the chosen response above the rejected one in {share(accuracy)}"
    n = len(run.margins)
    if n == 0:
        return [
            f"{start} of the held-out pairs{tied}; their number is not in the folder, so there "
            "is no interval."
        ]
    low, high = accuracy_interval(accuracy, run.margins)
    if low > CHANCE:
        against = "more often than chance (50%)"
    elif high < CHANCE:
        against = "less often than chance (50%)"
    else:
        against = "which cannot be told apart from chance (50%)"
    return [f"{start} {interval_of_shares(low, high)} of {n:,} held-out pairs{tied}, {against}."]


def accuracy_interval(accuracy: float, margins: Sequence[Margin]) -> Interval:
    """95% interval of the share of held-out pairs whose margin is above 0, prompts as clusters.

    A loss whose reward is no log-ratio (a length-normalised one) gives other verdicts than these
    margins; then its pairs count as independent.
    """
    right = [margin.margin > 0 for margin in margins]
    if abs(sum(right) / len(right) - accuracy) < 1e-6:
        return clustered_wilson_interval(right, [margin.prompt for margin in margins])
    return wilson_interval(round(accuracy * len(right)), len(right))


def _reward_of_samples(first: Record, last: Record) -> list[str]:
    before, after = number(first.get("eval/reward")), number(last.get("eval/reward"))
    if math.isnan(before + after):
        return []
    errors = [number(row.get("eval/reward_stderr")) for row in (first, last)]
    half = Z_95 * math.hypot(*errors)
    change = after - before
    text = (
        f"The reward of the policy's own responses to held-out prompts went from {before:.3g} ± "
        f"{errors[0]:.2g} to {after:.3g} ± {errors[1]:.2g} (standard errors over prompts)"
    )
    if math.isnan(half):
        return [f"{text}."]
    if abs(change) <= half:
        return [f"{text}: the two cannot be told apart."]
    return [f"{text}: {'higher' if change > 0 else 'lower'} than before training."]


def _loss(run: RunFolder, first: Record, last: Record) -> list[str]:
    if run.command in ("ppo", "online"):  # their eval/loss is reward and KL, both said already
        return []
    before, after = number(first["eval/loss"]), number(last["eval/loss"])
    unit = " nats a token" if run.command == "sft" else ""
    steps = int(last["step"])
    text = (
        f"The held-out loss went from {decimal(before)} to {decimal(after)}{unit} in {steps} steps"
    )
    best_step = run.manifest.get("best_step")
    best = next((row for row in run.held_out if row["step"] == best_step), None)
    if best is not None and best_step != steps and number(best["eval/loss"]) < after:
        text += (
            f"; it was lowest, {decimal(best['eval/loss'])}, at step {best_step}: best/ holds that "
            "model, model/ the last one"
        )
    return [f"{text}."]


def _kl(last: Record) -> list[str]:
    kl, error = number(last.get("eval/kl")), number(last.get("eval/kl_stderr"))
    if math.isnan(kl):
        return []
    within = "" if math.isnan(error) else f" ± {error:.2g}"
    return [f"It has moved {kl:.3g}{within} nats a response from its reference (KL, sampled)."]


def _displacement(last: Record) -> list[str]:
    change = number(last.get("eval/logps/chosen_change"))
    margin = number(last.get("eval/rewards/margin"))
    if not change < 0 < margin:
        return []
    return [
        f"The chosen responses became less likely ({change:.3g} nats) while the margin grew: the "
        "loss looks only at the difference, and rejected responses fell further."
    ]


# -- evaluations ---------------------------------------------------------------------------------


def evaluation_verdict(evaluation: EvaluationFolder) -> list[str]:
    """The true reward, where it is known; then the model with the highest win rate, against the
    strongest null and against its rival; all at one temperature.
    """
    temperature = chief_temperature(evaluation.win_rates)
    if temperature is None:
        return ["No model's response was decided: there is no win rate."]
    tests = [t for t in evaluation.tests if _same(t.get("temperature"), temperature)]
    models = [row for row in models_of(evaluation.win_rates) if row["temperature"] == temperature]
    best = max(models, key=lambda row: number(row["win_rate"]))
    sentences = reward_verdict(
        [row for row in evaluation.rewards if _same(row.get("temperature"), temperature)]
    )
    sentences.append(
        f"At temperature {temperature:g}, {_named(best)}"
        f"{'' if len(models) == 1 else ', the highest of ' + str(len(models)) + ' models'}"
        f"{_against_null(best, evaluation.win_rates, tests)}"
    )
    rival = rival_of(best, models)
    if rival is not None:
        sentences += _against_rival(best, rival, tests)
    return sentences


def models_of(win_rates: Sequence[Record]) -> list[Record]:
    """The rows of models that have a win rate."""
    return [r for r in win_rates if r.get("kind") == "model" and r.get("win_rate") is not None]


def strongest_null(win_rates: Sequence[Record]) -> Record | None:
    """The null response with the highest win rate: the one to beat."""
    nulls = [r for r in win_rates if r.get("kind") == "null" and r.get("win_rate") is not None]
    return max(nulls, key=lambda row: number(row["win_rate"]), default=None)


def chief_temperature(win_rates: Sequence[Record]) -> float | None:
    """The temperature of which a page speaks first: 1, the policy itself, else the highest."""
    temperatures = {number(row["temperature"]) for row in models_of(win_rates)}
    if not temperatures:
        return None
    return 1.0 if 1.0 in temperatures else max(temperatures)


def rival_of(best: Record, models: Sequence[Record]) -> Record | None:
    """What the best is compared with: the SFT model where one is named so, else the next best."""
    others = [row for row in models if row["model"] != best["model"]]
    sft = [row for row in others if "sft" in str(row["model"]).lower()]
    return max(sft or others, key=lambda row: number(row["win_rate"]), default=None)


def _named(row: Record) -> str:
    decided = int(row["wins"]) + int(row["losses"])
    interval = interval_of_shares(row.get("low"), row.get("high"))
    return (
        f"{row['model']} wins {share(row['win_rate'])} {interval} of {decided:,} decided responses"
    )


def _against_null(best: Record, win_rates: Sequence[Record], tests: Sequence[Record]) -> str:
    null = strongest_null(win_rates)
    if null is None:
        return "; there is no null response to read it against."
    gets = (
        f"; the strongest response that knows nothing ({null['model']}) gets "
        f"{share(null['win_rate'])}"
    )
    test = next(
        (t for t in tests if t.get("family") == "null" and t["model_a"] == best["model"]), None
    )
    if test is None:
        return f"{gets}."
    p = number(test.get("mcnemar_p_holm"))
    tested = f"McNemar's test on the same prompts, {p_value(p)} after Holm's correction"
    if p >= ALPHA:
        return f"{gets}: the two cannot be told apart ({tested})."
    which = "above" if _difference(test) > 0 else "below"
    return f"{gets}: the model is {which} it ({tested})."


def _against_rival(best: Record, rival: Record, tests: Sequence[Record]) -> list[str]:
    names = (best["model"], rival["model"])
    for test in tests:
        if test.get("family") == "models" and {test["model_a"], test["model_b"]} == set(names):
            sign = 1 if test["model_a"] == names[0] else -1
            break
    else:
        return []
    difference, p = sign * _difference(test), number(test.get("mcnemar_p_holm"))
    ends = sorted((sign * number(test.get("low")), sign * number(test.get("high"))))
    said = (
        f"Against {names[1]} on the same {test['num_prompts']} prompts it is {points(difference)} "
        f"points [{points(ends[0])}, {points(ends[1])}] ({p_value(p)})"
    )
    if p >= ALPHA:
        return [f"{said}: the two cannot be told apart."]
    return [f"{said}: {'higher' if difference > 0 else 'lower'}."]


def _difference(test: Record) -> float:
    return number(test.get("difference"))


def reward_verdict(rows: Sequence[Record]) -> list[str]:
    """The highest true reward, and from which of the others its interval is apart."""
    if not rows:
        return []
    best = max(rows, key=lambda row: number(row["reward"]))
    text = f"The highest true reward is that of {best['model']}, {_with_ends(best)}"
    if len(rows) == 1:
        return [text.replace("The highest true reward is that of", "The true reward of") + "."]
    near = [
        str(row["model"])
        for row in rows
        if row is not best and number(row["high"]) >= number(best["low"])
    ]
    if not near:
        return [f"{text}; its interval is above that of every other model."]
    return [f"{text}; its interval overlaps with {_of(near)}."]


def _of(names: Sequence[str]) -> str:
    return f"that of {names[0]}" if len(names) == 1 else f"those of {listed(names)}"


def _with_ends(row: Record) -> str:
    return f"{number(row['reward']):.2f} [{number(row['low']):.2f}, {number(row['high']):.2f}]"


def _same(value: object, temperature: float) -> bool:
    return number(value) == temperature


# -- studies -------------------------------------------------------------------------------------


def study_verdict(study: StudyFolder) -> list[str]:
    """What a study's own tests say, or what its evaluation says; that there is none, where there is
    none.
    """
    sentences = _claims(study) + _losses(study.table)
    sentences = sentences or _differences(study.tables.get("differences") or [[""]])
    if not sentences and study.evaluation is not None:
        if not study.evaluation.rewards and "reward" in (study.table or [{}])[0]:
            sentences += reward_verdict(study.table)
        sentences += evaluation_verdict(study.evaluation)
    return sentences or ["No test is in this folder: what was measured is in the tables."]


def _claims(study: StudyFolder) -> list[str]:
    """How many of the claims that a study tests hold, against each rival."""
    head, *lines = study.tables.get("claims") or [[]]
    sentences = []
    for column, rival in enumerate(head):
        if not rival.startswith("against "):
            continue
        cells = [line[column] for line in lines if column < len(line)]
        holds = sum("**holds**" in cell for cell in cells)
        fails = sum("**does not hold**" in cell for cell in cells)
        is_open = sum("open" in cell for cell in cells)
        sentences.append(
            f"Of the {holds + fails + is_open} ways in which DPO is compared {rival}, {holds} "
            f"speak for it, {fails} speak against it, and {is_open} cannot be told."
        )
    return sentences


def _differences(table: Sequence[Cells]) -> list[str]:
    """For each rival, where the interval of the difference to it is above 0 and where below."""
    (first, *columns), *lines = table
    sentences = []
    for rival, *cells in filter(None, lines):
        found: dict[str, list[str]] = {}
        for column, cell in zip(columns, cells, strict=False):
            ends = re.search(r"\[([-+\d.]+), ([-+\d.]+)\]", cell)
            if ends is not None:
                low, high = map(float, ends.groups())
                said = "above 0" if low > 0 else "below 0" if high < 0 else "cannot be told"
                found.setdefault(said, []).append(column)
        if found:
            parts = [f"{said} in {listed(where)}" for said, where in found.items()]
            sentences.append(f"{first} {rival}: {'; '.join(parts)}.")
    return sentences


def _losses(table: Sequence[Record]) -> list[str]:
    """How many losses differ from DPO on the same questions, after Holm's correction."""
    tested = [row for row in table if not math.isnan(number(row.get("p_holm")))]
    if not tested:
        return []
    apart = [row for row in tested if number(row["p_holm"]) < ALPHA]
    above = [str(row["model"]) for row in apart if number(row["difference"]) > 0]
    below = [str(row["model"]) for row in apart if number(row["difference"]) < 0]
    rest = len(tested) - len(apart)
    return [
        f"Of {len(tested)} methods compared with DPO on the same questions, {len(above)} have a "
        f"higher true reward{_parenthesis(above)} and {len(below)} a lower one"
        f"{_parenthesis(below)} (p < {ALPHA:g} after Holm's correction); {rest} cannot be told "
        "apart from it."
    ]


def _parenthesis(names: Sequence[str]) -> str:
    return f" ({listed(names)})" if 0 < len(names) <= 6 else ""
