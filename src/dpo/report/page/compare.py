"""`dpo compare`: runs side by side. What differs in their settings, what was measured of each,
tests on the held-out rows that they share, their curves in one figure, their answers by prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from dpo.atomic import write_text
from dpo.core.stats import holm, mcnemar_exact, paired_proportion_interval
from dpo.errors import InputError
from dpo.report.page import samples
from dpo.report.page.blocks import Cell, Code, Page, Table
from dpo.report.page.compared_curves import MetricCurve, compared_curves_figure
from dpo.report.page.folders import Margin, RunFolder, gather, number
from dpo.report.page.images import figures_of
from dpo.report.page.parts import browser, metric, run_link, sections
from dpo.report.page.render import render
from dpo.report.page.reproduce import settings_of
from dpo.report.page.verdict import ALPHA
from dpo.report.page.words import decimal, duration, listed, p_value, points
from dpo.report.page.write import PAGE
from dpo.report.runs import SUMMARY
from dpo.train.run import read_manifest

CURVES = {
    "eval/loss": "Held-out loss",
    "eval/rewards/accuracy": "Held-out accuracy",
    "eval/rewards/margin": "Held-out margin",
    "eval/logps/chosen_change": "log π(chosen), change (nats)",
    "eval/kl": "On-policy KL (nats)",
    "eval/reward": "Reward of samples",
}
"""The metrics that are drawn, those that at least two runs have."""


class Compared(NamedTuple):
    """Two runs on the held-out pairs that both have; the prompt is the unit."""

    a: str
    b: str
    num_pairs: int
    num_prompts: int
    difference: float
    """Mean over prompts of the share of right pairs of a minus that of b."""
    low: float
    high: float
    p: float
    """McNemar's exact test: prompts on which a has more pairs right, against those on which b has.
    """


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write `index.html` and the figure of some runs side by side; returns the page's file.

    Raises:
        InputError: fewer than two runs, one of them twice, or a folder that is no run.
        StorageError: a file cannot be written.
    """
    runs = gather_runs(folders)
    if read_manifest(out):
        raise InputError(f"--out: {out} is a run, whose own page would be lost; name another.")
    curves = [
        MetricCurve(CURVES[key], name, *_line(run, key))
        for key in CURVES
        if sum(any(key in row for row in run.held_out) for run in runs.values()) > 1
        for name, run in runs.items()
    ]
    if curves:
        compared_curves_figure(curves, out / "figures" / "comparison")
    else:
        out.mkdir(parents=True, exist_ok=True)
    file = out / PAGE
    write_text(file, render(comparison_page(runs, out)))
    return file


