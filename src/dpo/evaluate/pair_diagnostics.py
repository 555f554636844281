"""What the held-out pairs of a run tell: likelihood displacement, accuracy, length, subsets,
calibration.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dpo.core.diagnostics import (
    Displacement,
    bootstrap_interval,
    calibrating_temperature,
    difference_spearman,
    displacement,
    spearman,
    subset_accuracies,
)
from dpo.core.stats import (
    clustered_mean_interval,
    clustered_wilson_interval,
    pair_calibration,
)
from dpo.evaluate.held_out_pairs import HeldOut
from dpo.evaluate.readings import Found, Level, Reading, join, percent, percents, span
from dpo.train.encoded import TIE_NATS
from dpo.train.held_out import DISPLACED, HELD_OUT


def read_displacement(pairs: HeldOut, measured: list[dict[str, Any]]) -> Found:
    chosen, rejected = pairs.changes
    if not np.isfinite(chosen).all():
        return {}, []
    found = displacement(chosen, rejected, pairs.prompts, tolerance=TIE_NATS)
    overlap = np.array([pair.overlap for pair in pairs.pairs])
    alike = spearman(overlap, chosen)
    alike_interval = bootstrap_interval(
        lambda places: spearman(overlap[places], chosen[places]), pairs.prompts
    )
    share = f"{percent(found.chosen_fell)} {percents(found.chosen_fell_interval)}"
    sentence = (
        f"The chosen response became less likely in {share} of {found.num_pairs} held-out pairs; "
        f"on average chosen changed by {found.chosen_mean:+.2f} {span(found.chosen_interval)} and "
        f"rejected by {found.rejected_mean:+.2f} {span(found.rejected_interval)} nats a response."
    )
    level = displacement_level(found)
    todo = ""
    if level != "ok":
        sentence += (
            " This is not a bug by itself: the loss sees only the difference of the two, and that "
            f"can grow while both fall, as they do in {percent(found.both_fell)} of the pairs. "
            "What both lose goes to responses that are in no pair, which may be worse."
        )
        todo = (
            f"Read samples/{DISPLACED} and the generations. If they are worse than before: add an "
            "SFT term (loss.mix='[{name: dpo, beta: 0.1}, {name: nll, weight: 1}]'), raise "
            "loss.beta, or train for fewer epochs; and look at pairs whose two responses are "
            f"nearly the same (overlap near 1 in {HELD_OUT})."
        )
        if alike_interval.high < 0:
            todo += (
                " Here the likelihood falls the more, the more alike the two responses are (rank "
                f"correlation {alike:+.2f} {span(alike_interval)})."
            )
    numbers = {
        **found._asdict(),
        "overlap_spearman": alike,
        "overlap_spearman_interval": alike_interval,
        "over_training": over_training(measured),
    }
    return numbers, [Reading(level, "Likelihood of the chosen responses", sentence, todo)]


def displacement_level(found: Displacement) -> Level:
    """A fall in more than half of the pairs is remarkable; beyond chance, in share or in mean, it
    is to be looked into.
    """
    if found.chosen_fell <= 0.5:
        return "ok"
    beyond_chance = found.chosen_fell_interval.low > 0.5 or found.chosen_interval.high < 0
    return "warning" if beyond_chance else "note"


SIDES = {
    "chosen": ("logps/chosen", "logps/best_change"),
    "rejected": ("logps/rejected", "logps/others_change"),
}
"""The metrics that tell a side's mean log-probability, of pairs and of rankings."""


