"""`dpo config`: every key of a configuration with its type, default and meaning."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.config_files import sections_of


def print_settings(command: str, schema: type[BaseModel]) -> None:
    """Print the keys of one command."""
    table = Table("key", "default", "meaning", title=f"dpo {command}")
    for key, default, meaning in settings_of(schema):
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
    return as_written(field.get_default(call_default_factory=True))


def as_written(value: Any) -> str:
    """A value as it is written in a YAML file or on the command line.

    >>> as_written(None), as_written(True), as_written(1e-6), as_written([1.0, 0.3])
    ('null', 'true', '1e-06', '[1.0, 0.3]')
    """
    if value is PydanticUndefined:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)
