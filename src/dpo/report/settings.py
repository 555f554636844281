"""`dpo config`: every key of a configuration with its type, default and meaning."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.config import EvaluateConfig, PreferenceConfig, SFTConfig, sections_of
from dpo.errors import InputError


def schemas() -> dict[str, type[BaseModel]]:
    """The configuration of each command."""
    from dpo.experiment.study import StudyConfig

    return {
        "sft": SFTConfig,
        "train": PreferenceConfig,
        "evaluate": EvaluateConfig,
        "experiment": StudyConfig,
    }


def print_settings(command: str) -> None:
    """Print the keys of one command.

    Raises:
        InputError: there is no such command, or it takes no configuration.
    """
    known = schemas()
    if command not in known:
        raise InputError(f"{command}: expected one of {', '.join(known)}.")
    table = Table("key", "default", "meaning", title=f"dpo {command}")
    for key, default, meaning in settings_of(known[command]):
        table.add_row(Text(key), Text(default), Text(meaning))
    Console().print(table)


def settings_of(schema: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Key, default and meaning of every setting, sections opened."""
    rows: list[tuple[str, str, str]] = []
    for name, field in schema.model_fields.items():
        sections = sections_of(field.annotation)
        if sections:
            default = field.get_default(call_default_factory=True)
            note = "" if default is not None or field.is_required() else " (none by default)"
            meaning = field.description or (sections[0].__doc__ or "").strip().split("\n")[0]
            shown = "required" if field.is_required() else ""
            rows.append((prefix + name, shown, meaning + note))
            rows += settings_of(sections[0], f"{prefix}{name}.")
        else:
            rows.append((prefix + name, _default(field), field.description or ""))
    return rows


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if default is PydanticUndefined else str(default)
