"""`dpo demo` and `dpo experiment`: many runs, one table."""

from __future__ import annotations

from enum import Enum
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

experiment_app = typer.Typer(no_args_is_help=True, help="Run a study: many runs, one table.")
app.add_typer(experiment_app, name="experiment")


class Engine(str, Enum):
    """Where a study trains."""

    LOCAL = "local"
    RAY = "ray"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Data, weights, order, samples.")] = 0,
    short: Annotated[
        bool, typer.Option("--short", help="A tenth of the steps: shows that all works.")
    ] = False,
) -> None:
    """The whole method in minutes, on the embedded data: base, SFT, DPO at three betas, evaluation.

    Needs no network and no GPU. Ends with a table of true reward, KL and win rates, and figures.
    """
    from dpo.experiment.demo import run_demo

    quiet_transformers()
    run_demo(out, seed=seed, short=short)
    leave_page(out)


@experiment_app.command(
    "run",
    help="Every run of a study, its table and figures; finished runs are not repeated.\n\n"
    "Example: [cyan]dpo experiment run studies/instruction.yaml data.path=prefs.json[/cyan]"
    f"{CONFIGURATION}",
)
def experiment_run(
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    engine: Annotated[
        Engine,
        typer.Option(help="ray: train on the cluster of RAY_ADDRESS, or on all cores through Ray."),
    ] = Engine.LOCAL,
) -> None:
    from dpo.experiment.study import StudyConfig, run_study

    config = read(StudyConfig, settings)
    quiet_transformers()
    run_study(config, trust_remote_code=trust_remote_code, use_ray=engine is Engine.RAY)
    leave_page(Path(config.out), config)


@experiment_app.command(
    "losses",
    help="Every loss on the embedded data, from one SFT model a seed: true reward, KL, figure.\n\n"
    "Example: [cyan]dpo experiment losses studies/losses.yaml out=runs/losses[/cyan]\n\n"
    "The file shows every key; key=value sets one.",
)
def experiment_losses(settings: Settings = None) -> None:
    from dpo.experiment.losses import LossStudyConfig, run_losses

    config = read(LossStudyConfig, settings)
    quiet_transformers()
    run_losses(config)
    leave_page(Path(config.out), config)


@experiment_app.command(
    "exact",
    help="DPO, PPO and their rivals in a world whose optimal policy is known.\n\n"
    "Example: [cyan]dpo experiment exact studies/exact.yaml out=runs/exact[/cyan]\n\n"
    "The file shows every key; key=value sets one.",
)
def experiment_exact(
    settings: Settings = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute and a half: one seed, fewer steps.")
    ] = False,
) -> None:
    from dpo.experiment.exact_config import ExactStudyConfig, quick_form

    config = read(ExactStudyConfig, settings)
    from dpo.experiment.exact import run_exact

    quiet_transformers()
    config = quick_form(config) if quick else config
    run_exact(config)
    leave_page(Path(config.out), config)


@experiment_app.command(
    "frontier",
    help="DPO, PPO and their rivals on the embedded data: true reward against KL, and cost.\n\n"
    "Example: [cyan]dpo experiment frontier studies/frontier.yaml out=runs/frontier[/cyan]\n\n"
    "The file shows every key; key=value sets one.",
)
def experiment_frontier(settings: Settings = None) -> None:
    from dpo.experiment.frontier_config import FrontierConfig

    config = read(FrontierConfig, settings)
    from dpo.experiment.frontier import run_frontier

    quiet_transformers()
    run_frontier(config)
    leave_page(Path(config.out), config)


@experiment_app.command(
    "sentiment",
    help="The DPO paper's IMDb experiment on reviews: reward of a classifier against KL.\n\n"
    "Example: [cyan]dpo experiment sentiment studies/sentiment.yaml data.path=stanfordnlp/imdb"
    "[/cyan]\n\nThe file shows the keys; key=value sets one.",
)
def experiment_sentiment(settings: Settings = None) -> None:
    from dpo.experiment.sentiment_config import SentimentConfig

    config = read(SentimentConfig, settings)
    from dpo.experiment.sentiment import run_sentiment

    quiet_transformers()
    run_sentiment(config)
    leave_page(Path(config.out), config)
