"""The command line: parse, then import; what is heavy is loaded only by what needs it."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo import __version__
from dpo.errors import DPOError, InputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIGURATION = (
    "\n\n[bold]Configuration.[/bold] An optional YAML file, then key=value on top, dotted for "
    "sections: [cyan]loss.beta=0.3 batch.size=16[/cyan]. Unknown keys are errors. "
    "[cyan]dpo config COMMAND[/cyan] lists every key."
)

app = typer.Typer(
    name="dpo",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Direct Preference Optimization: train on preferences, compare, explain.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at preference data before training on it.")
experiment_app = typer.Typer(no_args_is_help=True, help="Run a study: many runs, one table.")
app.add_typer(data_app, name="data")
app.add_typer(experiment_app, name="experiment")

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file, then settings.", show_default=False
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with a model from the hub."),
]


class Engine(str, Enum):
    """Where a study trains."""

    LOCAL = "local"
    RAY = "ray"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


PLANNED = ("sft", "train")
"""The commands whose runs `dpo plan` estimates."""

DISTRIBUTED = ("sft", "train", "reward")
"""The commands that torchrun or accelerate may start several times over."""


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[  # taken out of the words by main(), so that it may stand anywhere
        bool, typer.Option("--debug", help="Show tracebacks of errors.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Set up what all commands share."""
    command = context.invoked_subcommand
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in DISTRIBUTED:
        raise InputError(f"dpo {command} is one process; start it without torchrun or accelerate.")
    _set_up_logging(logging.WARNING if quiet else logging.INFO)


