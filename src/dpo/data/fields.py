"""The fields of one record: each accessor checks one field and notes what is wrong with it.

An accessor never raises: it returns a stand-in, so that one pass over a row finds everything that
is wrong with it. Whoever reads the row must drop it when there are complaints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast, get_args

from dpo.data.files import is_list, kind_of, printable
from dpo.data.rows import Message, Prompt, Role

_LABELS = {"true": True, "1": True, "false": False, "0": False}


@dataclass
class Fields:
    """One record under our names; each accessor notes what is wrong and returns a stand-in."""

    values: Mapping[str, object]
    user_names: Mapping[str, str] = field(default_factory=dict[str, str])
    complaints: list[str] = field(default_factory=list[str])

    def complain(self, name: str, reason: str) -> None:
        """Note that the field `name` (said in the user's own column name) is wrong."""
        self.complaints.append(f"'{printable(self.user_names.get(name, name))}' {reason}")

    def text(self, name: str) -> str:
        return self._text(name, self.values[name])

    def optional_text(self, name: str) -> str:
        """Missing and null are the empty text."""
        value = self.values.get(name)
        return "" if value is None else self._text(name, value)

    def filled_text(self, name: str) -> str:
        """Text with something in it: without a prompt there is nothing to condition on."""
        text = self.text(name)
        if isinstance(self.values[name], str) and not text.strip():
            self.complain(name, "is empty")
        return text

    def prompt(self, name: str) -> Prompt:
        """Text, or a conversation whose last message is the user's; neither may be empty."""
        value = self.values[name]
        if not is_list(value):
            return self.filled_text(name)
        messages = self.messages(name)
        if messages and messages[-1].role != "user":
            self.complain(name, f"ends with the {messages[-1].role}'s message, expected the user's")
        elif messages and not messages[-1].content.strip():
            self.complain(name, "ends with an empty message")
        return messages

    def response(self, name: str) -> str:
        """Text, or a list with the assistant's one message; it may be empty."""
        if not is_list(self.values[name]):
            return self.text(name)
        messages = self.messages(name)
        if messages and [message.role for message in messages] != ["assistant"]:
            roles = ", ".join(message.role for message in messages)
            self.complain(name, f"must be the assistant's one message after 'prompt' ({roles})")
        return messages[-1].content if messages else ""

    def conversation(self, name: str) -> tuple[tuple[Message, ...], str]:
        """A whole conversation, split into the prompt and the assistant's last message."""
        messages = self.messages(name)
        if messages and messages[-1].role != "assistant":
            self.complain(name, f"ends with the {messages[-1].role}'s message, expected assistant")
        elif messages and (len(messages) < 2 or messages[-2].role != "user"):
            self.complain(name, "has no user message before the assistant's last one")
        return messages[:-1], messages[-1].content if messages else ""

    def messages(self, name: str) -> tuple[Message, ...]:
        """A non-empty list of {role, content}; the empty tuple when anything in it is wrong."""
        value = self.values[name]
        if not is_list(value):
            self.complain(name, f"is {kind_of(value)}, expected a list of messages")
            return ()
        if not value:
            self.complain(name, "is an empty conversation")
        num_complaints = len(self.complaints)
        messages = tuple(self._message(f"{name}[{i}]", item) for i, item in enumerate(value))
        return messages if len(self.complaints) == num_complaints else ()

    def texts(self, name: str) -> tuple[str, ...]:
        """At least two texts."""
        value = self.values[name]
        if not is_list(value):
            self.complain(name, f"is {kind_of(value)}, expected a list of texts")
            return ()
        if len(value) < 2:
            self.complain(name, f"has {len(value)} of at least 2 responses")
        return tuple(self._text(f"{name}[{i}]", item) for i, item in enumerate(value))

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """Finite numbers; None where the column is missing or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not is_list(value):
            self.complain(name, f"is {kind_of(value)}, expected a list of numbers")
            return ()
        return tuple(self._number(f"{name}[{i}]", item) for i, item in enumerate(value))

    def number(self, name: str) -> float | None:
        """One finite number; None where the column is missing or null."""
        value = self.values.get(name)
        return None if value is None else self._number(name, value)

    def label(self, name: str) -> bool:
        """True or false, 1 or 0, also as text."""
        value = self.values[name]
        label = _LABELS.get(value.strip().lower()) if isinstance(value, str) else None
        if isinstance(value, bool | int | float) and value in (0, 1):
            label = bool(value)
        if label is None:
            shown = f"'{printable(value)}'" if isinstance(value, str) else kind_of(value)
            self.complain(name, f"is {shown}, expected true or false (1 or 0)")
        return bool(label)

    def tag(self, name: str) -> str:
        """A short name: text, a number or a truth value, safe to print; else the empty text. It is
        never wrong, since nothing is trained on it.
        """
        value = self.values.get(name)
        return printable(str(value).strip()) if isinstance(value, str | int | float) else ""

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            self.complain(name, f"is {kind_of(value)}, expected text")
            return ""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            self.complain(name, f"has a lone surrogate {code} at character {error.start}")
        return value

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.complain(name, f"is {kind_of(value)}, expected a number")
        elif not math.isfinite(value):
            self.complain(name, f"is {value}, expected a finite number")
        else:
            return float(value)
        return 0.0

    def _message(self, name: str, value: object) -> Message:
        message = cast("dict[str, object]", value) if isinstance(value, dict) else {}
        if "role" not in message or "content" not in message:
            found = ", ".join(printable(key) for key in message) or kind_of(value)
            self.complain(name, f"needs role and content (found: {found})")
            return Message("user", "")
        role = message["role"]
        if role not in get_args(Role):
            shown = f"'{printable(role)}'" if isinstance(role, str) else kind_of(role)
            expected = "system, user or assistant"
            self.complain(name, f"has the role {shown}, expected {expected}")
        return Message(cast(Role, role), self._text(f"{name}.content", message["content"]))
