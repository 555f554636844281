"""The configuration reference, from the schemas: every key with its type, default and meaning."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dpo.config_files import sections_of
from dpo.experiment.exact_config import ExactStudyConfig
from dpo.experiment.frontier_config import FrontierConfig
from dpo.experiment.losses import LossStudyConfig
from dpo.experiment.sentiment_config import SentimentConfig
from dpo.experiment.study import StudyConfig
from dpo.report.loss_pages import allowed
from dpo.report.settings import as_written
from dpo.schemas import SCHEMAS as COMMANDS
from dpo.train.recipe import InitConfig

SCHEMAS: dict[str, type[BaseModel]] = {
    **COMMANDS,
    "init": InitConfig,
    "experiment run": StudyConfig,
    "experiment losses": LossStudyConfig,
    "experiment exact": ExactStudyConfig,
    "experiment frontier": FrontierConfig,
    "experiment sentiment": SentimentConfig,
}
"""The commands that take settings."""

HEAD = """# Configuration

A command takes an optional YAML file, then `key=value` words on top, dotted for sections:
`dpo train recipes/dpo.yaml loss.beta=0.3 batch.size=16`. An unknown key is an error, and so is one
without effect. `model=gpt2` is short for `model.path=gpt2`, `data=prefs.jsonl` for
`data.path=prefs.jsonl`, `adapter=lora` for `adapter.kind=lora`. `dpo config COMMAND` lists the same
keys on the screen; the options of a loss other than `dpo` are on [its page](../losses/README.md).
"""


REQUIRED = object()
"""In place of a default that there is none of."""


@dataclass(frozen=True)
class Key:
    """One setting as the reference shows it."""

    name: str
    kind: str
    default: str
    meaning: str


def pages() -> dict[str, str]:
    """The text of every page, by its path in the site."""
    links = [
        f"- [dpo {command}]({file_name(command)}): {_about(schema)}"
        for command, schema in SCHEMAS.items()
    ]
    texts = {f"configuration/{file_name(name)}": page(name) for name in SCHEMAS}
    return {"configuration/index.md": HEAD + "\n" + "\n".join(links) + "\n", **texts}


def file_name(command: str) -> str:
    """`experiment-run.md` of `experiment run`."""
    return command.replace(" ", "-") + ".md"


def page(command: str) -> str:
    """The keys of one command, a table per section."""
    schema = SCHEMAS[command]
    parts = [f"# dpo {command}: settings", _about(schema)]
    for path, section, keys in sections(schema):
        if path:
            parts += [f"## `{path}`", _about(section)]
        rows = [f"| `{key.name}` | {key.kind} | {key.default} | {key.meaning} |" for key in keys]
        head = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        if rows:
            parts.append("\n".join([*head, *rows]))
    link = f"[What the command does](../commands/{file_name(command)})"
    return "\n\n".join([*parts, f"{link}."]) + "\n"


def sections(
    schema: type[BaseModel], path: str = "", given: BaseModel | None = None
) -> Iterator[tuple[str, type[BaseModel], list[Key]]]:
    """A section's dotted path, its class and its own keys; then the same of those inside it.

    Args:
        schema: the section; of alternatives, such as the losses, the first is shown.
        path: where it stands.
        given: what it is by default, if that is not what its class says.
    """
    fields = schema.model_fields
    defaults = {
        name: default_of(field, getattr(given, name, None)) for name, field in fields.items()
    }
    yield path, schema, [_key(path, name, fields[name], defaults[name]) for name in fields]
    for name, field in fields.items():
        for inner in sections_of(field.annotation)[:1]:
            default = defaults[name]
            inside = default if isinstance(default, BaseModel) else None
            yield from sections(inner, _joined(path, name), inside)


def default_of(field: FieldInfo, given: Any) -> Any:
    """A key's value where the user gives none: that of its section, or of its class."""
    if given is not None or field.is_required():
        return given if given is not None else REQUIRED
    return field.get_default(call_default_factory=True)


def _key(path: str, name: str, field: FieldInfo, default: Any) -> Key:
    inside = sections_of(field.annotation)
    meaning = field.description or (_about(inside[0]) if inside else "")
    return Key(_joined(path, name), _cell(_kind(field)), _shown(default), _cell(meaning))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _about(section: type[BaseModel]) -> str:
    """The first paragraph of a schema's docstring."""
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _shown(default: Any) -> str:
    if default is REQUIRED:
        return "required"
    if isinstance(default, BaseModel):
        return "see below"
    return f"`{_cell(as_written(default))}`"


def _kind(field: FieldInfo) -> str:
    """What a key takes, with its bounds."""
    said = type_in_words(field.annotation)
    bounds = "" if "one of" in said else allowed(field)
    return f"{said}, {bounds}" if bounds else said


NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}


def type_in_words(annotation: Any) -> str:
    """A type as a user would say it.

    >>> type_in_words(list[float]), type_in_words(int | None)
    ('list of number', 'whole number or null')
    >>> type_in_words(Literal["ddp", "fsdp"])
    'one of ddp, fsdp'
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_in_words(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(type_in_words, arguments)))
    if origin is tuple:
        return ", ".join(map(type_in_words, arguments))
    if origin is list:
        return f"list of {type_in_words(arguments[0])}"
    if origin is dict:
        return "keys and values"
    if annotation is type(None):
        return "null"
    return NAMES[annotation]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
