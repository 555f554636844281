"""The commands that explain: every key, every loss, every statement of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo.cli.common import app
from dpo.errors import InputError


@app.command()
def config(
    command: Annotated[
        str, typer.Argument(help="sft, train, reward, online, ppo, evaluate or experiment.")
    ],
) -> None:
    """List every key of a command's configuration: type, default, meaning."""
    from dpo.report.settings import print_settings

    print_settings(command, _schema(command))


def _schema(command: str) -> type[Any]:
    """The configuration of a command."""
    from dpo import config, online_config

    known = {
        "sft": config.SFTConfig,
        "train": config.PreferenceConfig,
        "reward": config.RewardConfig,
        "online": online_config.OnlineConfig,
        "ppo": online_config.PPOConfig,
        "evaluate": config.EvaluateConfig,
    }
    if command == "experiment":  # heavy, so only where it is asked for
        from dpo.experiment.study import StudyConfig

        return StudyConfig
    if command not in known:
        raise InputError(f"{command}: expected one of {', '.join(known)}, experiment.")
    return known[command]


@app.command()
def losses(
    name: Annotated[
        str | None, typer.Argument(help="A loss to explain; without one, all are listed.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the pages of the documentation, with figures, to that folder."),
    ] = None,
) -> None:
    """List the losses with formula and source, or explain one: what it does, needs and takes."""
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


@app.command()
def theory(
    names: Annotated[
        list[str] | None, typer.Argument(help="Checks to run; all by default.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    """Check every statement of the report numerically: tolerance and measured error."""
    from rich.console import Console

    from dpo.theory import render, run, write_results

    results = run(names or None)
    Console().print(render(results))
    if json is not None:
        write_results(results, json)
    if not all(result.passed for result in results):
        raise typer.Exit(1)
