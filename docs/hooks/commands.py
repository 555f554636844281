"""A page per command, from the command line's own help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import configuration
import typer.main

from dpo.cli import app

PROGRAM = "dpo"


def pages() -> dict[str, str]:
    """The text of every page, by its path in the site."""
    found = dict(commands())
    lines = [
        f"| [`{name}`]({file_name(name)}) | {summary(command)} |" for name, command in found.items()
    ]
    intro = [
        "# Commands",
        plain_markup(app.info.help or ""),
        "What each command says with `--help`, as a page. `dpo --quiet COMMAND` prints warnings "
        "and errors only, `dpo --debug COMMAND` adds tracebacks to errors.",
        "\n".join(["| command | what it does |", "| --- | --- |", *lines]),
    ]
    texts = {f"commands/{file_name(name)}": page(name, cmd) for name, cmd in found.items()}
    return {"commands/index.md": "\n\n".join(intro) + "\n", **texts}


def commands(group: Any = None, prefix: str = PROGRAM) -> Iterator[tuple[str, Any]]:
    """Every command by its whole name, groups opened."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def file_name(name: str) -> str:
    """`data-check.md` of `dpo data check`."""
    return name.removeprefix(f"{PROGRAM} ").replace(" ", "-") + ".md"


def page(name: str, command: Any) -> str:
    """One command: usage, what it does, arguments and options."""
    context = command.context_class(command, info_name=name)
    parts = [f"# {name}", f"```text\n{command.get_usage(context)}\n```"]
    parts.append(plain_markup(command.help or ""))
    for kind, title in (("argument", "Arguments"), ("option", "Options")):
        chosen = [p for p in command.params if p.param_type_name == kind]
        records = [record for p in chosen if (record := p.get_help_record(context))]
        if records:
            rows = [f"| `{cell(words)}` | {cell(meaning)} |" for words, meaning in records]
            parts += [f"## {title}", "\n".join(["| | |", "| --- | --- |", *rows])]
    if any(p.name == "settings" for p in command.params):
        short = name.removeprefix(f"{PROGRAM} ")
        target = f"../configuration/{configuration.file_name(short)}"
        parts += ["## Settings", f"[Every key, with type, default and meaning]({target})."]
    return "\n\n".join(parts) + "\n"


def summary(command: Any) -> str:
    """The first sentence of a command's help."""
    return cell(plain_markup((command.help or "").split("\n\n")[0]))


def plain_markup(text: str) -> str:
    """Rich's markup as Markdown.

    >>> plain_markup("[bold]Examples[/bold] [cyan]dpo train[/cyan]")
    '**Examples** `dpo train`'
    >>> plain_markup("  [cyan]dpo losses[/cyan]\\n      All of them.")
    '- `dpo losses`: All of them.'
    """
    text = re.sub(r"^  (\[cyan\].*\[/cyan\])\n {6}", r"- \1: ", text, flags=re.MULTILINE)
    text = text.replace(r"\[", "[")
    text = re.sub(r"\[/?bold\]", "**", text)
    text = re.sub(r"\[/?(cyan|green|yellow|magenta)\]", "`", text)
    return re.sub(r"\[/?dim\]", "", text)


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", r"\|")
