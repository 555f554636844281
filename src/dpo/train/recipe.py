"""`dpo init`: look at the data, and write a recipe whose every key says what it means."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field

from dpo.atomic import write_text
from dpo.config import DataConfig, ModelConfig, PreferenceConfig, RewardConfig, RunConfig, SFTConfig
from dpo.config_files import validate
from dpo.data import synthetic
from dpo.data.audit import responses_of
from dpo.data.files import existing, printable
from dpo.data.guess import guess_columns
from dpo.data.prompts import as_text
from dpo.data.rows import Row
from dpo.data.shapes import Kind
from dpo.data.sources import LoadedRows, load_records, load_rows
from dpo.errors import InputError
from dpo.sections import Section, shorthand

Command = Literal["sft", "train", "reward"]

SCHEMAS: dict[Command, type[RunConfig]] = {
    "sft": SFTConfig,
    "train": PreferenceConfig,
    "reward": RewardConfig,
}
USUAL: dict[Kind, Command] = {
    "demonstration": "sft",
    "preference": "train",
    "ranked": "train",
    "unpaired": "train",
}
"""What rows of a kind are for, if nothing is asked for."""

LOSSES: dict[tuple[Command, Kind], Any] = {
    ("train", "preference"): {"name": "dpo", "beta": 0.1},
    ("train", "ranked"): {"name": "plackett_luce", "beta": 0.1},
    ("train", "unpaired"): {"name": "kto", "beta": 0.1},
    ("reward", "preference"): "bradley_terry",
    ("reward", "ranked"): "plackett_luce",
}
CHARACTERS_PER_TOKEN = 3
"""Fewer than in English text, so that lengths are rather over- than underestimated."""

WIDTH = 100
"""Columns of a recipe."""


class InitConfig(Section):
    """What a recipe is written for."""

    data: Annotated[DataConfig, BeforeValidator(shorthand)]
    model: Annotated[ModelConfig, BeforeValidator(shorthand)]
    out: str = Field("recipe.yaml", description="The file to write.")
    command: Command | None = Field(
        None, description="sft, train or reward; none: what the rows are for."
    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a command for some data and a model, and what was seen of these."""

    command: Command
    values: dict[str, Any]
    seen: str
    """Of the data, in words."""
    remarks: list[str]

    def text(self, file: Path) -> str:
        """The YAML file; its head says how it is used."""
        config = validate(SCHEMAS[self.command], self.values)
        run = f"dpo {self.command} {printable(shlex.quote(str(file)), limit=1000)}"
        head = [
            *textwrap.wrap(f"Written by dpo init for {self.seen}.", WIDTH - 2),
            "",
            f"  {run} --dry-run   # rows, tokens and steps, before anything is trained",
            f"  {run}",
            f"  {run} epochs=2 out=runs/other   # other settings on top",
            "",
            f"All other keys, with their defaults: dpo config {self.command}",
            *(line for remark in self.remarks for line in ("", *textwrap.wrap(remark, WIDTH - 2))),
        ]
        lines = [*(f"# {line}".rstrip() for line in head), *commented(config, self.values)]
        return "\n".join(lines) + "\n"


def make_recipe(config: InitConfig) -> Recipe:
    """Look at the rows and choose settings for them.

    Raises:
        InputError: the data cannot be used, the command cannot use it, or there is no such model,
            or it does not go with the command.
    """
    rows, kind, seen, columns = _look(config.data)
    if kind == "prompt":
        raise InputError(
            f"{seen}: prompts alone are for dpo online and dpo ppo, for which there is no recipe "
            "to write; dpo ppo --help has a command."
        )
    command = config.command or USUAL[kind]
    if command != "sft" and (command, kind) not in LOSSES:
        raise InputError(
            f"command: {command} does not take {kind} rows; {USUAL[kind]} does: leave it out."
        )
    data = {"path": config.data.path, **config.data.model_dump(mode="json", exclude_unset=True)}
    data |= {"columns": columns} if columns else {}
    values = {
        "model": config.model.model_dump(mode="json", exclude_unset=True),
        "data": data | _data_settings(config.data, rows, _positions(config.model)),
        "out": f"runs/{_name(config.data)}-{'dpo' if command == 'train' else command}",
        "seed": 0,
        **_loss(command, kind),
        **_training_settings(command, len(rows)),
    }
    validate(SCHEMAS[command], values)
    return Recipe(command, values, seen, _remarks(config, command, columns))


def write_recipe(recipe: Recipe, file: Path) -> None:
    """Write the recipe where nothing is yet.

    Raises:
        InputError: there is such a file.
        StorageError: it cannot be written.
    """
    if file.exists():
        raise InputError(f"out: {file} exists; name another file, e.g. out=another.yaml.")
    write_text(file, recipe.text(file))


# -- what the data are ---------------------------------------------------------------------------


def _look(data: DataConfig) -> tuple[tuple[Row, ...], Kind, str, dict[str, str]]:
    """The rows, their kind, both in words, and column names that were guessed."""
    if data.path == "synthetic":
        made = synthetic.preferences(**data.synthetic.model_dump())
        return made, "preference", f"{len(made):,} pairs of the embedded data", {}

    def load(columns: Mapping[str, str]) -> LoadedRows:
        return load_rows(data.path, columns=columns, split=data.split, revision=data.revision)

    columns: dict[str, str] = {}
    try:
        loaded = load(data.columns)
    except InputError:
        if data.columns:
            raise
        records, _ = load_records(data.path, split=data.split, revision=data.revision)
        columns = guess_columns(list(records[0].values))
        if not columns:
            raise
        loaded = load(columns)
    if loaded.kind == "prompt" and not data.columns:  # of the responses' names none is ours
        columns = guess_columns(["prompt", *loaded.ignored_columns])
        loaded = load(columns) if columns else loaded
    name = data.path if isinstance(data.path, str) else ", ".join(data.path)
    return loaded.rows, loaded.kind, f"{printable(name, limit=200)}: {loaded}", columns