def over_training(measured: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean change of both sides' log-probabilities since the first evaluation, at each; empty where
    the metrics do not tell (judged responses).
    """
    names = {
        side: name
        for side, metrics in SIDES.items()
        for name in (f"eval/{metric}" for metric in metrics)
        if measured and name in measured[0]
    }
    return [
        {"step": row["step"]}
        | {side: float(row[name]) - float(measured[0][name]) for side, name in names.items()}
        for row in measured
        if names
    ]


def read_accuracy(pairs: HeldOut) -> Found:
    accuracy = float(pairs.right.mean())
    interval = clustered_wilson_interval(pairs.right, pairs.prompts)
    ties = float((pairs.margins == 0).mean())
    sentence = (
        f"The implicit reward prefers the chosen response in {percent(accuracy)} "
        f"{percents(interval)} of {pairs.num} held-out pairs ({percent(ties)} ties)."
    )
    numbers = {"accuracy": accuracy, "interval": interval, "ties": ties, "num_pairs": pairs.num}
    if interval.low > 0.5:
        return numbers, [Reading("ok", "Reward accuracy", sentence)]
    return numbers, [
        Reading(
            "warning" if interval.high < 0.5 else "note",
            "Reward accuracy",
            f"{sentence} A coin gets 50%, so nothing that holds beyond the training pairs has been "
            "shown to be learnt.",
            "More pairs, more steps, or a larger learning rate; if the accuracy on training pairs "
            "is high, the run has learnt them by heart. Look for wrong labels in the data.",
        )
    ]


def read_length(pairs: HeldOut) -> Found:
    lengths, margins = pairs.length_differences, pairs.margins
    decided = np.flatnonzero((lengths != 0) & (margins != 0))
    if len(decided) < 2:
        return {}, []
    prompts = [pairs.prompts[i] for i in decided]
    by_label = (lengths[decided] > 0).astype(np.float64)
    by_policy = (lengths[decided] * margins[decided] > 0).astype(np.float64)
    label_interval = clustered_wilson_interval(by_label, prompts)
    policy_interval = clustered_wilson_interval(by_policy, prompts)
    excess = float((by_policy - by_label).mean())
    excess_interval = clustered_mean_interval(by_policy - by_label, prompts)
    correlation = difference_spearman(margins, lengths)
    correlation_interval = bootstrap_interval(
        lambda places: difference_spearman(margins[places], lengths[places]), pairs.prompts
    )
    numbers = {
        "num_pairs": len(decided),
        "longer_is_chosen": float(by_label.mean()),
        "longer_is_chosen_interval": label_interval,
        "policy_prefers_longer": float(by_policy.mean()),
        "policy_prefers_longer_interval": policy_interval,
        "excess": excess,
        "excess_interval": excess_interval,
        "spearman": correlation,
        "spearman_interval": correlation_interval,
    }
    sentence = (
        f"The rule 'the longer one wins' is right in {percent(by_label.mean())} "
        f"{percents(label_interval)} of {len(decided)} held-out pairs of unequal length; the "
        f"policy's implicit reward prefers the longer one in {percent(by_policy.mean())} "
        f"{percents(policy_interval)}. Rank correlation of reward and length within pairs: "
        f"{correlation:+.2f} {span(correlation_interval)}."
    )
    level: Level = "ok"
    todo = ""
    if excess_interval.low > 0 and correlation_interval.low > 0:
        level = "warning"
        sentence += " The policy goes by length more than the labels do."
        todo = (
            "Compare length-controlled win rates (dpo diagnose on an evaluation). A loss that "
            "takes length out: r_dpo, length_normalised_dpo, ld_dpo or simpo."
        )
    elif excess_interval.high < 0 and correlation_interval.high < 0:
        level = "note"
        sentence += " The policy prefers shorter responses more than the labels do."
    accuracy = float((margins[decided] > 0).mean())
    if label_interval.low > 0.5 and by_label.mean() >= accuracy:
        level = "warning" if level == "warning" else "note"
        sentence += (
            f" The rule is no worse than the policy ({percent(accuracy)} on these pairs), so its "
            "accuracy is no evidence that it has learnt more than length."
        )
    return numbers, [Reading(level, "Length", sentence, todo)]


def read_subsets(pairs: HeldOut) -> Found:
    by, names = pairs.subsets
    if len(set(names)) < 2:
        return {}, []
    found = subset_accuracies(pairs.right, names, pairs.prompts)
    numbers = {"by": by, "subsets": [subset._asdict() for subset in found]}
    others = [s for s in found if s.p_holm < 0.05]
    if not others:
        sentence = f"No part of the held-out pairs, by {by}, differs from the whole in accuracy."
        return numbers, [Reading("ok", "Accuracy by subset", sentence)]
    shown = [
        f"{s.subset}: {percent(s.accuracy)} {percents(s.interval)} of {s.n} pairs "
        f"(p = {s.p_holm:.3f})"
        for s in others
    ]
    worse = any(s.difference < 0 for s in others)
    sentence = (
        f"Accuracy differs from the whole ({percent(float(pairs.right.mean()))}), by {by}, p after "
        f"Holm's correction: {join(shown)}."
    )
    todo = "Look at the pairs of the worst part: other labels, another task, or few in training."
    return numbers, [
        Reading(
            "warning" if worse else "note", "Accuracy by subset", sentence, todo if worse else ""
        )
    ]


def read_calibration(pairs: HeldOut) -> Found:
    margins = pairs.margins
    found = pair_calibration(margins)
    temperature = calibrating_temperature(margins)
    interval = bootstrap_interval(
        lambda places: calibrating_temperature(margins[places]), pairs.prompts
    )
    error_interval = bootstrap_interval(
        lambda places: pair_calibration(margins[places]).error, pairs.prompts
    )
    numbers = {
        "expected_calibration_error": found.error,
        "expected_calibration_error_interval": error_interval,
        "brier": found.brier,
        "temperature": temperature,
        "temperature_interval": interval,
        "bins": [b._asdict() for b in found.bins],
    }
    sentence = (
        f"Read as probabilities (sigmoid of the margin), the implicit rewards are off by "
        f"{found.error:.3f} on average, Brier score {found.brier:.3f} (a coin: 0.25)."
    )
    if not 0 < temperature < math.inf:  # no error to calibrate by, or no relation to the labels
        return numbers, [Reading("ok", "Calibration", sentence)]
    ends = f"[{interval.low:.2g}, {interval.high:.2g}]"
    sentence += f" Dividing the margins by {temperature:.2g} {ends} would calibrate them."
    if interval.low <= 1 <= interval.high:
        return numbers, [Reading("ok", "Calibration", sentence)]
    surer = interval.low > 1
    sentence += f" They are {'surer' if surer else 'less sure'} than they are right."
    todo = "Divide margins by that temperature before you use them as probabilities or thresholds. "
    todo += (
        "Fewer epochs or a larger loss.beta make the policy less extreme."
        if surer
        else "It is usual early in training, while the policy has moved little."
    )
    return numbers, [Reading("note", "Calibration", sentence, todo)]
