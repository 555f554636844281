"""The commands that look at what was trained: figures, win rates, pages, people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo.cli.common import (
    CONFIGURATION,
    Settings,
    TrustRemoteCode,
    app,
    leave_page,
    quiet_transformers,
    read,
)
from dpo.errors import InputError


@app.command(
    help="Sentence-BERT win rates on held-out prompts, with intervals, nulls and tests.\n\n"
    "Example: [cyan]dpo evaluate models.sft=runs/sft models.dpo=runs/first data=prefs.jsonl "
    "out=runs/evaluation[/cyan]"
    f"{CONFIGURATION}"
)
def evaluate(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.config import EvaluateConfig

    config = read(EvaluateConfig, settings)
    from dpo.evaluate.jobs import evaluate as run_evaluation
    from dpo.report.diagnostics_figures import leave_diagnosis, print_readings
    from dpo.report.runs import finish_evaluation

    quiet_transformers()
    evaluation = run_evaluation(config, trust_remote_code=trust_remote_code)
    finish_evaluation(evaluation)
    print_readings(leave_diagnosis(evaluation.folder), evaluation.folder)
    leave_page(evaluation.folder)


@app.command()
def arena(
    context: typer.Context,
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", help="Evaluations or runs; with --summary, files of judgements."
        ),
    ],
    a: Annotated[str | None, typer.Option(help="Whose answers; models, chosen, rejected.")] = None,
    b: Annotated[str | None, typer.Option(help="Against whose; chosen for a single model.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Judgements. Default: judgements.jsonl in the first FOLDER.")
    ] = None,
    annotator: Annotated[str, typer.Option(help="Who judges.")] = "anonymous",
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Answers at this one only.")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="A seeded choice.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order, and which answer is on the left.")] = 0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
    summary: Annotated[
        bool, typer.Option("--summary", help="Only sum up files of judgements.")
    ] = False,
) -> None:
    """Judge answers side by side on a local page, without knowing whose they are.

    Example: [cyan]dpo arena runs/evaluation --a sft --b dpo[/cyan]
    """
    from dpo.evaluate.arena.jobs import hold_arena, summarise_files

    if summary:
        for name in _given(context):
            if name not in ("folders", "summary"):
                raise InputError(f"--{name.replace('_', '-')}: has no effect with --summary.")
        summarise_files(folders)
        return
    hold_arena(
        folders,
        a=a,
        b=b,
        out=out,
        annotator=annotator,
        temperature=temperature,
        max_prompts=max_prompts,
        seed=seed,
        port=port,
    )


def _given(context: typer.Context) -> list[str]:
    """The parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


@app.command()
def diagnose(
    folder: Annotated[
        Path, typer.Argument(help="A run's folder, or an evaluation's.", metavar="FOLDER")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where the files go, if not into that folder.")
    ] = None,
) -> None:
    """What a run shows beside its loss: displacement, length, diversity, subsets, calibration.

    From the files in its folder alone: writes diagnostics.json and figures, and prints warnings.
    For an evaluation: what its generations are like, and length-controlled win rates.
    """
    from dpo.report.diagnostics_figures import leave_diagnosis, print_readings

    print_readings(leave_diagnosis(folder, out), out or folder)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Runs, evaluations, studies.")
    ],
) -> None:
    """Write index.html again from a folder's files: one page that opens from disk.

    Example: [cyan]dpo report runs/dpo runs/evaluation[/cyan]
    """
    from dpo.report.page.write import write_page

    for folder in folders:
        typer.echo(write_page(folder))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories.")],
    out: Annotated[Path, typer.Option(help="Where the page and its figure go.")],
) -> None:
    """Runs side by side in one page: settings that differ, metrics, paired tests, samples.

    Example: [cyan]dpo compare runs/dpo runs/ipo --out runs/comparison[/cyan]
    """
    from dpo.report.page.compare import write_comparison

    typer.echo(write_comparison(runs, out))
