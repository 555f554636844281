"""The commands that train a model, and `dpo merge`."""

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


@app.command(
    help="Supervised fine-tuning: next-token loss on response tokens.\n\n"
    "Example: [cyan]dpo sft model=gpt2-medium data=prefs.jsonl out=runs/sft epochs=2[/cyan]"
    f"{CONFIGURATION}"
)
def sft(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.config import SFTConfig

    config = read(SFTConfig, settings)
    from dpo.report.runs import finish_run
    from dpo.train import ranks
    from dpo.train.jobs import train_sft

    quiet_transformers()
    with ranks.joined(config.distributed):
        folder = train_sft(config, trust_remote_code=trust_remote_code)
        if ranks.is_first():
            finish_run(folder)
            leave_page(folder)


@app.command(
    help="DPO from an SFT model, against a frozen reference.\n\n"
    "Example: [cyan]dpo train model=runs/sft data=prefs.jsonl out=runs/first loss.beta=0.1[/cyan]"
    f"{CONFIGURATION}"
)
def train(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.config import PreferenceConfig

    config = read(PreferenceConfig, settings)
    from dpo.report.diagnostics_figures import finish_preference_run
    from dpo.train import ranks
    from dpo.train.jobs import train_preference

    quiet_transformers()
    with ranks.joined(config.distributed):
        folder = train_preference(config, trust_remote_code=trust_remote_code)
        if ranks.is_first():
            finish_preference_run(folder)
            leave_page(folder)


@app.command(
    help="A reward model: Bradley-Terry on pairs, or Plackett-Luce on rankings.\n\n"
    "Example: [cyan]dpo reward model=runs/sft data=prefs.jsonl out=runs/reward[/cyan]"
    f"{CONFIGURATION}"
)
def reward(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.config import RewardConfig

    config = read(RewardConfig, settings)
    from dpo.report.reward import finish_reward_run
    from dpo.train import ranks
    from dpo.train.reward import train_reward

    quiet_transformers()
    with ranks.joined(config.distributed):
        folder = train_reward(config, trust_remote_code=trust_remote_code)
        if ranks.is_first():
            finish_reward_run(folder)
            leave_page(folder)


@app.command(
    help="Online or iterative DPO: sample from the policy, score, pair, train, and again.\n\n"
    "Example: [cyan]dpo online model=runs/sft reward=runs/reward data=prefs.jsonl "
    "out=runs/online rounds=4[/cyan]"
    f"{CONFIGURATION}"
)
def online(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.online_config import OnlineConfig

    config = read(OnlineConfig, settings)
    from dpo.report.diagnostics_figures import finish_preference_run
    from dpo.train.online import train_online

    quiet_transformers()
    folder = train_online(config, trust_remote_code=trust_remote_code)
    finish_preference_run(folder)
    leave_page(folder)


@app.command(
    help="PPO: sample from the policy, score, estimate advantages, clipped steps, and again.\n\n"
    "Example: [cyan]dpo ppo model=runs/sft reward=runs/reward data=prefs.jsonl "
    "out=runs/ppo kl.coefficient=0.05[/cyan]"
    f"{CONFIGURATION}"
)
def ppo(settings: Settings = None, trust_remote_code: TrustRemoteCode = False) -> None:
    from dpo.online_config import PPOConfig

    config = read(PPOConfig, settings)
    from dpo.report.diagnostics_figures import finish_preference_run
    from dpo.train.ppo import train_ppo

    quiet_transformers()
    folder = train_ppo(config, trust_remote_code=trust_remote_code)
    finish_preference_run(folder)
    leave_page(folder)


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

    quiet_transformers()
    typer.echo(merge_folder(folder, out, trust_remote_code=trust_remote_code))
