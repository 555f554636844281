"""From YAML and `key=value` to one frozen, validated configuration.

Unknown keys, wrong types and values out of range are reported all at once, by their dotted paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dpo.errors import InputError, did_you_mean, did_you_mean_path
from dpo.loss_config import (
    OPTION_KEYS,
    describe_effectless,
    describe_unknown_loss,
    without_tags,
)
from dpo.sections import shorthand

Config = TypeVar("Config", bound=BaseModel)


def read_config(
    schema: type[Config], file: Path | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The configuration of a YAML file with `key=value` overrides on top.

    Raises:
        InputError: everything that is wrong with it, at once.
    """
    if file is not None and str(file) in known_keys(schema) and not file.exists():
        raise InputError(f"{file}: expected key=value, e.g. {_example(str(file))}")
    values = read_yaml(file) if file is not None else {}
    for override in overrides:
        _apply(values, override)
    return validate(schema, values, where=str(file) if file is not None else "")


class _Loader(yaml.SafeLoader):
    """The safe loader, stricter: no key twice, no aliases, and what looks like a date is text.

    A few lines of aliases can stand for gigabytes, or for a value that contains itself.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            reason = f"the alias *{event.anchor} is not supported; write the value out"
            raise yaml.composer.ComposerError(None, None, reason, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                reason = f"the key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, reason, key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        YAMLError: there is none.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    except (ValueError, LookupError, AttributeError) as error:  # "0x_", "!!bool 2", 5000 digits
        raise yaml.YAMLError(f"a value cannot be read ({error})") from error


def _reason(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file as a mapping, by the safe loader.

    Raises:
        InputError: it cannot be read, is not YAML, or is not a mapping.
    """
    try:
        values = _parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = did_you_mean_path(str(file)) or _as_setting(file) or "."
        raise InputError(f"There is no configuration file {file}{hint}") from error
    except IsADirectoryError as error:
        raise InputError(f"{file}: is a folder, expected a YAML file{_as_setting(file)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as a UTF-8 text file ({error}).") from error
    except yaml.YAMLError as error:
        hint = _as_setting(file) or "."
        raise InputError(f"{file}: not valid YAML: {_reason(error)}{hint}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{file}: expected keys and values (`model: gpt2`), got {values!r:.80}.")
    return values


def _as_setting(file: Path) -> str:
    """The end of a sentence about a first word that was meant as a setting, by its looks."""
    if file.suffix in (".yaml", ".yml", ".json"):
        return ""
    key = "data" if file.suffix in (".jsonl", ".csv", ".parquet", ".gz") else "model"
    return f"; settings are key=value, e.g. {key}={file}"


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted key, e.g. `loss.beta=0.1`."""
    key, separator, text = override.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        place = "; a configuration file comes first" if Path(key).suffix == ".yaml" else ""
        raise InputError(f"{override!r:.60}: expected key=value, e.g. loss.beta=0.1{place}.")
    try:
        value = _parse(text) if text.strip() else text
    except yaml.YAMLError:
        value = text
    _set(values, key.strip(), value)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the sections on the way."""
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        inner = shorthand(section.get(parent))
        section[parent] = dict(inner) if isinstance(inner, Mapping) else {}
        section = section[parent]
    section[last] = value


