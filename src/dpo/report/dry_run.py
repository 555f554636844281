"""`--dry-run` in words: the resolved configuration, the rows as tokens, the steps."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.config import RunConfig
from dpo.train.dry_run import DryRun, Side

COUNTS = {
    "rows": "rows",
    "dropped": "dropped",
    "kept": "kept",
    "prompts_cut": "prompts that lose their beginning",
    "responses_cut": "responses that lose their end",
    "tokens": "tokens through the model, a pass",
    "scored_tokens": "scored tokens",
}
STATES = {
    "new": "is new",
    "unfinished": "holds an unfinished run, which goes on if it is of the same settings",
    "finished": "holds a finished run; with the same settings there is nothing to do",
    "not a run": "holds something that is no run, and will be refused; name another",
}


def print_dry_run(config: RunConfig, found: DryRun, estimate: list[str]) -> None:
    """Print everything; `estimate` are sentences about time and memory."""
    console = Console()
    title = Text(f"dpo {found.command}, every setting resolved", style="bold")
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    console.print(title, Text(resolved.rstrip()), "", sep="\n", soft_wrap=True)
    console.print(_table(found))
    for line in [*steps_in_words(found), *estimate]:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"{found.folder} {STATES[found.state]}."), soft_wrap=True)
    console.print("A dry run: no weights were read, nothing was trained or written.")


def as_result(config: RunConfig, found: DryRun, estimate: list[str]) -> dict[str, Any]:
    """The same for scripts."""
    sides = {name: _counts(getattr(found, name)) for name in ("train", "held_out")}
    counts = {f.name: getattr(found, f.name) for f in fields(found) if f.name != "data"}
    return {
        **counts,
        "steps": asdict(found.steps),
        **sides,
        "dry_run": True,
        "config": config.model_dump(mode="json"),
        "estimate": estimate,
    }


def _counts(side: Side) -> dict[str, int]:
    return {name: getattr(side, name) for name in COUNTS}


def _table(found: DryRun) -> Table:
    title = f"Template {found.template}; at most {found.max_length:,} tokens a sequence"
    what = "prompts" if found.samples else "rows"
    table = Table("", f"training {what}", f"held-out {what}", title=Text(title))
    for column in table.columns[1:]:
        column.justify = "right"
    train, held_out = _counts(found.train), _counts(found.held_out)
    for name, words in COUNTS.items():
        if train[name] or held_out[name] or name in ("rows", "kept"):
            table.add_row(words, f"{train[name]:,}", f"{held_out[name]:,}")
    return table


def steps_in_words(found: DryRun) -> list[str]:
    """How many optimizer steps, and what goes through the model in each."""
    steps = found.steps
    if found.samples:
        return [
            f"{steps.total:,} optimizer steps, {steps.each_pass:,} a round, of {steps.rows:,} rows "
            f"each; at most {steps.most_tokens:,} tokens a step.",
            f"{found.samples:,} responses are sampled.",
        ]
    assert steps.mean_tokens is not None
    assert steps.mean_passes is not None
    passes = "one pass" if steps.mean_passes == 1 else f"{steps.mean_passes:.3g} passes on average"
    lines = [
        f"{steps.total:,} optimizer steps, {steps.each_pass:,} a pass over the rows, of "
        f"{steps.rows:,} rows each.",
        f"{steps.mean_tokens:,.0f} tokens a step on average and {steps.most_tokens:,} at most, "
        f"forward and backward in {passes}; {steps.mean_tokens * steps.total:,.0f} tokens in all.",
    ]
    if found.reference_tokens:
        lines.append(
            f"{found.reference_tokens:,} tokens through the reference, once, before the first step."
        )
    return lines
