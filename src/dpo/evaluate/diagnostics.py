"""What a preference run shows beside its main numbers, from the files in its folder.

`diagnose` takes a run's folder or an evaluation's; `write_diagnosis` leaves `diagnostics.json`.
docs/diagnostics.md explains every reading.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from dpo import atomic
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
from dpo.errors import InputError
from dpo.evaluate.generation_diagnostics import diagnose_evaluation, health_of
from dpo.evaluate.readings import (
    Diagnosis,
    Level,
    Reading,
    differ,
    join,
    percent,
    percents,
    read_json_lines,
    span,
)
from dpo.loss_config import LossConfig
from dpo.train.encoded import TIE_NATS
from dpo.train.held_out import DISPLACED, HELD_OUT, HeldOutPair, read_held_out
from dpo.train.objective import make_objective, reward_scale
from dpo.train.run import read_metrics

Floats = NDArray[np.float64]
Found = tuple[dict[str, Any], list[Reading]]
"""The numbers of a topic and their readings."""

DIAGNOSTICS = "diagnostics.json"

LARGE_KL = 10.0
"""Nats a response, above which a note is made. A rule of thumb: what the policy says is then e^10
times as likely under it as under the reference, in the geometric mean."""
MANY_TRUNCATED = 0.2
MANY_EMPTY = 0.02
MORE_REPEATED = 0.05
"""Shares above which generations are warned of; of repeated 4-grams, above those at the start."""
MAX_SUBSETS = 20
"""Where there are more, the smallest are put together."""


def diagnose(folder: Path) -> Diagnosis:
    """The diagnosis of a run or of an evaluation.

    Raises:
        InputError: the folder is neither, or a file in it is damaged.
    """
    if (folder / "scored.jsonl").is_file():
        return diagnose_evaluation(folder)
    return diagnose_run(folder)


def write_diagnosis(diagnosis: Diagnosis, folder: Path) -> None:
    """Write `diagnostics.json`; one that is the same already is left alone.

    Raises:
        StorageError: the file cannot be written.
    """
    file = folder / DIAGNOSTICS
    text = json.dumps(atomic.jsonable(asdict(diagnosis)), indent=2, ensure_ascii=False) + "\n"
    if not file.is_file() or file.read_bytes() != text.encode():
        atomic.write_text(file, text)


def diagnose_run(folder: Path) -> Diagnosis:
    """The diagnosis of a run: what of it its files allow.

    Raises:
        InputError: the folder holds no run, or a file is damaged.
    """
    measured = [row for row in read_metrics(folder) if "eval/loss" in row]
    pairs = HeldOut.of_run(folder)
    if not measured and not pairs.num:
        raise InputError(
            f"{folder}: there is nothing to diagnose; expected the folder of a run of dpo train, "
            "dpo online or dpo ppo, or of dpo evaluate (with scored.jsonl)."
        )
    found: dict[str, Found] = {}
    if pairs.num:
        found["displacement"] = _displacement(pairs, measured)
        found["accuracy"] = _accuracy(pairs)
        found["length"] = _length(pairs)
        found["subsets"] = _subsets(pairs)
        found["calibration"] = _calibration(pairs)
    if measured:
        found["on_policy"] = _on_policy(measured[0], measured[-1])
        found["samples"] = health_of(read_json_lines(folder / "samples" / "final.jsonl")), []
    numbers = {topic: numbers for topic, (numbers, _) in found.items() if numbers}
    return Diagnosis("run", numbers, [r for _, readings in found.values() for r in readings])


# -- the pairs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs of a run as columns, (P,)."""

    pairs: list[HeldOutPair]
    scale: float
    """What a log-ratio is multiplied with to be a reward: beta."""

    @staticmethod
    def of_run(folder: Path) -> HeldOut:
        """The pairs whose numbers are all finite; none where the run has no such file."""
        pairs = [pair for pair in read_held_out(folder) if math.isfinite(_log_ratio_margin(pair))]
        return HeldOut(pairs, _scale(folder) if pairs else 1.0)

    @property
    def num(self) -> int:
        return len(self.pairs)

    @cached_property
    def prompts(self) -> list[int]:
        return [pair.prompt for pair in self.pairs]

    @cached_property
    def margins(self) -> Floats:
        """Difference of the implicit rewards `beta (log pi - log pi_ref)`, chosen minus rejected;
        `beta log pi` where the loss has no reference. A difference within rounding is 0.
        """
        found = np.array([_log_ratio_margin(pair) for pair in self.pairs])
        return np.where(np.abs(found) <= TIE_NATS, 0.0, self.scale * found)

    @cached_property
    def right(self) -> Floats:
        """1 where the chosen response has the higher implicit reward, else 0; a tie is no hit."""
        return (self.margins > 0).astype(np.float64)

    @cached_property
    def length_differences(self) -> Floats:
        """Tokens of the chosen minus tokens of the rejected response."""
        return np.array([float(p.chosen_tokens - p.rejected_tokens) for p in self.pairs])

    @cached_property
    def changes(self) -> tuple[Floats, Floats]:
        """Of the log-probabilities of chosen and rejected responses, in training; NaN where the
        start is not known.
        """
        chosen = np.array([pair.chosen_change for pair in self.pairs])
        return chosen, np.array([pair.rejected_change for pair in self.pairs])

    @cached_property
    def subsets(self) -> tuple[str, list[str]]:
        """What they go by, and the subset of each pair: the data's own, or else quarters by the
        prompts' length. Of more than `MAX_SUBSETS`, the smallest are "others".
        """
        own = [pair.subset or "(none)" for pair in self.pairs]
        counts = Counter(own)
        if len(counts) > 1:
            named = len(counts) if len(counts) <= MAX_SUBSETS else MAX_SUBSETS - 1
            large = {name for name, _ in counts.most_common(named)}
            return "subset", [name if name in large else "others" for name in own]
        lengths = np.array([pair.prompt_tokens for pair in self.pairs])
        edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75], method="lower"))
        quarter = np.searchsorted(edges, lengths)
        width = len(str(lengths.max()))  # zeros in front, so that the names are in order
        names = {}
        for number in np.unique(quarter):
            inside = lengths[quarter == number]
            low, high = f"{inside.min():0{width}d}", f"{inside.max():0{width}d}"
            names[number] = f"{low} to {high} prompt tokens"
        return "length of the prompt", [names[number] for number in quarter]


