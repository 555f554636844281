"""The commands that explain: every key, every loss, every statement of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo.cli.common import EXPLAIN, app
from dpo.cli.completion import complete_command, complete_loss
from dpo.cli.teaching import teach
from dpo.errors import InputError, did_you_mean


@app.command(
    rich_help_panel=EXPLAIN,
    help=teach(
        "List every key of a command's configuration: type, default, meaning.",
        ("dpo config train", "What dpo train can be told."),
    ),
)
def config(
    command: Annotated[
        str,
        typer.Argument(
            help="sft, train, reward, online, ppo, evaluate, plan or experiment.",
            autocompletion=complete_command,
        ),
    ],
) -> None:
    from dpo.report.settings import print_settings

    print_settings(command, _schema(command))


def _schema(command: str) -> type[Any]:
    """The configuration of a command."""
    if command == "experiment":  # heavy, so only where it is asked for
        from dpo.experiment.study import StudyConfig

        return StudyConfig
    from dpo.schemas import SCHEMAS

    if command not in SCHEMAS:
        names = [*SCHEMAS, "experiment"]
        hint = did_you_mean(command, names) or "."
        raise InputError(f"{command}: expected one of {', '.join(names)}{hint}")
    return SCHEMAS[command]


@app.command(
    rich_help_panel=EXPLAIN,
    help=teach(
        "List the losses with formula and source, or explain one: what it does, needs and takes.",
        ("dpo losses", "All of them."),
        ("dpo losses simpo", "One, with its options."),
    ),
)
def losses(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A loss to explain; without one, all are listed.", autocompletion=complete_loss
        ),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the pages of the documentation, with figures, to that folder."),
    ] = None,
) -> None:
    from dpo.loss_config import LOSS_CONFIGS, describe_unknown_loss

    if name is not None and name not in LOSS_CONFIGS and name != "mix":
        raise InputError(f"{name}: {describe_unknown_loss(name)}.")
    from dpo.report.loss_pages import print_loss, print_losses, write_pages

    if write is not None:
        write_pages(write)
    elif name is not None:
        print_loss(name)
    else:
        print_losses()


@app.command(
    rich_help_panel=EXPLAIN,
    help=teach(
        "Check every statement of the report numerically: tolerance and measured error.",
        ("dpo theory", "All checks, in seconds."),
        ("dpo theory preferences --json results.json", "Those of a chapter, into a file."),
    ),
)
def theory(
    names: Annotated[
        list[str] | None, typer.Argument(help="Checks to run; all by default.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    from rich.console import Console

    from dpo.theory import render, run, write_results

    results = run(names or None)
    Console().print(render(results))
    if json is not None:
        write_results(results, json)
    if not all(result.passed for result in results):
        raise typer.Exit(1)
