"""The commands that look at what was trained: figures, win rates, pages, people."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dpo.cli.common import MEASURE, AsJSON, Settings, TrustRemoteCode, app, read
from dpo.cli.output import finish, leave_page, on_screen, print_json, quiet_transformers
from dpo.cli.teaching import CONFIGURATION, teach
from dpo.errors import InputError


@app.command(
    rich_help_panel=MEASURE,
    help=teach(
        "Sentence-BERT win rates on held-out prompts, with intervals, nulls and tests.",
        (
            "dpo evaluate models.sft=runs/sft models.dpo=runs/dpo data=prefs.jsonl out=runs/wins",
            "Two models on the prompts that neither was trained on.",
        ),
        (
            "dpo evaluate models.dpo=runs/dpo data=prefs.jsonl out=runs/judged judges=[reward] "
            "reward=runs/reward",
            "Against the chosen responses, by a reward model.",
        ),
        (
            "dpo evaluate models.dpo=runs/dpo data=prefs.jsonl out=runs/fast max_prompts=50 --json",
            "A quick look for a script.",
        ),
        more=CONFIGURATION,
    ),
)
def evaluate(
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJSON = False,
) -> None:
    from dpo.evaluation_config import EvaluateConfig

    config = read(EvaluateConfig, settings)
    from dpo.evaluate.jobs import evaluate as run_evaluation
    from dpo.report.diagnostics_figures import leave_diagnosis, print_readings
    from dpo.report.evaluation_screen import finish_evaluation
    from dpo.report.results import evaluation_result

    quiet_transformers()
    with on_screen(as_json=as_json):
        evaluation = run_evaluation(config, trust_remote_code=trust_remote_code)
        finish_evaluation(evaluation)
        diagnosis = leave_diagnosis(evaluation.folder)
        print_readings(diagnosis, evaluation.folder)
        leave_page(evaluation.folder)
    finish(lambda: evaluation_result(evaluation, diagnosis), as_json=as_json)


@app.command(
    rich_help_panel=MEASURE,
    help=teach(
        "Judge answers side by side on a local page, without knowing whose they are.",
        ("dpo arena runs/evaluation --a sft --b dpo", "Two models of an evaluation."),
        ("dpo arena runs/dpo --annotator ann", "A run's samples against the chosen responses."),
        ("dpo arena --summary a.jsonl b.jsonl", "Win rates and agreement of what was judged."),
    ),
)
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


@app.command(
    rich_help_panel=MEASURE,
    help=teach(
        "What a run shows beside its loss: displacement, length, diversity, subsets, calibration.",
        ("dpo diagnose runs/dpo", "Diagnostics and figures again, from the run's files alone."),
        (
            "dpo diagnose runs/evaluation --json",
            "Of an evaluation: what its generations are like, and length-controlled win rates.",
        ),
    ),
)
def diagnose(
    folder: Annotated[
        Path, typer.Argument(help="A run's folder, or an evaluation's.", metavar="FOLDER")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where the files go, if not into that folder.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    from dpo.report.diagnostics_figures import leave_diagnosis, print_readings

    diagnosis = leave_diagnosis(folder, out)
    if as_json:
        print_json(asdict(diagnosis))
    else:
        print_readings(diagnosis, out or folder)


@app.command(
    rich_help_panel=MEASURE,
    help=teach(
        "Write index.html again from a folder's files: one page that opens from disk.",
        ("dpo report runs/dpo runs/evaluation", "Of a run and an evaluation."),
    ),
)
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Runs, evaluations, studies.")
    ],
) -> None:
    from dpo.report.page.write import write_page

    for folder in folders:
        typer.echo(write_page(folder))


@app.command(
    rich_help_panel=MEASURE,
    help=teach(
        "Runs side by side in one page: settings that differ, metrics, paired tests, samples.",
        ("dpo compare runs/dpo runs/ipo --out runs/comparison", "A page."),
        ("dpo compare runs/dpo runs/ipo --out runs/comparison --json", "Its numbers as well."),
    ),
)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories.")],
    out: Annotated[Path, typer.Option(help="Where the page and its figure go.")],
    as_json: AsJSON = False,
) -> None:
    from dpo.report.page.compare import write_comparison
    from dpo.report.results import comparison_result

    page = write_comparison(runs, out)
    if as_json:
        print_json(comparison_result(runs, page))
    else:
        typer.echo(page)
