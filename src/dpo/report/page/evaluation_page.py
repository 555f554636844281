"""The page of a folder of `dpo evaluate`, and the tables that a study shows of its evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpo.report.page import samples
from dpo.report.page.blocks import Block, Code, Facts, Page, Table
from dpo.report.page.folders import EvaluationFolder, Record, number
from dpo.report.page.images import figures_of
from dpo.report.page.parts import (
    as_yaml,
    browser,
    data_name,
    diagnostics_blocks,
    page_title,
    people_blocks,
    sections,
)
from dpo.report.page.reproduce import command_line, settings_of_evaluation
from dpo.report.page.verdict import evaluation_verdict, strongest_null
from dpo.report.page.words import decimal, interval_of_shares, p_value, points, share


def evaluation_page(evaluation: EvaluationFolder) -> Page:
    """The page of a folder of `dpo evaluate`."""
    settings = settings_of_evaluation(evaluation.meta)
    command = command_line("evaluate", settings, evaluation.folder) if settings else ""
    return Page(
        title=page_title(evaluation.folder),
        about="Evaluation on held-out prompts: dpo evaluate",
        verdict=evaluation_verdict(evaluation),
        sections=sections(
            ("run", "What was run", [Facts(evaluation_facts(evaluation.meta))]),
            ("results", "Win rates", [*figures_of(evaluation.folder), *result_tables(evaluation)]),
            ("samples", "Samples", [browser(samples.of_evaluation(evaluation.folder))]),
            ("people", "What people say", people_blocks(evaluation.judgements)),
            (
                "diagnostics",
                "Diagnostics",
                diagnostics_blocks(evaluation.folder, evaluation.diagnostics),
            ),
            ("configuration", "Configuration", [as_yaml("win_rates.json", evaluation.meta)]),
            ("reproduce", "How to reproduce", [Code("Command", command, True)] if command else []),
        ),
    )


def evaluation_facts(meta: Record) -> list[tuple[str, str]]:
    """Who was asked what, and who judges."""
    models = meta.get("models") or {}
    temperatures = meta.get("temperatures") or []
    facts = [
        ("Command", "dpo evaluate"),
        *((f"Model {name}", str(path)) for name, path in models.items()),
        ("Data", data_name(meta.get("data"))),
        ("Held-out prompts", decimal(meta.get("num_prompts"))),
        ("Samples a prompt", decimal(meta.get("samples_per_prompt"))),
        ("Temperatures", ", ".join(decimal(t) for t in temperatures)),
        ("Judge", str(meta.get("sentence_model", ""))),
        ("Seed", decimal(meta.get("seed"))),
    ]
    return [(name, value) for name, value in facts if value]


def result_tables(evaluation: EvaluationFolder) -> list[Block]:
    """Win rates with their nulls, true rewards, tests, and whatever else was judged."""
    blocks = [
        win_rate_table(evaluation),
        reward_table(evaluation.rewards),
        tests_table(evaluation.tests, power_note(evaluation.meta)),
        head_to_head_table(evaluation.head_to_head),
        agreement_table(evaluation.agreement),
    ]
    return [block for block in blocks if block is not None]


def win_rate_table(evaluation: EvaluationFolder) -> Table | None:
    """A line for each model and temperature, the null responses last."""
    rows = evaluation.win_rates
    if not rows:
        return None
    null = strongest_null(rows)
    head = [
        "response",
        "temperature",
        "n",
        "win rate",
        "interval",
        "ties",
        "mean tokens",
        "cut off",
    ]
    lines = [
        [
            str(row["model"]) if row.get("kind") == "model" else f"{row['model']} (null)",
            decimal(row.get("temperature")),
            decimal(row.get("n")),
            share(row.get("win_rate")),
            interval_of_shares(row.get("low"), row.get("high")),
            decimal(row.get("ties")),
            "" if row.get("mean_tokens") is None else f"{number(row['mean_tokens']):.1f}",
            share(row.get("truncated_share")) if row.get("kind") == "model" else "",
        ]
        for row in rows
    ]
    note = (
        "A win: nearer to the chosen than to the rejected response, by Sentence-BERT cosine; ties "
        f"are left out of the rate. Intervals are {share(rows[0].get('confidence', 0.95))}."
    )
    if null is not None:
        note += (
            f" The rows called null know nothing of the prompt; the strongest, {null['model']}, is "
            "what a model has to beat."
        )
    return Table(head, lines, "Win rates", note)


def tests_table(tests: Sequence[Record], power: str) -> Table | None:
    """Differences on the same prompts, with p-values corrected for their number."""
    if not tests:
        return None
    lines = [
        [
            f"{test['model_a']} − {test['model_b']}",
            decimal(test.get("temperature")),
            decimal(test.get("num_prompts")),
            points(test.get("difference")),
            f"[{points(test.get('low'))}, {points(test.get('high'))}]",
            p_value(test.get("mcnemar_p_holm")),
            p_value(test.get("permutation_p_holm")),
        ]
        for test in tests
    ]
    head = ["difference", "temperature", "prompts", "points", "interval", "wins", "margins"]
    note = (
        "Percentage points of win rate. Wins: McNemar's exact test; margins: permutation test of "
        "the mean margin; both after Holm's correction within the family of tests." + power
    )
    return Table(head, lines, "Paired tests on the same prompts", note)


def power_note(meta: Record) -> str:
    """What the tests between models can see; empty where the evaluation does not say."""
    power = meta.get("power") or {}
    for family in power.get("families") or []:
        if family.get("family") == "models":
            smallest = number(family.get("smallest_difference"))
            seen = "none" if math.isnan(smallest) else f"one of {100 * smallest:.1f} points"
            return (
                f" A difference of {100 * number(power.get('difference')):g} points shows with "
                f"probability {number(power.get('power')):.0%} on {family['prompts_needed']:,} "
                f"prompts, in one test; on these {family['num_prompts']:,} {seen} does."
            )
    return ""


def head_to_head_table(rows: Sequence[Record]) -> Table | None:
    """Every judge's verdicts on a against b."""
    if not rows:
        return None
    lines = [
        [
            str(row["judge"]),
            f"{row['a']} against {row['b']}",
            decimal(row["temperature"]),
            decimal(row["n"]),
            share(row["win_rate"]),
            interval_of_shares(row["low"], row["high"]),
            decimal(row["ties"]),
            p_value(row["sign_p_holm"]),
        ]
        for row in rows
    ]
    head = ["judge", "comparison", "temperature", "n", "win rate", "interval", "ties", "p (Holm)"]
    note = "Wins of the first among decided comparisons; p: sign test over prompts."
    return Table(head, lines, "Head to head", note)