def _name(data: DataConfig) -> str:
    """A short name for the data, that can be a part of a folder's."""
    first = data.path if isinstance(data.path, str) else data.path[0]
    stem = Path(first).name.split(".")[0]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem) or "data"


# -- settings ------------------------------------------------------------------------------------


def _positions(model: ModelConfig) -> int | None:
    """The longest sequence that the model takes, where it is known here.

    Raises:
        InputError: the model is named as a folder, and there is none.
    """
    if model.fresh is not None:
        return model.fresh.positions
    from dpo.models.adapters import model_below
    from dpo.models.load import find_model, positions_of

    assert model.path is not None
    source = find_model(model.path, revision=model.revision)
    return positions_of(model_below(source)) if source.local else None


def _data_settings(
    data: DataConfig, rows: tuple[Row, ...], positions: int | None
) -> dict[str, Any]:
    """Room for all but one row in a hundred, as far as the model has it; and enough held-out rows
    of few.
    """
    settings: dict[str, Any] = {}
    if data.test is None and "test_fraction" not in data.model_fields_set:
        settings["test_fraction"] = 0.1 if len(rows) >= 200 else 0.2
    if "max_length" not in data.model_fields_set:
        lengths = sorted(_num_characters(row) for row in rows)
        tokens = lengths[int(0.99 * (len(lengths) - 1))] / CHARACTERS_PER_TOKEN
        room = next((n for n in (512, 1024, 2048) if n >= tokens), 4096)
        settings["max_length"] = min(room, positions or room)
    return settings


def _num_characters(row: Row) -> int:
    return len(as_text(row.prompt)) + max(len(text) for _, text in responses_of(row))


def _loss(command: Command, kind: Kind) -> dict[str, Any]:
    return {} if command == "sft" else {"loss": LOSSES[command, kind]}


def _training_settings(command: Command, num_rows: int) -> dict[str, Any]:
    """A batch that leaves some twenty steps in a pass, and more passes over few rows."""
    rates = {"sft": 2e-5, "train": 5e-6, "reward": 1e-5}
    evaluation: dict[str, Any] = {"every": "epoch", "max_rows": 1000}
    if command != "reward":
        evaluation |= {"num_samples": 8, "max_new_tokens": 128}
    if command == "train":
        evaluation["kl_prompts"] = 64
    few = num_rows < 1000 and command != "reward"
    return {
        "epochs": 3 if few else 2 if command == "sft" else 1,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "save_every": "epoch",
        "optimizer": {"learning_rate": rates[command], "schedule": "linear", "warmup": 0.1},
        "batch": {
            "size": next((size for size in (32, 16, 8) if 20 * size <= num_rows), 4),
            "max_tokens": 4096,
        },
        "evaluation": evaluation,
    }


def _remarks(config: InitConfig, command: Command, columns: Mapping[str, str]) -> list[str]:
    found = []
    if columns:
        guessed = ", ".join(f"{ours} is {printable(theirs)}" for ours, theirs in columns.items())
        found.append(f"The columns were guessed: {guessed}. Look at them before you train.")
    path = config.model.path
    folder = existing(path) if path else None
    if command == "train" and (folder is None or not (folder / "manifest.json").is_file()):
        found.append(
            "DPO and its like start best from a model that already answers as the data do. Where "
            f"{path} does not yet, fine-tune it first (dpo init command=sft, the same data) and "
            "name that run as model.path here."
        )
    return found


# -- a file that explains itself -----------------------------------------------------------------


def commented(config: BaseModel, values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """The values as YAML, each key with the description that its schema has for it.

    Args:
        config: the same values, validated: its classes are those of the sections.
    """
    apart = True  # from what stands above, by an empty line
    for name, value in values.items():
        section, field = getattr(config, name), type(config).model_fields[name]
        is_section = isinstance(section, BaseModel) and isinstance(value, Mapping)
        if not indent and (apart or is_section):
            yield ""
        apart = is_section
        if is_section:
            yield from _comment(_summary(type(section)), indent)
            yield f"{indent}{name}:"
            yield from commented(section, value, indent + "  ")
        else:
            yield from _explained(indent, name, value, field.description)


def _explained(indent: str, name: str, value: Any, description: str | None) -> Iterator[str]:
    """One key, and what it means behind it or, where that is too long, above it."""
    line = indent + _as_yaml(name, value)
    if description is None:
        yield line
    elif len(f"{line}  # {description}") <= WIDTH:
        yield f"{line}  # {description}"
    else:
        yield from _comment(description, indent)
        yield line


def _summary(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().split("\n")[0]


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent) - 2)]


def _as_yaml(name: str, value: Any) -> str:
    """One line, `name: value`."""
    options: dict[str, Any] = {"allow_unicode": True, "sort_keys": False, "width": 2**20}
    braced = yaml.safe_dump({name: value}, default_flow_style=True, **options)
    return str(braced).strip()[1:-1]