def nested(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the values with dotted keys set on top.

    >>> nested({"loss": {"beta": 1, "name": "dpo"}}, {"loss.beta": 0.3})
    {'loss': {'beta': 0.3, 'name': 'dpo'}}
    """
    found = dict(values)
    for key, value in settings.items():
        _set(found, key, value)
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values: `nested` the other way round. Of an empty section nothing.

    >>> dict(flat({"loss": {"beta": 0.3, "name": "dpo"}, "seed": 0}))
    {'loss.beta': 0.3, 'loss.name': 'dpo', 'seed': 0}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def validate(schema: type[Config], values: Mapping[str, Any], *, where: str = "") -> Config:
    """The validated configuration, or every problem in one message.

    Raises:
        InputError: one line a problem, with the dotted key, what was expected and what came.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = [_describe(schema, problem) for problem in error.errors()]
    head = f"{where}: " if where else ""
    if len(problems) == 1:
        raise InputError(f"{head}{problems[0]}")
    lines = "\n".join(f"  {problem}" for problem in problems)
    raise InputError(f"{head}{len(problems)} problems in the configuration:\n{lines}")


def _describe(schema: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """One validation problem as a sentence."""
    location = without_tags(problem["loc"])
    key = ".".join(location)
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{key}.name: {describe_unknown_loss(problem['input'].get('name'))}"
    if problem["type"] == "extra_forbidden":
        effectless = describe_effectless(problem["loc"])
        if effectless is not None:
            return f"{key}: {effectless}"
        known = all_keys(schema)
        own = key_of(key, known) or key_of(location[-1], known)
        near = did_you_mean(key, known) or did_you_mean(location[-1], known)
        hint = f"; did you mean {own}?" if own else near
        if key in known:
            nested = ": {".join(location[0].split(".")) + ": ..." + "}" * location[0].count(".")
            hint = f"; in a file, write {nested}"
        return f"{key}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{key}: is required, e.g. {_example(key)}"
    reason = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {reason}" if key else reason
    reason = _PLAIN_REASONS.get(problem["type"], f"{reason[0].lower()}{reason[1:]}")
    hint = ""
    if problem["type"] == "literal_error":
        hint = did_you_mean(str(problem["input"]), re.findall(r"'(.*?)'", reason))
    if problem["type"] in ("model_type", "dict_type"):
        inner = (name for name in known_keys(schema) if name.startswith(f"{key}."))
        reason += f", e.g. {_example(next(inner, key))}"
    if problem["type"] == "list_type":
        reason += f", e.g. {key}=[{problem['input']}]"
    return f"{key}: {reason} (got {problem['input']!r:.60}){hint}"


def _example(key: str) -> str:
    """A setting of that key."""
    return _EXAMPLES.get(key, f"{key}=...")


_EXAMPLES = {
    "model": "model=gpt2",
    "models": "models.dpo=runs/dpo",
    "data": "data=prefs.jsonl",
    "out": "out=runs/one",
    "reward": "reward=runs/reward",
    "batch.size": "batch.size=16",
}

ELSEWHERE = {
    "bf16": "precision",
    "eval_dataset": "data.test",
    "eval_steps": "evaluation.every",
    "fsdp": "distributed.kind",
    "gradient_accumulation_steps": "batch.max_tokens",
    "loss_type": "loss.name",
    "lora_alpha": "adapter.alpha",
    "lora_r": "adapter.rank",
    "lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "model_name_or_path": "model.path",
    "num_train_epochs": "epochs",
    "optim": "optimizer.name",
    "output_dir": "out",
    "peft_config": "adapter.kind",
    "per_device_train_batch_size": "batch.size",
    "ref_model": "reference.path",
    "ref_model_mixup_alpha": "moving_reference.mix",
    "ref_model_sync_steps": "moving_reference.every",
    "save_steps": "save_every",
    "sync_ref_model": "moving_reference.mix",
    "train_dataset": "data.path",
    "warmup_ratio": "optimizer.warmup",
    "warmup_steps": "optimizer.warmup",
}
"""What TRL, transformers and peft call our keys, where the words are not alike."""

_PLAIN_REASONS = {
    "string_type": "expected text, in quotes where it would be read as something else",
    "list_type": "expected a list",
    "dict_type": "expected keys and values",
    "model_type": "expected keys and values",
}
"""In place of pydantic's words, which speak of Python's types."""


def known_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a configuration; of alternative sections, the keys of the first."""
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        for section in sections_of(field.annotation)[:1]:
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def all_keys(schema: type[BaseModel]) -> list[str]:
    """The same, with the options of every loss."""
    known = known_keys(schema)
    return known + (OPTION_KEYS if "loss.name" in known else [])


def key_of(name: str, known: Sequence[str]) -> str | None:
    """The key that a word can only mean: itself, one that ends in it, or what others call so.

    >>> key_of("learning_rate", ["seed", "optimizer.learning_rate"])
    'optimizer.learning_rate'
    >>> key_of("lr", ["seed", "optimizer.learning_rate"])
    'optimizer.learning_rate'
    """
    own = [key for key in known if key == name or key.endswith(f".{name}")]
    elsewhere = [key for key in known if key == ELSEWHERE.get(name)]
    return next(iter(own + elsewhere), None)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The configuration sections inside a type annotation."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [s for inner in getattr(annotation, "__args__", ()) for s in sections_of(inner)]