def _set_up_logging(level: int) -> None:
    """Our own lines on standard error; the libraries' only when they warn."""
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(
        console=Console(stderr=True), show_path=False, show_level=False, log_time_format="[%X]"
    )
    log = logging.getLogger("dpo")
    log.handlers = [handler]
    log.setLevel(level)
    log.propagate = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _quiet_transformers() -> None:
    """Our progress bars replace those of the library."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _split_settings(settings: Sequence[str] | None) -> tuple[Path | None, list[str]]:
    """The configuration file, if the first word is one, and the settings."""
    words = list(settings or [])
    if words and "=" not in words[0]:
        return Path(words[0]), words[1:]
    return None, words


def _read(schema: type[Any], settings: Sequence[str] | None) -> Any:
    from dpo.config import read_config

    file, overrides = _split_settings(settings)
    return read_config(schema, file, overrides)


@app.command(
    help="Supervised fine-tuning: next-token loss on response tokens.\n\n"
    "Example: [cyan]dpo sft model=gpt2-medium data=prefs.jsonl out=runs/sft epochs=2[/cyan]"
    f"{CONFIGURATION}"
)
def sft(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.config import SFTConfig

    config = _read(SFTConfig, settings)
    from dpo.report.runs import finish_run
    from dpo.train import ranks
    from dpo.train.jobs import train_sft

    _quiet_transformers()
    with ranks.joined(config.distributed):
        folder = train_sft(config, trust_remote_code=trust_remote_code)
        if ranks.is_first():
            finish_run(folder)
            _leave_page(folder)


@app.command(
    help="DPO from an SFT model, against a frozen reference.\n\n"
    "Example: [cyan]dpo train model=runs/sft data=prefs.jsonl out=runs/first loss.beta=0.1[/cyan]"
    f"{CONFIGURATION}"
)
def train(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.config import PreferenceConfig

    config = _read(PreferenceConfig, settings)
    from dpo.report.diagnostics_figures import finish_preference_run
    from dpo.train import ranks
    from dpo.train.jobs import train_preference

    _quiet_transformers()
    with ranks.joined(config.distributed):
        folder = train_preference(config, trust_remote_code=trust_remote_code)
        if ranks.is_first():
            finish_preference_run(folder)
            _leave_page(folder)


@app.command(
    help="A reward model: Bradley-Terry on pairs, or Plackett-Luce on rankings.\n\n"
    "Example: [cyan]dpo reward model=runs/sft data=prefs.jsonl out=runs/reward[/cyan]"
    f"{CONFIGURATION}"
)
def reward(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.config import RewardConfig

    config = _read(RewardConfig, settings)
    from dpo.report.reward import finish_reward_run
    from dpo.train import ranks
    from dpo.train.reward import train_reward

    _quiet_transformers()
    with ranks.joined(config.distributed):
        folder = train_reward(config, trust_remote_code=trust_remote_code)
        if ranks.is_first():
            finish_reward_run(folder)
            _leave_page(folder)


@app.command(
    help="Online or iterative DPO: sample from the policy, score, pair, train, and again.\n\n"
    "Example: [cyan]dpo online model=runs/sft reward=runs/reward data=prefs.jsonl "
    "out=runs/online rounds=4[/cyan]"
    f"{CONFIGURATION}"
)
def online(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.online_config import OnlineConfig

    config = _read(OnlineConfig, settings)
    from dpo.report.diagnostics_figures import finish_preference_run
    from dpo.train.online import train_online

    _quiet_transformers()
    folder = train_online(config, trust_remote_code=trust_remote_code)
    finish_preference_run(folder)
    _leave_page(folder)


@app.command(
    help="PPO: sample from the policy, score, estimate advantages, clipped steps, and again.\n\n"
    "Example: [cyan]dpo ppo model=runs/sft reward=runs/reward data=prefs.jsonl "
    "out=runs/ppo kl.coefficient=0.05[/cyan]"
    f"{CONFIGURATION}"
)
def ppo(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.online_config import PPOConfig

    config = _read(PPOConfig, settings)
    from dpo.report.diagnostics_figures import finish_preference_run
    from dpo.train.ppo import train_ppo

    _quiet_transformers()
    folder = train_ppo(config, trust_remote_code=trust_remote_code)
    finish_preference_run(folder)
    _leave_page(folder)


@app.command(
    help="Sentence-BERT win rates on held-out prompts, with intervals, nulls and tests.\n\n"
    "Example: [cyan]dpo evaluate models.sft=runs/sft models.dpo=runs/first data=prefs.jsonl "
    "out=runs/evaluation[/cyan]"
    f"{CONFIGURATION}"
)
def evaluate(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.config import EvaluateConfig

    config = _read(EvaluateConfig, settings)
    from dpo.evaluate.jobs import evaluate as run_evaluation
    from dpo.report.diagnostics_figures import leave_diagnosis, print_readings
    from dpo.report.runs import finish_evaluation

    _quiet_transformers()
    evaluation = run_evaluation(config, trust_remote_code=trust_remote_code)
    finish_evaluation(evaluation)
    print_readings(leave_diagnosis(evaluation.folder), evaluation.folder)
    _leave_page(evaluation.folder)


@app.command(
    help="Memory and time of a run before it starts, and settings that would fit.\n\n"
    "The configuration is that of dpo sft or dpo train (the default), and a machine: this one, a "
    "GPU by its name, or numbers. Nothing is trained and no weight is read.\n\n"
    "Example: [cyan]dpo plan model=runs/sft data=prefs.jsonl machine=H100[/cyan]\n\n"
    "Example: [cyan]dpo plan sft model=gpt2-medium data=prefs.jsonl machine.devices=8[/cyan]"
    f"{CONFIGURATION}"
)
def plan(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[sft|train] [CONFIG] [KEY=VALUE]...",
            help="A command, a YAML file, then settings.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    words = list(settings or [])
    command = words.pop(0) if words and words[0] in PLANNED else "train"
    config = _read(_schema("plan sft" if command == "sft" else "plan"), words)
    from dpo.report.plan import print_plan

    _quiet_transformers()
    print_plan(config, trust_remote_code=trust_remote_code)


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

    _quiet_transformers()
    run_demo(out, seed=seed, short=short)
    _leave_page(out)


@app.command()
def merge(
    folder: Annotated[
        str, typer.Argument(help="A run that trained an adapter, or its folder.", metavar="FOLDER")
    ],
    out: Annotated[Path, typer.Option(help="Where the whole model goes, a new folder.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """An adapter and the model that it was trained on, as one model.

    Example: [cyan]dpo merge runs/dpo --out runs/dpo-merged[/cyan]
    """
    from dpo.train.merge import merge_folder

    _quiet_transformers()
    typer.echo(merge_folder(folder, out, trust_remote_code=trust_remote_code))


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

    config = _read(StudyConfig, settings)
    _quiet_transformers()
    run_study(config, trust_remote_code=trust_remote_code, use_ray=engine is Engine.RAY)
    _leave_page(Path(config.out), config)


@experiment_app.command(
    "losses",
    help="Every loss on the embedded data, from one SFT model a seed: true reward, KL, figure.\n\n"
    "Example: [cyan]dpo experiment losses studies/losses.yaml out=runs/losses[/cyan]\n\n"
    "The file shows every key; key=value sets one.",
)
def experiment_losses(settings: Settings = None) -> None:
    from dpo.experiment.losses import LossStudyConfig, run_losses

    config = _read(LossStudyConfig, settings)
    _quiet_transformers()
    run_losses(config)
    _leave_page(Path(config.out), config)


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

    config = _read(ExactStudyConfig, settings)
    from dpo.experiment.exact import run_exact

    _quiet_transformers()
    config = quick_form(config) if quick else config
    run_exact(config)
    _leave_page(Path(config.out), config)


@experiment_app.command(
    "frontier",
    help="DPO, PPO and their rivals on the embedded data: true reward against KL, and cost.\n\n"
    "Example: [cyan]dpo experiment frontier studies/frontier.yaml out=runs/frontier[/cyan]\n\n"
    "The file shows every key; key=value sets one.",
)
def experiment_frontier(settings: Settings = None) -> None:
    from dpo.experiment.frontier_config import FrontierConfig

    config = _read(FrontierConfig, settings)
    from dpo.experiment.frontier import run_frontier

    _quiet_transformers()
    run_frontier(config)
    _leave_page(Path(config.out), config)


@experiment_app.command(
    "sentiment",
    help="The DPO paper's IMDb experiment on reviews: reward of a classifier against KL.\n\n"
    "Example: [cyan]dpo experiment sentiment studies/sentiment.yaml data.path=stanfordnlp/imdb"
    "[/cyan]\n\nThe file shows the keys; key=value sets one.",
)
def experiment_sentiment(settings: Settings = None) -> None:
    from dpo.experiment.sentiment_config import SentimentConfig

    config = _read(SentimentConfig, settings)
    from dpo.experiment.sentiment import run_sentiment

    _quiet_transformers()
    run_sentiment(config)
    _leave_page(Path(config.out), config)


@data_app.command("check")
def data_check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, folders, hub id.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Model folder or hub id whose tokenizer counts the tokens.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="plain, alpaca, hh, question, chat, or a text with {prompt}.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longer sequences are cut.")] = 512,
    test: Annotated[
        str | None, typer.Option(help="Held-out source to compare prompts with.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows shown as they are tokenised.")] = 3,
    column: Annotated[
        list[str] | None, typer.Option(help="ours=yours, e.g. --column prompt=question.")
    ] = None,
) -> None:
    """Validate, count, measure, and show a few rows as the model will see them."""
    from dpo.report.data_check import check_data

    if template is not None and tokenizer is None:
        raise InputError("--template: has no effect without a --tokenizer to count tokens with.")
    _quiet_transformers()
    check_data(
        files,
        tokenizer=tokenizer,
        template=template,
        max_length=max_length,
        test=test,
        split=split,
        num_shown=rows,
        columns=dict(_pair(text) for text in column or []),
    )


def _pair(text: str) -> tuple[str, str]:
    ours, separator, yours = text.partition("=")
    if not (separator and ours and yours):
        raise InputError(f"--column {text}: expected ours=yours, e.g. prompt=question.")
    return ours, yours


@data_app.command("synthetic")
def data_synthetic(
    out: Annotated[Path, typer.Argument(help="File to write, .jsonl.")],
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    demonstrations: Annotated[
        bool, typer.Option("--demonstrations", help="Answers to imitate instead of pairs.")
    ] = False,
) -> None:
    """Write the embedded data as JSONL: questions and answers with a known reward."""
    from dpo.data import synthetic
    from dpo.data.sources import write_jsonl

    made = (
        synthetic.demonstrations(num_rows=rows, seed=seed)
        if demonstrations
        else synthetic.preferences(num_rows=rows, seed=seed)
    )
    write_jsonl(made, out)
    typer.echo(f"{len(made)} rows in {out}")


@app.command()
def config(
    command: Annotated[
        str, typer.Argument(help="sft, train, reward, online, ppo, evaluate, plan or experiment.")
    ],
) -> None:
    """List every key of a command's configuration: type, default, meaning."""
    from dpo.report.settings import print_settings

    print_settings(command, _schema(command))


