"""The page of a folder of `dpo experiment` or `dpo demo`."""

from __future__ import annotations

import shlex
from dataclasses import replace

from dpo.report.page import samples
from dpo.report.page.blocks import Block, Cell, Code, Facts, Page, Table
from dpo.report.page.evaluation_page import result_tables
from dpo.report.page.folders import STUDY_FILE, Record, StudyFolder
from dpo.report.page.images import figures_of
from dpo.report.page.parts import (
    as_yaml,
    browser,
    diagnostics_blocks,
    model_name,
    page_title,
    people_blocks,
    plain_table,
    run_link,
    sections,
)
from dpo.report.page.verdict import study_verdict
from dpo.report.page.words import decimal, duration


def study_page(study: StudyFolder) -> Page:
    """The page of a folder of `dpo experiment` or `dpo demo`."""
    evaluation = study.evaluation
    held = evaluation.folder if evaluation is not None else None
    return Page(
        title=page_title(study.folder),
        about=f"Study: dpo {study.command}" if study.command else "Study",
        verdict=study_verdict(study),
        sections=sections(
            ("run", "What was run", [Facts(facts)] if (facts := study_facts(study)) else []),
            ("results", "Results", study_tables(study)),
            ("figures", "Figures", figures_of(study.folder)),
            ("evaluation", "Win rates", [] if evaluation is None else result_tables(evaluation)),
            (
                "samples",
                "Samples",
                [browser(None if held is None else samples.of_evaluation(held))],
            ),
            ("people", "What people say", people_blocks(judgements_in(study))),
            ("diagnostics", "Diagnostics", study_diagnostics(study)),
            ("runs", "Runs", [runs_table(study)]),
            ("configuration", "Configuration", [as_yaml("Configuration", study.config)]),
            ("environment", "Environment", [as_yaml("Environment", study.manifest)]),
            ("reproduce", "How to reproduce", reproduce_study(study)),
        ),
    )


def study_facts(study: StudyFolder) -> list[tuple[str, str]]:
    """What was run and when."""
    seeds = study.config.get("seeds")
    facts = [
        ("Command", f"dpo {study.command}" if study.command else ""),
        ("Starts from", model_name(study.config.get("model"))),
        ("Seeds", ", ".join(map(str, seeds)) if seeds else decimal(study.manifest.get("seed"))),
        ("Runs", f"{len(study.runs):,}" if study.runs else ""),
        ("Ended", str(study.manifest.get("created", ""))),
        ("Device", str(study.manifest.get("device", ""))),
        ("Status", str(study.manifest.get("status", ""))),
    ]
    return [(name, value) for name, value in facts if value]


def study_tables(study: StudyFolder) -> list[Block | None]:
    """The study's tables, what it was measured on last."""
    named = sorted(study.tables.items(), key=lambda item: item[0] == "facts")
    return [
        plain_table(table, "" if name == "table" else name.capitalize()) for name, table in named
    ]


def judgements_in(study: StudyFolder) -> list[Record]:
    """What people judged of the study's evaluation, and of its runs."""
    of_evaluation = [] if study.evaluation is None else study.evaluation.judgements
    return [*of_evaluation, *(summary for run in study.runs for summary in run.judgements)]


def study_diagnostics(study: StudyFolder) -> list[Block | None]:
    """What was found in each run, with the way to its page; and the evaluation's diagnostics."""
    evaluation = study.evaluation
    of_evaluation = (
        []
        if evaluation is None
        else diagnostics_blocks(evaluation.folder, evaluation.diagnostics, page=study.folder)
    )
    return [findings_table(study), *of_evaluation]


def findings_table(study: StudyFolder) -> Table | None:
    """The titles of the warnings and notes of every run that was diagnosed."""
    rows: list[list[Cell]] = []
    for run in study.runs:
        readings = run.diagnostics.get("readings")
        if readings is None:
            continue
        link = run_link(study.folder, run.folder)
        titles = [
            ", ".join(str(r.get("title")) for r in readings if r.get("level") == level)
            for level in ("warning", "note")
        ]
        rows.append([replace(link, href=f"{link.href}#diagnostics"), *titles])
    if not rows:
        return None
    note = "What each says, and what to do about it, stands in the page of the run."
    return Table(["run", "warnings", "notes"], rows, "Diagnostics of the runs", note)


def runs_table(study: StudyFolder) -> Table | None:
    """Every run with its last held-out numbers, each a link to its page."""
    if not study.runs:
        return None
    names = {
        "eval/loss": "held-out loss",
        "eval/rewards/accuracy": "accuracy",
        "eval/kl": "KL",
        "eval/reward": "reward",
    }
    last = [run.held_out[-1] if run.held_out else {} for run in study.runs]
    columns = [key for key in names if any(key in row for row in last)]
    rows: list[list[Cell]] = [
        [
            run_link(study.folder, run.folder),
            run.command,
            str(run.manifest.get("status", "")),
            decimal(run.manifest.get("steps")),
            duration(run.manifest.get("seconds_training")),
            *(decimal(row.get(key), 3) for key in columns),
        ]
        for run, row in zip(study.runs, last, strict=True)
    ]
    head = ["run", "command", "status", "steps", "training", *(names[key] for key in columns)]
    note = "Held-out numbers at the end of each run; losses of different kinds do not compare."
    return Table(head, rows, note=note)


def reproduce_study(study: StudyFolder) -> list[Block]:
    """The command, where the folder holds what it takes."""
    out = str(study.folder)
    if study.command == "demo" and "short" in study.manifest:
        short = " --short" if study.manifest["short"] else ""
        command = f"dpo demo --out {shlex.quote(out)} --seed {study.manifest.get('seed')}{short}"
        return [Code("Command", command, is_open=True)]
    file = study.folder / STUDY_FILE
    if not study.command or not file.is_file():
        return []
    command = f"dpo {study.command} {shlex.quote(str(file))} out=another-folder"
    settings = Code(STUDY_FILE, file.read_text(encoding="utf-8", errors="replace"))
    return [Code("Command", command, is_open=True), settings]