def agreement_table(rows: Sequence[Record]) -> Table | None:
    """How far every two judges agree."""
    if not rows:
        return None
    lines = [
        [
            f"{row['judge_a']}, {row['judge_b']}",
            str(row["family"]),
            decimal(row["n"]),
            share(row["agreement"]),
            decimal(row["kappa"], 2),
            f"[{decimal(row['low'], 2)}, {decimal(row['high'], 2)}]" if row["low"] else "",
        ]
        for row in rows
    ]
    head = ["judges", "comparisons", "n", "agree", "kappa", "interval"]
    note = "Cohen's kappa over win, loss and tie; bootstrap over prompts."
    return Table(head, lines, "Agreement between judges", note)


def reward_table(rows: Sequence[Record]) -> Table | None:
    """The true reward, where the data have one."""
    if not rows:
        return None
    lines = [
        [
            str(row["model"]),
            decimal(row["temperature"]),
            decimal(row["n"]),
            f"{number(row['reward']):.2f}",
            f"[{number(row['low']):.2f}, {number(row['high']):.2f}]",
            *(share(row[name]) for name in ("right", "polite", "rude")),
        ]
        for row in rows
    ]
    head = ["model", "temperature", "n", "reward", "95% interval", "right", "polite", "rude"]
    return Table(head, lines, "True reward of the embedded language")
