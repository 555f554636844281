"""`dpo plan`: what a run would need."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo.cli.common import TRAIN, TrustRemoteCode, app, read
from dpo.cli.completion import complete_setting
from dpo.cli.output import quiet_transformers
from dpo.cli.teaching import CONFIGURATION, teach


@app.command(
    rich_help_panel=TRAIN,
    help=teach(
        "Memory and time of a run before it starts, and settings that would fit.",
        ("dpo plan model=runs/sft data=prefs.jsonl machine=H100", "Of dpo train, on a GPU."),
        (
            "dpo plan sft model=gpt2-medium data=prefs.jsonl machine.devices=8",
            "Of dpo sft, on eight machines like this one.",
        ),
        (
            "dpo plan ppo model=runs/sft reward=runs/reward data=prefs.jsonl machine=A100-80",
            "Of dpo ppo, sampling included.",
        ),
        more="The configuration is that of a training command, dpo train if none is named, and a "
        "machine: this one, a GPU by its name, or numbers. Nothing is trained and no weight is "
        "read.\n\n" + CONFIGURATION,
    ),
)
def plan(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[sft|train|reward|online|ppo] [CONFIG] [KEY=VALUE]...",
            help="A command, a YAML file, then settings.",
            show_default=False,
            autocompletion=complete_setting,
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    from dpo.plan_config import PLANS

    command, *words = settings or ["train"]
    if command not in PLANS:
        command, words = "train", [command, *words]
    config = read(PLANS[command], words)
    from dpo.report.plan import print_plan

    quiet_transformers()
    print_plan(config, trust_remote_code=trust_remote_code)