def _log_ratio_margin(pair: HeldOutPair) -> float:
    """`log pi/pi_ref` of the chosen minus that of the rejected response, in nats."""
    chosen = pair.chosen_logp - (pair.reference_chosen_logp or 0.0)
    return chosen - (pair.rejected_logp - (pair.reference_rejected_logp or 0.0))


def _scale(folder: Path) -> float:
    """The factor of the run's rewards, from its configuration: beta, or 1 without one."""
    file = folder / "config.json"
    try:
        loss = json.loads(file.read_text(encoding="utf-8"))["loss"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected the configuration of a preference run.") from error
    config = TypeAdapter[Any](LossConfig).validate_python(loss)
    return reward_scale(make_objective(config))


# -- topics --------------------------------------------------------------------------------------


def _displacement(pairs: HeldOut, measured: list[dict[str, Any]]) -> Found:
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


def _accuracy(pairs: HeldOut) -> Found:
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


def _length(pairs: HeldOut) -> Found:
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


def _subsets(pairs: HeldOut) -> Found:
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


def _calibration(pairs: HeldOut) -> Found:
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


HEALTH = (
    "kl",
    "entropy",
    "sample_tokens",
    "repeated_4grams",
    "distinct_2grams",
    "truncated",
    "empty",
)
"""What is measured of the policy's own samples, as `eval/NAME` and mostly `eval/NAME_stderr`."""


def _on_policy(first: dict[str, Any], last: dict[str, Any]) -> Found:
    """The policy's own samples at temperature 1, at the end beside the start."""
    numbers: dict[str, Any] = {}
    for name in HEALTH:
        if f"eval/{name}" in last and f"eval/{name}" in first:
            numbers[name] = {
                "start": float(first[f"eval/{name}"]),
                "end": float(last[f"eval/{name}"]),
            }
            if f"eval/{name}_stderr" in last:
                numbers[name]["start_stderr"] = float(first[f"eval/{name}_stderr"])
                numbers[name]["end_stderr"] = float(last[f"eval/{name}_stderr"])
    readings = [
        reading
        for name, read in (
            ("kl", _read_kl),
            ("entropy", _read_entropy),
            ("sample_tokens", _read_tokens),
            ("repeated_4grams", _read_repeated),
            ("truncated", _read_truncated),
            ("empty", _read_empty),
        )
        if name in numbers and (reading := read(numbers[name]))
    ]
    return numbers, readings


def _moved(found: dict[str, float]) -> bool:
    return differ(
        (found["start"], found.get("start_stderr", 0.0)),
        (found["end"], found.get("end_stderr", 0.0)),
    )


def _read_kl(found: dict[str, float]) -> Reading:
    sentence = (
        f"KL(policy || reference) is {found['end']:.2f} ± {found['end_stderr']:.2f} nats a "
        "response (standard error), measured on the policy's own samples."
    )
    if found["end"] <= LARGE_KL:
        return Reading("ok", "Distance from the reference", sentence)
    return Reading(
        "note",
        "Distance from the reference",
        f"{sentence} That is far: rewards learnt near the reference say little out there.",
        "Compare with a run of larger loss.beta or fewer steps at its KL; if it is as good, take "
        "it. dpo evaluate shows whether this one is better at all.",
    )


def _read_entropy(found: dict[str, float]) -> Reading:
    sentence = (
        f"Entropy of the next token along the policy's own samples: {found['start']:.2f} nats at "
        f"the start, {found['end']:.2f} ± {found['end_stderr']:.2f} at the end."
    )
    if not (found["end"] < found["start"] / 2 and _moved(found)):
        return Reading("ok", "Diversity", sentence)
    return Reading(
        "warning",
        "Diversity",
        f"{sentence} It has more than halved: the policy has narrowed to few answers.",
        "Raise loss.beta or stop earlier; compare generations at temperature 1 side by side.",
    )


def _read_tokens(found: dict[str, float]) -> Reading:
    sentence = (
        f"Samples have {found['start']:.1f} tokens on average at the start and "
        f"{found['end']:.1f} at the end."
    )
    ratio = found["end"] / found["start"] if found["start"] else 1.0
    if 0.8 <= ratio <= 1.25 or not _moved(found):
        return Reading("ok", "Length of generations", sentence)
    how = "longer" if ratio > 1 else "shorter"
    return Reading(
        "note",
        "Length of generations",
        f"{sentence} Judges often prefer a length, so a win rate may come from that alone.",
        f"Read the length-controlled win rate before you call the {how} responses better.",
    )


def _read_repeated(found: dict[str, float]) -> Reading:
    sentence = (
        f"Within a sample, {found['end']:.1%} of its sequences of four tokens occurred in it "
        f"before ({found['start']:.1%} at the start)."
    )
    if not (found["end"] - found["start"] > MORE_REPEATED and _moved(found)):
        return Reading("ok", "Repetition", sentence)
    return Reading(
        "warning",
        "Repetition",
        f"{sentence} The policy has begun to repeat itself.",
        "Stop earlier, raise loss.beta, or add an SFT term (loss.mix with nll).",
    )


def _read_truncated(found: dict[str, float]) -> Reading:
    sentence = (
        f"{found['end']:.0%} of the samples were cut by the token limit "
        f"({found['start']:.0%} at the start)."
    )
    if found["end"] <= MANY_TRUNCATED:
        return Reading("ok", "Cut generations", sentence)
    worse = found["end"] > 2 * found["start"]
    return Reading(
        "warning" if worse else "note",
        "Cut generations",
        f"{sentence} KL and reward are those of the cut responses.",
        "The policy ends its responses more rarely than before: are the chosen responses of the "
        "data cut, or without an end?"
        if worse
        else "Raise evaluation.max_new_tokens.",
    )


def _read_empty(found: dict[str, float]) -> Reading | None:
    if found["end"] <= max(MANY_EMPTY, found["start"]):
        return None
    return Reading(
        "warning",
        "Empty generations",
        f"{found['end']:.0%} of the samples are empty ({found['start']:.0%} at the start).",
        "Look for empty chosen responses (dpo data check), or a smaller learning rate.",
    )
