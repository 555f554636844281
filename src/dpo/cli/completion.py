"""What a shell offers after TAB: keys, their values, files, names."""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

FILES = ("data", "model", "reference", "reward", "path", "test", "out")
"""The last parts of keys whose values are files or folders."""


def complete_setting(context: typer.Context, incomplete: str) -> list[str]:
    """Keys of the command as `key=`; after a key and `=`, the values that it can have.

    bash takes `key=value` for three words, leaves out an `=` that is the last one, and wants what
    follows it alone.
    """
    from dpo.schemas import SCHEMAS

    schema = SCHEMAS.get(context.info_name or "")
    given: list[str] = context.params.get("settings") or []
    *_, before, last = ["", "", *given]
    if last == "=":
        return list(_values(schema, before, incomplete))
    if _annotation(schema, last.split(".")) is not None:  # a key that waits for its value
        return list(_values(schema, last, incomplete))
    key, separator, start = incomplete.partition("=")
    if separator:
        return [f"{key}={value}" for value in _values(schema, key, start)]
    return [*_keys(schema, incomplete), *_paths(incomplete, ".yaml")]


def _keys(schema: type[BaseModel] | None, start: str) -> Iterator[str]:
    from dpo.config_files import all_keys

    if schema is not None:
        keys = dict.fromkeys(all_keys(schema))
        yield from (f"{key}=" for key in keys if key.startswith(start))


def _values(schema: type[BaseModel] | None, key: str, start: str) -> Iterator[str]:
    parts = key.split(".")
    if key in ("loss", "loss.name") and _annotation(schema, ["loss", "name"]) is not None:
        yield from complete_loss(start)
        return
    yield from (value for value in _choices(_annotation(schema, parts)) if value.startswith(start))
    if parts[-1] in FILES:
        yield from _paths(start)


def _annotation(schema: type[BaseModel] | None, parts: list[str]) -> Any:
    """The type of a dotted key, None where there is no such key."""
    from dpo.config_files import sections_of

    annotation = None
    for part in parts:
        if schema is None or part not in schema.model_fields:
            return None
        annotation = schema.model_fields[part].annotation
        schema = next(iter(sections_of(annotation)), None)
    return annotation


def _choices(annotation: Any) -> Iterator[str]:
    """The words of a type that has only some."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for inner in get_args(annotation):
            yield from _choices(inner)


def _paths(start: str, suffix: str = "") -> Iterator[str]:
    """Files that begin so, and folders on the way to them."""
    for name in sorted(glob(f"{start}*")):
        if Path(name).is_dir():
            yield f"{name}/"
        elif name.endswith(suffix):
            yield name


def complete_command(incomplete: str) -> list[str]:
    """What `dpo config` takes."""
    from dpo.schemas import SCHEMAS

    return [name for name in (*SCHEMAS, "experiment") if name.startswith(incomplete)]


def complete_loss(incomplete: str) -> list[str]:
    """What `dpo losses` takes."""
    from dpo.loss_config import LOSS_CONFIGS

    return [name for name in (*LOSS_CONFIGS, "mix") if name.startswith(incomplete)]
