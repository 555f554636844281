"""The commands that train a model, and `dpo merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo.cli.common import TRAIN, AsJSON, Settings, TrustRemoteCode, app, read, refuse_launcher
from dpo.cli.output import (
    finish,
    leave_page,
    on_screen,
    print_json,
    quiet_transformers,
    without_log,
)
from dpo.cli.teaching import CONFIGURATION, teach

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only say what would be done: settings, rows and tokens, steps, time and memory.",
    ),
]

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpo.config import RunConfig


@app.command(
    rich_help_panel=TRAIN,
    help=teach(
        "Supervised fine-tuning: next-token loss on response tokens.",
        (
            "dpo sft model=gpt2-medium data=prefs.jsonl out=runs/sft epochs=2",
            "Imitate the chosen responses of preference data, or demonstrations.",
        ),
        (
            "dpo sft model.fresh.width=128 data=prefs.jsonl out=runs/small",
            "A small GPT-2 from random weights, with a tokenizer learnt from the data.",
        ),
        (
            "dpo sft recipe.yaml --dry-run",
            "What a recipe of dpo init would do.",
        ),
        more=CONFIGURATION,
    ),
)
def sft(
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJSON = False,
    dry_run: DryRun = False,
) -> None:
    from dpo.config import SFTConfig

    config = read(SFTConfig, settings)
    from dpo.report.runs import finish_run
    from dpo.train.jobs import train_sft

    _run(
        train_sft,
        finish_run,
        config,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
        dry_run=dry_run,
    )


@app.command(
    rich_help_panel=TRAIN,
    help=teach(
        "DPO from an SFT model, against a frozen reference; or another loss of the family.",
        (
            "dpo train model=runs/sft data=prefs.jsonl out=runs/dpo loss.beta=0.1",
            "DPO on pairs of a chosen and a rejected response.",
        ),
        (
            "dpo train model=runs/sft data=prefs.jsonl out=runs/simpo loss.name=simpo",
            "Another loss; dpo losses lists them.",
        ),
        (
            "dpo train model=runs/sft data=ranked.jsonl out=runs/pl loss.name=plackett_luce",
            "Ranked responses.",
        ),
        (
            "dpo train model=runs/sft data=prefs.jsonl out=runs/lora adapter=lora",
            "Only an adapter, in less memory.",
        ),
        (
            "dpo train recipe.yaml loss.beta=0.3 out=runs/beta-0.3",
            "A recipe, with other settings on top.",
        ),
        more=CONFIGURATION,
    ),
)
def train(
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJSON = False,
    dry_run: DryRun = False,
) -> None:
    from dpo.config import PreferenceConfig

    config = read(PreferenceConfig, settings)
    from dpo.report.diagnostics_figures import finish_preference_run
    from dpo.train.jobs import train_preference

    _run(
        train_preference,
        finish_preference_run,
        config,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
        dry_run=dry_run,
    )


@app.command(
    rich_help_panel=TRAIN,
    help=teach(
        "A reward model: Bradley-Terry on pairs, or Plackett-Luce on rankings.",
        (
            "dpo reward model=runs/sft data=prefs.jsonl out=runs/reward centre=0.01",
            "From pairs, with rewards around 0.",
        ),
        (
            "dpo reward model=runs/sft data=ranked.jsonl out=runs/reward loss=plackett_luce",
            "From whole rankings.",
        ),
        more=CONFIGURATION,
    ),
)
def reward(
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJSON = False,
    dry_run: DryRun = False,
) -> None:
    from dpo.config import RewardConfig

    config = read(RewardConfig, settings)
    from dpo.report.reward import finish_reward_run
    from dpo.train.reward import train_reward

    _run(
        train_reward,
        finish_reward_run,
        config,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
        dry_run=dry_run,
    )


@app.command(
    rich_help_panel=TRAIN,
    help=teach(
        "Online or iterative DPO: sample from the policy, score, pair, train, and again.",
        (
            "dpo online model=runs/sft reward=runs/reward data=prefs.jsonl out=runs/online",
            "Scored by a reward model.",
        ),
        (
            "dpo online model=runs/sft reward.function=my_reward.py:score data=prefs.jsonl "
            "out=runs/online rounds=8",
            "Scored by a Python function of prompts and responses.",
        ),
        (
            "dpo online recipes/online.yaml reset_reference_each_round=true out=runs/iterative",
            "Iterative DPO: each round starts from a new reference.",
        ),
        more=CONFIGURATION,
    ),
)
def online(
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJSON = False,
    dry_run: DryRun = False,
) -> None:
    from dpo.online_config import OnlineConfig

    config = read(OnlineConfig, settings)
    from dpo.report.diagnostics_figures import finish_preference_run
    from dpo.train.online import train_online

    _run(
        train_online,
        finish_preference_run,
        config,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
        dry_run=dry_run,
    )


@app.command(
    rich_help_panel=TRAIN,
    help=teach(
        "PPO: sample from the policy, score, estimate advantages, clipped steps, and again.",
        (
            "dpo ppo model=runs/sft reward=runs/reward data=prefs.jsonl out=runs/ppo "
            "kl.coefficient=0.05",
            "Against a reward model, at a price of 0.05 for a nat of KL.",
        ),
        (
            "dpo ppo recipes/ppo.yaml kl.target=6 out=runs/ppo-6",
            "Keep the KL near 6 nats a response.",
        ),
        more=CONFIGURATION,
    ),
)
def ppo(
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJSON = False,
    dry_run: DryRun = False,
) -> None:
    from dpo.online_config import PPOConfig

    config = read(PPOConfig, settings)
    from dpo.report.diagnostics_figures import finish_preference_run
    from dpo.train.ppo import train_ppo

    _run(
        train_ppo,
        finish_preference_run,
        config,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
        dry_run=dry_run,
    )


def _run(
    job: Callable[..., Path],
    show: Callable[[Path], None],
    config: RunConfig,
    *,
    trust_remote_code: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Train, draw and print what came of it, and leave the run's page."""
    quiet_transformers()
    if dry_run:
        _show(config, trust_remote_code=trust_remote_code, as_json=as_json)
        return
    from dpo.report.results import run_result
    from dpo.train import ranks

    with on_screen(as_json=as_json), ranks.joined(config.distributed):
        folder = job(config, trust_remote_code=trust_remote_code)
        first = ranks.is_first()
        if first:
            show(folder)
            leave_page(folder)
    if first:
        finish(lambda: run_result(folder), as_json=as_json)


def _show(config: Any, *, trust_remote_code: bool, as_json: bool) -> None:
    """Say what training would do, and what it would need."""
    from dpo.report.dry_run import as_result, print_dry_run
    from dpo.train.dry_run import dry_run, in_memory
    from dpo.train.estimate import describe_run

    refuse_launcher("a dry run")
    found = dry_run(config, trust_remote_code=trust_remote_code)
    with without_log():  # it reads the same rows once more
        estimate = describe_run(in_memory(config), trust_remote_code=trust_remote_code)
    if as_json:
        print_json(as_result(config, found, estimate))
    else:
        print_dry_run(config, found, estimate)


@app.command(
    rich_help_panel=TRAIN,
    help=teach(
        "An adapter and the model that it was trained on, as one model.",
        ("dpo merge runs/lora --out runs/lora-merged", "A folder that needs no peft to be used."),
    ),
)
def merge(
    folder: Annotated[
        str, typer.Argument(help="A run that trained an adapter, or its folder.", metavar="FOLDER")
    ],
    out: Annotated[Path, typer.Option(help="Where the whole model goes, a new folder.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    from dpo.train.merge import merge_folder

    quiet_transformers()
    typer.echo(merge_folder(folder, out, trust_remote_code=trust_remote_code))