def gather_runs(folders: Sequence[Path]) -> dict[str, RunFolder]:
    """The runs by name: the ends of their paths, as much as tells them apart.

    Raises:
        InputError: fewer than two, one twice, or one that is no run.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise InputError("dpo compare: name two runs or more, each once.")
    found: list[RunFolder] = []
    for folder in folders:
        run = gather(folder)
        if not isinstance(run, RunFolder):
            raise InputError(f"{folder}: is no run of dpo sft, train, reward, online or ppo.")
        found.append(run)
    return dict(zip(names_of(folders), found, strict=True))


def names_of(folders: Sequence[Path]) -> list[str]:
    """As many parts from the end of each path as tell all apart.

    >>> names_of([Path("a/dpo"), Path("b/dpo")])
    ['a/dpo', 'b/dpo']
    """
    parts = [folder.resolve().parts for folder in folders]
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return ["/".join(path[-length:]) for path in parts]


def comparison_page(runs: Mapping[str, RunFolder], out: Path) -> Page:
    """The page of runs side by side."""
    tests = paired_accuracies(runs)
    words = [str(run.folder) for run in runs.values()]
    command = " ".join(["dpo compare", *words, f"--out {out}"])
    return Page(
        title=f"{len(runs)} runs side by side",
        about=f"Comparison: {listed(list(runs))}",
        verdict=comparison_verdict(runs, tests),
        sections=sections(
            ("results", "Held-out rows", [results_table(runs, out), tests_table(tests)]),
            ("curves", "Curves", figures_of(out)),
            ("settings", "What differs", [differences_table(runs)]),
            ("samples", "Samples", [browser(shared_samples(runs))]),
            ("reproduce", "How to reproduce", [Code("Command", command, is_open=True)]),
        ),
    )


# -- numbers -------------------------------------------------------------------------------------


def paired_accuracies(runs: Mapping[str, RunFolder]) -> list[Compared]:
    """Every two runs that were measured on held-out pairs of the same data."""
    found = []
    for a, b in combinations(runs, 2):
        if _data_of(runs[a]) != _data_of(runs[b]):
            continue
        num_pairs, by_prompt = _differences(runs[a].margins, runs[b].margins)
        if not by_prompt:
            continue
        low, high = paired_proportion_interval(by_prompt)
        mean = sum(by_prompt) / len(by_prompt)
        p = mcnemar_exact(sum(d > 0 for d in by_prompt), sum(d < 0 for d in by_prompt))
        found.append(Compared(a, b, num_pairs, len(by_prompt), mean, low, high, p))
    return [test._replace(p=p) for test, p in zip(found, holm([t.p for t in found]), strict=True)]


def _differences(a: Sequence[Margin], b: Sequence[Margin]) -> tuple[int, list[float]]:
    """How many pairs both have, and for each prompt of them the share right of a minus that of
    b.
    """
    right = {margin.pair: margin.margin > 0 for margin in b}
    by_prompt: dict[str, list[int]] = {}
    for margin in a:
        if margin.pair in right:
            difference = int(margin.margin > 0) - int(right[margin.pair])
            by_prompt.setdefault(margin.prompt, []).append(difference)
    num_pairs = sum(map(len, by_prompt.values()))
    return num_pairs, [sum(own) / len(own) for own in by_prompt.values()]


def _data_of(run: RunFolder) -> tuple[Any, ...]:
    """What decides which pairs are held out."""
    data = run.config.get("data") or {}
    digest = (run.config.get("resolved") or {}).get("data_sha256")
    return (digest, data.get("test"), data.get("test_fraction"), data.get("split_seed"))


def comparison_verdict(runs: Mapping[str, RunFolder], tests: Sequence[Compared]) -> list[str]:
    """What the paired tests say; that there is none, where there is none."""
    if not tests:
        return [
            "These runs share no held-out pairs with numbers of their own: nothing is tested, and "
            "the table is to be read with that in mind."
        ]
    apart = [test for test in tests if test.p < ALPHA]
    said = [
        f"{test.a if test.difference > 0 else test.b} ranks the chosen response first more often "
        f"than {test.b if test.difference > 0 else test.a}: {points(abs(test.difference))} points "
        f"on the same {test.num_pairs:,} held-out pairs ({p_value(test.p)})."
        for test in sorted(apart, key=lambda test: -abs(test.difference))[:3]
    ]
    rest = len(tests) - len(apart)
    if rest == len(tests):
        return [
            f"By their accuracy on the same held-out pairs, no two of the {len(runs)} runs can be "
            "told apart (McNemar's test after Holm's correction)."
        ]
    if rest:
        said.append(f"{rest} of the {len(tests)} pairs of runs cannot be told apart.")
    return said


def differences_table(runs: Mapping[str, RunFolder]) -> Table | None:
    """Only the settings in which the runs differ."""
    flat = {
        name: dict(_flat({"command": run.command, **settings_of(run.config)}))
        for name, run in runs.items()
    }
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = [
        [key, *(_text(values.get(key)) for values in flat.values())]
        for key in keys
        if len({json.dumps(values.get(key)) for values in flat.values()}) > 1
    ]
    if not rows:
        return Table(["setting", *runs], [["no setting differs", *("" for _ in runs)]])
    return Table(["setting", *runs], rows, note="All other settings are equal.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def results_table(runs: Mapping[str, RunFolder], out: Path) -> Table:
    """The last held-out numbers of every run, a column a run."""
    last = {name: run.held_out[-1] if run.held_out else {} for name, run in runs.items()}
    pages = [replace(run_link(out, run.folder), text="open") for run in runs.values()]
    rows: list[list[Cell]] = [
        ["page", *pages],
        ["command", *(run.command for run in runs.values())],
        ["optimizer steps", *(decimal(row.get("step")) for row in last.values())],
        ["training", *(duration(r.manifest.get("seconds_training")) for r in runs.values())],
    ]
    rows += [
        [name, *(metric(last[run], key, runs[run].margins) for run in runs)]
        for key, name in SUMMARY
        if not key.endswith("_stderr") and any(key in row for row in last.values())
    ]
    note = (
        "Accuracies with Wilson's 95% interval where the run kept its held-out rows; ± is one "
        "standard error over prompts. Losses of different kinds do not compare."
    )
    return Table(["metric", *runs], rows, note=note)


def tests_table(tests: Sequence[Compared]) -> Table | None:
    """Every paired test."""
    if not tests:
        return None
    rows = [
        [
            f"{test.a} − {test.b}",
            f"{test.num_pairs:,}",
            f"{test.num_prompts:,}",
            points(test.difference),
            f"[{points(test.low)}, {points(test.high)}]",
            p_value(test.p),
        ]
        for test in tests
    ]
    head = ["accuracy", "pairs", "prompts", "points", "95% interval", "p (Holm)"]
    return Table(
        head,
        rows,
        "Paired tests on the same held-out pairs",
        "A pair is right where the model prefers the chosen response; the unit is the prompt. "
        "Bonett and Price's interval, McNemar's exact test.",
    )


def _line(run: RunFolder, key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run.held_out if not math.isnan(number(row.get(key)))]
    return [number(row["step"]) for row in rows], [number(row[key]) for row in rows]


def shared_samples(runs: Mapping[str, RunFolder]) -> samples.Samples | None:
    """What every run generated, by prompt; those first that most runs have."""
    prompts: dict[str, dict[str, samples.Sample]] = {}
    for name, run in runs.items():
        for sample in samples.generations_of_run(run.folder, name):
            prompts.setdefault(sample.prompt, {})[name] = sample
    joined = []
    for prompt, by_run in sorted(prompts.items(), key=lambda item: -len(item[1])):
        first = next(iter(by_run.values()))
        given = [r for r in first.responses if r.given]
        answers = [r for sample in by_run.values() for r in sample.responses if not r.given]
        joined.append(samples.Sample(prompt, [*given, *answers]))
    return samples.within_limits(joined, f"the runs' {samples.GENERATIONS}")
