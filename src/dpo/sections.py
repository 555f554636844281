"""What every part of the configuration is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _folder(name: str) -> str:
    if not name.strip() or "\0" in name:  # an empty one would be where the command was given
        raise ValueError(f"expected the name of a folder (got {name!r:.60})")
    return name


Folder = Annotated[str, AfterValidator(_folder)]


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def shorthand(value: Any) -> Any:
    """`model=gpt2` means `model.path=gpt2`; a list of files means `data.path` too."""
    return {"path": value} if isinstance(value, str | list) else value


def shorthand_for(key: str) -> Callable[[Any], Any]:
    """A validator with which `section=text` means `section.KEY=text`.

    >>> adapter = shorthand_for("kind")
    >>> adapter("lora")
    {'kind': 'lora'}
    >>> adapter({"path": "lora", "rank": 8})  # what `adapter=lora adapter.rank=8` became
    {'kind': 'lora', 'rank': 8}
    """

    def validator(value: Any) -> Any:
        if isinstance(value, str):
            return {key: value}
        if isinstance(value, Mapping) and "path" in value:
            return {key: value["path"]} | {k: value[k] for k in value if k != "path"}
        return value

    return validator
