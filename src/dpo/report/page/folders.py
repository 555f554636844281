"""What a folder of ours holds, read into plain values: the only part of a page that touches files.

A part that is not there is empty or None, and the page leaves it out.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.core.reward_losses import ordered_margins
from dpo.errors import InputError
from dpo.evaluate.arena.judgements import JUDGEMENTS, describe, read_judgements, summarise
from dpo.report.tables import Cells
from dpo.train.held_out import read_held_out
from dpo.train.reward import SCORED
from dpo.train.run import read_manifest, read_metrics
from dpo.train.session import DATA_AUDIT

TRAINING = ("sft", "train", "reward", "online", "ppo")
"""The commands whose run directories are runs."""

MARKS = {"grid": "experiment run", "responses_per_step": "experiment losses"}
"""A setting that only one study has: which command a folder without a word on it is of."""

STUDY_FILE = "study.yaml"
"""In a study's folder: its settings as they were given."""

Record = dict[str, Any]
"""One line of a JSONL file, one line of a CSV file, or a JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """By how much a finished run's model prefers the chosen response of one held-out pair: in nats
    of log-ratio, or in rewards of a reward model.
    """

    pair: str
    """Which pair of the data: equal in two runs that were measured on the same rows."""
    prompt: str
    """Pairs of one prompt are not independent of each other."""
    margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """A run directory of `dpo sft`, `train`, `reward`, `online` or `ppo`."""

    folder: Path
    command: str
    config: Record
    manifest: Record
    metrics: list[Record]
    audit: Record
    """The counts of `data/audit`, by name."""
    diagnostics: Record
    margins: list[Margin]
    judgements: list[Record]
    """Of people, as `dpo arena` sums them up: `pair`, and `lines` of labels with values."""

    @property
    def held_out(self) -> list[Record]:
        """The lines of metrics that were measured on held-out rows, in the order of the steps."""
        return [row for row in self.metrics if "eval/loss" in row]

    @property
    def finished(self) -> bool:
        return self.manifest.get("status") == "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFolder:
    """A folder of `dpo evaluate`: its win rates, their tests and whatever other table is there."""

    folder: Path
    meta: Record
    win_rates: list[Record]
    tests: list[Record]
    rewards: list[Record]
    head_to_head: list[Record]
    agreement: list[Record]
    judgements: list[Record]
    """Of people, as those of a run."""
    diagnostics: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFolder:
    """A folder of `dpo experiment` or `dpo demo`."""

    folder: Path
    command: str
    """Empty where the folder does not say which command made it."""
    config: Record
    manifest: Record
    table: list[Record]
    """The lines of table.csv."""
    tables: dict[str, list[Cells]]
    """Tables ready to be shown, by name, their heads first."""
    evaluation: EvaluationFolder | None
    runs: list[RunFolder]


Gathered = RunFolder | EvaluationFolder | StudyFolder


def gather(folder: Path) -> Gathered:
    """Read a run, an evaluation or a study.

    Raises:
        InputError: there is no such folder, or it holds none of them.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder.")
    if is_run(folder):
        return gather_run(folder)
    if (folder / "win_rates.json").is_file():
        return gather_evaluation(folder)
    if is_study(folder):
        return gather_study(folder)
    raise InputError(
        f"{folder}: holds no run, evaluation or study; expected metrics.jsonl, win_rates.json, or "
        "study.json or table.csv."
    )


def is_run(folder: Path) -> bool:
    """Whether a training command made the folder, and has begun."""
    return (folder / "metrics.jsonl").is_file() and _command(folder) in TRAINING


def is_study(folder: Path) -> bool:
    """Whether `dpo experiment` or `dpo demo` made the folder."""
    known = any((folder / name).is_file() for name in ("study.json", "table.csv"))
    return known or _command(folder).startswith("experiment ")


def gather_run(folder: Path) -> RunFolder:
    """Read a run directory."""
    config = read_json(folder / "config.json")
    return RunFolder(
        folder=folder,
        command=str(config.get("command", "")),
        config=config,
        manifest=read_manifest(folder),
        metrics=read_metrics(folder),
        audit=read_json(folder / DATA_AUDIT),
        diagnostics=read_json(folder / "diagnostics.json"),
        margins=held_out_margins(folder),
        judgements=read_people(folder / JUDGEMENTS),
    )


