"""`dpo init`: a recipe to start from."""

from __future__ import annotations

from pathlib import Path

import typer

from dpo.cli.common import DATA, Settings, app, read
from dpo.cli.teaching import teach


@app.command(
    rich_help_panel=DATA,
    help=teach(
        "Look at your data and write a commented recipe for it and your model.",
        ("dpo init data=prefs.jsonl model=gpt2", "recipe.yaml, for what the rows are good for."),
        (
            "dpo init data=prefs.jsonl model=gpt2 command=sft out=sft.yaml",
            "For another command: sft, train or reward.",
        ),
        (
            "dpo init data=mine.csv data.columns.prompt=question model=runs/sft",
            "With columns of other names; usual ones are guessed.",
        ),
        more="The recipe is YAML; every key in it says what it means. An existing file stays.",
    ),
)
def init(settings: Settings = None) -> None:
    from dpo.train.recipe import InitConfig, make_recipe, write_recipe

    config = read(InitConfig, settings)
    file = Path(config.out)
    recipe = make_recipe(config)
    write_recipe(recipe, file)
    typer.echo(f"{file}: a recipe for dpo {recipe.command}, from {recipe.seen}.")
    for remark in recipe.remarks:
        typer.echo(remark)
    typer.echo(f"Next: dpo {recipe.command} {file} --dry-run")
