"""How a command's help teaches: what it does, and commands to copy."""

from __future__ import annotations

FIRST_STEPS = (
    ("dpo demo", "The whole method in minutes, without a network."),
    ("dpo data check prefs.jsonl", "Is the data what you think it is?"),
    ("dpo init data=prefs.jsonl model=gpt2", "A commented recipe for your data and model."),
    ("dpo train recipe.yaml --dry-run", "What it would do: rows, tokens, steps."),
    ("dpo train recipe.yaml", "Train."),
    ("dpo evaluate models.dpo=runs/prefs-dpo data=prefs.jsonl out=runs/wins", "Is it better?"),
)

CONFIGURATION = (
    "[bold]Configuration.[/bold] An optional YAML file, then key=value on top, dotted for "
    "sections: [cyan]loss.beta=0.3 batch.size=16[/cyan]. Unknown keys are errors. "
    "[cyan]dpo config COMMAND[/cyan] lists every key."
)

MARGIN = "[dim][/dim]"
"""Nothing, at the margin: without a line there typer would take the examples' indentation away."""


def teach(what: str, *examples: tuple[str, str], more: str = "", title: str = "Examples") -> str:
    """The help of a command: what it does, commands to copy with what they are for, and more.

    A blank line is a paragraph's end, a single one is kept.
    """
    shown = [f"  [cyan]{_plain(command)}[/cyan]\n      {_plain(why)}" for command, why in examples]
    parts = [what, f"[bold]{title}[/bold]", "\n".join(shown), more or MARGIN]
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    """Text whose brackets are no markup."""
    return text.replace("[", r"\[")
