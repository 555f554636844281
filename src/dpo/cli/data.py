"""`dpo data`: look at preference data before training on it, or write the embedded data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo.cli.common import DATA, AsJSON, app
from dpo.cli.output import print_json, quiet_transformers
from dpo.cli.teaching import teach
from dpo.errors import InputError

data_app = typer.Typer(no_args_is_help=True, help="Look at preference data before training on it.")
app.add_typer(data_app, name="data", rich_help_panel=DATA)


@data_app.command(
    "check",
    help=teach(
        "Validate, count, measure, and show a few rows as the model will see them.",
        ("dpo data check prefs.jsonl", "Is every row valid? Duplicates, lengths, identical pairs."),
        (
            "dpo data check prefs.jsonl --tokenizer gpt2 --max-length 256",
            "In tokens: how many rows are cut, and which tokens are scored.",
        ),
        (
            "dpo data check mine.csv --column prompt=question --column chosen=better",
            "Columns of other names.",
        ),
    ),
)
def data_check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, folders, hub id.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Model folder or hub id whose tokenizer counts the tokens.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="plain, alpaca, hh, question, chat, or a text with {prompt}.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longer sequences are cut; none: 512.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Held-out source to compare prompts with.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows shown as they are tokenised.")] = 3,
    column: Annotated[
        list[str] | None, typer.Option(help="ours=yours, e.g. --column prompt=question.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    from dpo.report.data_check import check_data, print_check

    for name, value in (("--template", template), ("--max-length", max_length)):
        if value is not None and tokenizer is None:
            raise InputError(f"{name}: has no effect without a --tokenizer to count tokens with.")
    quiet_transformers()
    check = check_data(
        files,
        tokenizer=tokenizer,
        template=template,
        max_length=max_length or 512,
        test=test,
        split=split,
        columns=dict(_pair(text) for text in column or []),
    )
    if as_json:
        print_json(check.as_result())
    else:
        print_check(check, num_shown=rows)


def _pair(text: str) -> tuple[str, str]:
    ours, separator, yours = text.partition("=")
    if not (separator and ours and yours):
        raise InputError(f"--column {text}: expected ours=yours, e.g. prompt=question.")
    return ours, yours


@data_app.command(
    "synthetic",
    help=teach(
        "Write the embedded data as JSONL: questions and answers with a known reward.",
        ("dpo data synthetic prefs.jsonl --rows 500", "Preference pairs to try things on."),
    ),
)
def data_synthetic(
    out: Annotated[Path, typer.Argument(help="File to write, .jsonl.")],
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    demonstrations: Annotated[
        bool, typer.Option("--demonstrations", help="Answers to imitate instead of pairs.")
    ] = False,
) -> None:
    from dpo.data import synthetic
    from dpo.data.sources import write_jsonl

    if out.exists():  # it may be the user's own data, which nothing brings back
        raise InputError(f"{out} exists; name another file, or remove it first.")
    made = (
        synthetic.demonstrations(num_rows=rows, seed=seed)
        if demonstrations
        else synthetic.preferences(num_rows=rows, seed=seed)
    )
    write_jsonl(made, out)
    typer.echo(f"{len(made)} rows in {out}")
