"""What the policy's own samples tell: distance, diversity, length, repetition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo.evaluate.readings import Found, Reading, differ

LARGE_KL = 10.0
"""Nats a response, above which a note is made. A rule of thumb: what the policy says is then e^10
times as likely under it as under the reference, in the geometric mean."""
MANY_TRUNCATED = 0.2
MANY_EMPTY = 0.02
MORE_REPEATED = 0.05
"""Shares above which generations are warned of; of repeated 4-grams, above those at the start."""

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


def read_own_samples(first: dict[str, Any], last: dict[str, Any]) -> Found:
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
    readings = (read(numbers[name]) for name, read in READERS.items() if name in numbers)
    return numbers, [reading for reading in readings if reading is not None]


def _moved(found: dict[str, float]) -> bool:
    return differ(
        (found["start"], found.get("start_stderr", 0.0)),
        (found["end"], found.get("end_stderr", 0.0)),
    )


def _read_kl(found: dict[str, float]) -> Reading:
    reading = Reading(
        "ok",
        "Distance from the reference",
        f"KL(policy || reference) is {found['end']:.2f} ± {found['end_stderr']:.2f} nats a "
        "response (standard error), measured on the policy's own samples.",
    )
    if found["end"] <= LARGE_KL:
        return reading
    return reading.raised(
        "note",
        "That is far: rewards learnt near the reference say little out there.",
        "Compare with a run of larger loss.beta or fewer steps at its KL; if it is as good, take "
        "it. dpo evaluate shows whether this one is better at all.",
    )


def _read_entropy(found: dict[str, float]) -> Reading:
    reading = Reading(
        "ok",
        "Diversity",
        f"Entropy of the next token along the policy's own samples: {found['start']:.2f} nats at "
        f"the start, {found['end']:.2f} ± {found['end_stderr']:.2f} at the end.",
    )
    if not (found["end"] < found["start"] / 2 and _moved(found)):
        return reading
    return reading.raised(
        "warning",
        "It has more than halved: the policy has narrowed to few answers.",
        "Raise loss.beta or stop earlier; compare generations at temperature 1 side by side.",
    )


def _read_tokens(found: dict[str, float]) -> Reading:
    reading = Reading(
        "ok",
        "Length of generations",
        f"Samples have {found['start']:.1f} tokens on average at the start and "
        f"{found['end']:.1f} at the end.",
    )
    ratio = found["end"] / found["start"] if found["start"] else 1.0
    if 0.8 <= ratio <= 1.25 or not _moved(found):
        return reading
    how = "longer" if ratio > 1 else "shorter"
    return reading.raised(
        "note",
        "Judges often prefer a length, so a win rate may come from that alone.",
        f"Read the length-controlled win rate before you call the {how} responses better.",
    )


def _read_repeated(found: dict[str, float]) -> Reading:
    reading = Reading(
        "ok",
        "Repetition",
        f"Within a sample, {found['end']:.1%} of its sequences of four tokens occurred in it "
        f"before ({found['start']:.1%} at the start).",
    )
    if not (found["end"] - found["start"] > MORE_REPEATED and _moved(found)):
        return reading
    return reading.raised(
        "warning",
        "The policy has begun to repeat itself.",
        "Stop earlier, raise loss.beta, or add an SFT term (loss.mix with nll).",
    )


def _read_truncated(found: dict[str, float]) -> Reading:
    reading = Reading(
        "ok",
        "Cut generations",
        f"{found['end']:.0%} of the samples were cut by the token limit "
        f"({found['start']:.0%} at the start).",
    )
    if found["end"] <= MANY_TRUNCATED:
        return reading
    worse = found["end"] > 2 * found["start"]
    return reading.raised(
        "warning" if worse else "note",
        "KL and reward are those of the cut responses.",
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


READERS: dict[str, Callable[[dict[str, float]], Reading | None]] = {
    "kl": _read_kl,
    "entropy": _read_entropy,
    "sample_tokens": _read_tokens,
    "repeated_4grams": _read_repeated,
    "truncated": _read_truncated,
    "empty": _read_empty,
}
