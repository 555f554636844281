"""`dpo demo` and `dpo experiment`: many runs, one table."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from dpo.cli.common import MEASURE, AsJSON, Settings, TrustRemoteCode, app, read
from dpo.cli.output import finish, leave_page, on_screen, quiet_transformers
from dpo.cli.teaching import CONFIGURATION, teach

if TYPE_CHECKING:
    from collections.abc import Callable

experiment_app = typer.Typer(no_args_is_help=True, help="Run a study: many runs, one table.")
app.add_typer(experiment_app, name="experiment", rich_help_panel=MEASURE)


class Engine(str, Enum):
    """Where a study trains."""

    LOCAL = "local"
    RAY = "ray"


@app.command(
    rich_help_panel=MEASURE,
    help=teach(
        "The whole method in minutes, on the embedded data: base, SFT, DPO at three betas, "
        "evaluation.",
        ("dpo demo", "Ends with a table of true reward, KL and win rates, and figures."),
        ("dpo demo --short --out runs/short", "A tenth of the steps: shows that all works."),
        more="Needs no network and no GPU.",
    ),
)
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Data, weights, order, samples.")] = 0,
    short: Annotated[
        bool, typer.Option("--short", help="A tenth of the steps: shows that all works.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    from dpo.experiment.demo import run_demo
    from dpo.report.results import study_result

    quiet_transformers()
    with on_screen(as_json=as_json):
        run_demo(out, seed=seed, short=short)
        leave_page(out)
    finish(lambda: study_result(out), as_json=as_json)


@experiment_app.command(
    "run",
    help=teach(
        "Every run of a study, its table and figures; finished runs are not repeated.",
        (
            "dpo experiment run studies/instruction.yaml data.path=prefs.json",
            "SFT, DPO over a grid, rivals, evaluated together, over seeds.",
        ),
        (
            "dpo experiment run studies/instruction.yaml data.path=prefs.json --engine ray",
            "The same on a Ray cluster.",
        ),
        more=CONFIGURATION,
    ),
)
def experiment_run(
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    engine: Annotated[
        Engine,
        typer.Option(help="ray: train on the cluster of RAY_ADDRESS, or on all cores through Ray."),
    ] = Engine.LOCAL,
    as_json: AsJSON = False,
) -> None:
    from dpo.experiment.study import StudyConfig, run_study

    config = read(StudyConfig, settings)
    use_ray = engine is Engine.RAY
    _run(
        lambda: run_study(config, trust_remote_code=trust_remote_code, use_ray=use_ray),
        config,
        as_json=as_json,
    )


@experiment_app.command(
    "losses",
    help=teach(
        "Every loss on the embedded data, from one SFT model a seed: true reward, KL, figure.",
        (
            "dpo experiment losses studies/losses.yaml out=runs/losses",
            "About an hour on one core.",
        ),
        more="The file shows every key; key=value sets one.",
    ),
)
def experiment_losses(settings: Settings = None, as_json: AsJSON = False) -> None:
    from dpo.experiment.losses import LossStudyConfig, run_losses

    config = read(LossStudyConfig, settings)
    _run(lambda: run_losses(config), config, as_json=as_json)


@experiment_app.command(
    "exact",
    help=teach(
        "DPO, PPO and their rivals in a world whose optimal policy is known.",
        (
            "dpo experiment exact studies/exact.yaml out=runs/exact",
            "The whole study.",
        ),
        (
            "dpo experiment exact studies/exact.yaml out=runs/exact-quick --quick",
            "About a minute.",
        ),
        more="The file shows every key; key=value sets one.",
    ),
)
def experiment_exact(
    settings: Settings = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="About a minute: one seed, fewer steps.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    from dpo.experiment.exact_config import ExactStudyConfig, quick_form

    config = read(ExactStudyConfig, settings)
    from dpo.experiment.exact import run_exact

    config = quick_form(config) if quick else config
    _run(lambda: run_exact(config), config, as_json=as_json)


@experiment_app.command(
    "frontier",
    help=teach(
        "DPO, PPO and their rivals on the embedded data: true reward against KL, and cost.",
        (
            "dpo experiment frontier studies/frontier.yaml out=runs/frontier",
            "The whole study.",
        ),
        more="The file shows every key; key=value sets one.",
    ),
)
def experiment_frontier(settings: Settings = None, as_json: AsJSON = False) -> None:
    from dpo.experiment.frontier_config import FrontierConfig

    config = read(FrontierConfig, settings)
    from dpo.experiment.frontier import run_frontier

    _run(lambda: run_frontier(config), config, as_json=as_json)


@experiment_app.command(
    "sentiment",
    help=teach(
        "The DPO paper's IMDb experiment on reviews: reward of a classifier against KL.",
        (
            "dpo experiment sentiment studies/sentiment.yaml data.path=stanfordnlp/imdb",
            "As in the paper; needs a hub and a GPU.",
        ),
        (
            "dpo experiment sentiment studies/sentiment-small.yaml data.path=reviews.jsonl.gz",
            "A small form from random weights.",
        ),
        more="The file shows every key; key=value sets one.",
    ),
)
def experiment_sentiment(settings: Settings = None, as_json: AsJSON = False) -> None:
    from dpo.experiment.sentiment_config import SentimentConfig

    config = read(SentimentConfig, settings)
    from dpo.experiment.sentiment import run_sentiment

    _run(lambda: run_sentiment(config), config, as_json=as_json)


class Finished(Protocol):
    """What a study returns."""

    @property
    def folder(self) -> Path:
        """Where it is: a small form has a folder of its own."""


def _run(study: Callable[[], Finished], config: Any, *, as_json: bool) -> None:
    """Run a study and leave its page."""
    from dpo.report.results import study_result

    quiet_transformers()
    with on_screen(as_json=as_json):
        folder = study().folder
        leave_page(folder, config)
    finish(lambda: study_result(folder), as_json=as_json)