def gather_evaluation(folder: Path) -> EvaluationFolder:
    """Read a folder of `dpo evaluate`."""
    content = read_json(folder / "win_rates.json")
    return EvaluationFolder(
        folder=folder,
        meta=content.get("meta") or {},
        win_rates=content.get("win_rates") or [],
        tests=content.get("paired_tests") or [],
        rewards=read_csv(folder / "true_rewards.csv"),
        head_to_head=read_csv(folder / "head_to_head.csv"),
        agreement=read_csv(folder / "agreement.csv"),
        judgements=read_people(folder / JUDGEMENTS),
        diagnostics=read_json(folder / "diagnostics.json"),
    )


def read_people(file: Path) -> list[Record]:
    """What people judged, a summary for each two responders; empty where nobody did.

    Raises:
        InputError: the file is damaged.
    """
    judgements = read_judgements([file]) if file.is_file() else []
    return [
        {"pair": f"{summary.a} against {summary.b}", "lines": describe(summary)}
        for summary in summarise(judgements)
    ]


def gather_study(folder: Path) -> StudyFolder:
    """Read a study, the evaluation in it and the runs under it."""
    about = read_json(folder / "study.json")
    manifest = read_manifest(folder)
    config = about.get("config") or {}
    marked = next((command for key, command in MARKS.items() if key in config), "")
    evaluation = folder / "evaluation"
    return StudyFolder(
        folder=folder,
        command=str(_command(folder) or manifest.get("command") or marked),
        config=config,
        manifest=about.get("environment") or manifest,
        table=read_csv(folder / "table.csv"),
        tables=_ready_tables(folder),
        evaluation=gather_evaluation(evaluation)
        if (evaluation / "win_rates.json").is_file()
        else None,
        runs=[gather_run(run) for run in runs_in(folder)],
    )


def runs_in(folder: Path, depth: int = 4) -> list[Path]:
    """The run directories under a study's folder, in order of their names."""
    found: list[Path] = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if is_run(inner):
            found.append(inner)
        elif depth > 1 and not inner.is_symlink():
            found += runs_in(inner, depth - 1)
    return found


def held_out_margins(folder: Path) -> list[Margin]:
    """What the run's last evaluation left of every held-out pair; empty where it left nothing.

    Of a policy the margin is `log pi/pi_ref(chosen) - log pi/pi_ref(rejected)`, without the
    reference's terms where the loss has none.
    """
    seen: Counter[str] = Counter()
    found = []
    for pair in read_held_out(folder):
        margin = pair.chosen_logp - pair.rejected_logp
        if pair.reference_chosen_logp is not None and pair.reference_rejected_logp is not None:
            margin -= pair.reference_chosen_logp - pair.reference_rejected_logp
        row = pair.source or str(pair.row)
        found.append(Margin(pair=f"{row}/{seen[row]}", prompt=str(pair.prompt), margin=margin))
        seen[row] += 1
    return found or [
        Margin(pair=f"{line['source']}/{number}/{k}", prompt=str(line["prompt"]), margin=margin)
        for number, line in enumerate(read_jsonl(folder / "samples" / SCORED))
        for k, margin in enumerate(ordered_margins(line["rewards"], line["ranks"]))
    ]


def number(value: object) -> float:
    """A number of a file, written as one or as text; NaN where it is none."""
    with suppress(TypeError, ValueError):
        return float(value)  # type: ignore[arg-type]
    return float("nan")


# -- files ---------------------------------------------------------------------------------------


def read_json(file: Path) -> Record:
    """A JSON object; empty where there is no such file, or it is damaged."""
    with suppress(OSError, ValueError):
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def read_jsonl(file: Path) -> list[Record]:
    """The objects of a JSONL file; a torn or foreign line is none."""
    found: list[Record] = []
    with suppress(OSError), file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
    return found


def read_csv(file: Path) -> list[Record]:
    """The lines of a CSV file by the names in its head."""
    head, *lines = read_table(file) or [[]]
    return [dict(zip(head, line, strict=False)) for line in lines]


def read_table(file: Path) -> list[Cells]:
    """The cells of a CSV file, its head first; empty where there is no such file."""
    with (
        suppress(OSError, csv.Error),
        file.open(encoding="utf-8", errors="replace", newline="") as f,
    ):
        return [line for line in csv.reader(f) if line]
    return []


def _ready_tables(folder: Path) -> dict[str, list[Cells]]:
    """tables.json where the study wrote one, else table.csv as it is."""
    ready = read_json(folder / "tables.json")
    tables = {str(name): table for name, table in ready.items() if _is_table(table)}
    if tables:
        return tables
    table = read_table(folder / "table.csv")
    return {"table": table} if table else {}


def _is_table(value: Any) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(line, list) and all(isinstance(cell, str) for cell in line) for line in value
    )


def _command(folder: Path) -> str:
    return str(read_json(folder / "config.json").get("command", ""))