def _schema(command: str) -> type[Any]:
    """The configuration of a command."""
    from dpo import config, online_config, plan_config

    known = {
        "sft": config.SFTConfig,
        "train": config.PreferenceConfig,
        "reward": config.RewardConfig,
        "online": online_config.OnlineConfig,
        "ppo": online_config.PPOConfig,
        "evaluate": config.EvaluateConfig,
        "plan": plan_config.PreferencePlanConfig,
        "plan sft": plan_config.SFTPlanConfig,
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


def _leave_page(folder: Path, study: Any = None) -> None:
    """Write the page of what has just come to its end; of a study, its configuration too."""
    from dpo.report.page.write import leave_page

    leave_page(folder, study)


def main() -> None:
    """Run the command; a user's mistake is one sentence on standard error, with its exit code."""
    debug = "--debug" in sys.argv
    try:
        words = [word for word in sys.argv[1:] if word != "--debug"]
        app(args=words, prog_name="dpo")
    except DPOError as error:
        _leave(error, debug=debug)
    except OSError as error:
        if error.filename is None:  # no file, so nothing that the user can see to
            raise
        told = StorageError(f"{error.filename}: {error.strerror}.")
        _leave(told.with_traceback(error.__traceback__), debug=debug)


def _leave(error: DPOError, *, debug: bool) -> None:
    """End the process with an error's message and code."""
    from dpo.data.files import printable

    if debug:
        traceback.print_exception(error)
    for line in str(error).split("\n"):  # it may quote a file, which must not drive the terminal
        typer.echo(printable(line, limit=len(line)), err=True)
    raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
