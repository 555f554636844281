"""What a study leaves: its table, its figures, samples side by side, and a page that shows them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.atomic import write_text
from dpo.core.stats import mean_interval
from dpo.data.audit import visible
from dpo.evaluate.jobs import Evaluation
from dpo.evaluate.records import ScoredGeneration
from dpo.evaluate.winrate import render_win_rates
from dpo.report.figures import TrainingCurve, training_curves_figure, win_rate_figure
from dpo.report.runs import tests_table

NUM_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class CellResult:
    """One run of a study: its held-out metrics over the epochs (nan where they do not apply)."""

    label: str
    seed: int
    folder: str
    epochs: list[float]
    loss: list[float]
    accuracy: list[float]
    chosen_change: list[float]
    kl: list[float]
    kl_stderr: list[float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Study:
    """A finished study."""

    folder: Path
    results: list[CellResult]
    evaluation: Evaluation

    def labels(self) -> list[str]:
        """The methods, in order."""
        return list(dict.fromkeys(result.label for result in self.results))

    def of(self, label: str) -> list[CellResult]:
        """The runs of a method, one a seed."""
        return [result for result in self.results if result.label == label]


COLUMNS = (
    "method",
    "seeds",
    "held-out loss",
    "reward accuracy",
    "log pi(chosen), change",
    "KL(policy || SFT)",
    "seconds a run",
)


def write_study(study: Study) -> None:
    """Figures, tables, samples and README.md in the study's folder, and the tables on the
    screen.
    """
    figures = study.folder / "figures"
    training_curves_figure(curves(study), figures / "training")
    win_rate_figure(study.evaluation.table, figures / "win_rate")
    rows = summary(study)
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *rows])
    write_text(study.folder / "table.csv", stream.getvalue())
    samples = side_by_side(study.evaluation.scored)
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_text(study.folder / "samples.jsonl", "".join(lines))
    write_text(study.folder / "README.md", page(study, rows, samples))
    console = Console()
    console.print(_table("Held-out metrics at the end of training", COLUMNS, rows))
    console.print(render_win_rates(study.evaluation.table))
    console.print(tests_table(study.evaluation.tests))
    console.print(Text(f"Page: {study.folder / 'README.md'}   figures: {figures}"))


def curves(study: Study) -> list[TrainingCurve]:
    """Held-out DPO loss and KL over the epochs, one curve a run."""
    return [
        TrainingCurve(
            label=result.label.removeprefix("DPO "),
            seed=result.seed,
            x=result.epochs,
            loss=result.loss,
            kl=result.kl,
            kl_stderr=result.kl_stderr,
        )
        for result in study.results
        if result.label.startswith("DPO")
    ]


def summary(study: Study) -> list[list[str]]:
    """One line a method: the mean over seeds, with Student's 95% interval where there are
    several.
    """
    rows: list[list[str]] = []
    for label in study.labels():
        runs = study.of(label)
        rows.append(
            [
                label,
                str(len(runs)),
                _mean([run.loss[-1] for run in runs]),
                _mean([run.accuracy[-1] for run in runs]),
                _mean([run.chosen_change[-1] for run in runs]),
                _mean([run.kl[-1] for run in runs]),
                _mean([run.seconds for run in runs], digits=0),
            ]
        )
    return rows


def _mean(values: Sequence[float], *, digits: int = 3) -> str:
    """Mean and interval as text; empty where the metric does not apply."""
    if any(math.isnan(value) for value in values):
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    low, high = mean_interval(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def side_by_side(scored: Sequence[ScoredGeneration]) -> list[dict[str, str]]:
    """For some prompts, every method's first response at the middle temperature."""
    models = [record for record in scored if record.kind == "model"]
    temperatures = sorted({r.temperature for r in models if r.temperature is not None})
    middle = temperatures[len(temperatures) // 2]
    found: dict[int, dict[str, str]] = {}
    for record in models:
        if record.temperature != middle or record.prompt_index >= NUM_SAMPLES:
            continue
        sample = found.setdefault(
            record.prompt_index,
            {
                "prompt": record.prompt,
                "chosen": record.chosen,
                "rejected": record.rejected,
                "temperature": f"{middle:g}",
            },
        )
        sample.setdefault(record.model, record.generated)
    return [found[index] for index in sorted(found)]


def page(study: Study, rows: Sequence[Sequence[str]], samples: Sequence[dict[str, str]]) -> str:
    """The study as Markdown: tables, figures, samples. Texts of models are code, never markup."""
    wins = [
        [
            row.model,
            "" if row.temperature is None else f"{row.temperature:g}",
            str(row.n),
            "" if row.win_rate is None else f"{row.win_rate:.1%}",
            f"[{row.low:.1%}, {row.high:.1%}]",
            str(row.ties),
        ]
        for row in study.evaluation.table
    ]
    head = ("response", "temperature", "n", "win rate", "95% interval", "ties")
    parts = [
        f"# Study {study.folder.name}",
        "Held-out prompts only. Means over seeds with Student's 95% interval.",
        _markdown(COLUMNS, rows),
        "![Held-out DPO loss and KL](figures/training.png)",
        "## Win rates",
        "A win: the response is nearer to the chosen than to the rejected response by "
        "Sentence-BERT cosine. The last rows are responses that know nothing: a win rate says "
        "something only where its interval is above theirs.",
        _markdown(head, wins),
        "![Win rate against temperature](figures/win_rate.png)",
        "## Samples",
        *(_sample(sample) for sample in samples),
    ]
    return "\n\n".join(parts) + "\n"


def _sample(sample: dict[str, str]) -> str:
    """One prompt with its responses, indented as code so that nothing in them is markup, and with
    control characters written out: pages are read in terminals too.
    """
    lines: list[str] = []
    for name, text in sample.items():
        indented = "\n".join(f"    {visible(line)}" for line in text.splitlines() or [""])
        lines += [f"**{name}**", "", indented, ""]
    return "\n".join(lines)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
