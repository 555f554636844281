"""The result of a command as one JSON object, for scripts: `dpo COMMAND --json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo.data.files import printable
from dpo.evaluate.jobs import Evaluation
from dpo.evaluate.readings import Diagnosis
from dpo.report.page.compare import Compared, gather_runs, paired_accuracies
from dpo.report.page.folders import RunFolder, StudyFolder, gather
from dpo.report.page.write import PAGE
from dpo.report.runs import run_ends

Result = dict[str, Any]
"""Numbers, texts, lists and objects; a number that is not finite is written as text."""


def run_result(folder: Path) -> Result:
    """Of a run: where its model is, how long it took, its held-out metrics and what is remarkable.

    Raises:
        InputError: the folder holds no run, or one without held-out metrics.
    """
    run = gather(folder)
    assert isinstance(run, RunFolder)
    of_manifest = ("status", "steps", "best_step", "best_loss", "seconds_training")
    return {
        "command": run.command,
        "folder": str(folder),
        "model": str(folder / "model"),
        **_page(folder),
        **{name: run.manifest.get(name) for name in of_manifest},
        "held_out": run_ends(folder, run.metrics),
        "findings": remarkable(run.diagnostics.get("readings", [])),
    }


def evaluation_result(evaluation: Evaluation, diagnosis: Diagnosis) -> Result:
    """Of an evaluation: every row of its tables, and what is remarkable."""
    duels = evaluation.duels
    return {
        "command": "evaluate",
        "folder": str(evaluation.folder),
        **_page(evaluation.folder),
        "win_rates": [asdict(row) for row in evaluation.table],
        "tests": [asdict(row) for row in evaluation.tests],
        "rewards": [asdict(row) for row in evaluation.rewards],
        "head_to_head": [] if duels is None else [asdict(row) for row in duels.table],
        "agreement": [] if duels is None else [asdict(row) for row in duels.agreement],
        "findings": remarkable([asdict(reading) for reading in diagnosis.readings]),
    }


def study_result(folder: Path) -> Result:
    """Of a study: its tables, each a list of rows by the names in its head.

    Raises:
        InputError: the folder holds no study.
    """
    study = gather(folder)
    assert isinstance(study, StudyFolder)
    tables = {
        name: [dict(zip(table[0], row, strict=False)) for row in table[1:]]
        for name, table in study.tables.items()
    }
    return {
        "command": study.command,
        "folder": str(folder),
        **_page(folder),
        "runs": [str(run.folder) for run in study.runs],
        "tables": tables,
    }


def comparison_result(folders: Sequence[Path], page: Path) -> Result:
    """Of runs side by side: the last held-out metrics of each, and every paired test.

    Raises:
        InputError: as `gather_runs`.
    """
    runs = gather_runs(folders)
    tests: list[Compared] = paired_accuracies(runs)
    return {
        "command": "compare",
        "page": str(page),
        "runs": {
            name: {
                "folder": str(run.folder),
                "command": run.command,
                "held_out": run.held_out[-1] if run.held_out else None,
            }
            for name, run in runs.items()
        },
        "tests": [test._asdict() for test in tests],
    }


def remarkable(readings: Sequence[Result]) -> list[Result]:
    """Warnings, then notes."""
    return [r for level in ("warning", "note") for r in readings if r.get("level") == level]


def warnings_of(result: Result) -> list[str]:
    """Each warning of a result as one line."""
    lines = [
        f"{finding['title']}. {finding['sentence']} {finding['what_to_do']}".strip()
        for finding in result.get("findings", [])
        if finding["level"] == "warning"
    ]
    return [printable(line, limit=len(line)) for line in lines]


def _page(folder: Path) -> Result:
    file = folder / PAGE
    return {"page": str(file) if file.is_file() else None}
