"""Records to rows: the shapes that preference data comes in, recognised by their columns.

A shape is a line of the table `SHAPES`: the columns it needs, and a function from the `Fields` of a
record to a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from dpo.data.fields import Fields
from dpo.data.files import Entry, Problem, Record, is_list, printable
from dpo.data.rows import (
    DemonstrationRow,
    PreferenceRow,
    Prompt,
    PromptRow,
    RankedRow,
    Row,
    UnpairedRow,
)
from dpo.errors import InputError

Kind = Literal["preference", "ranked", "unpaired", "demonstration", "prompt"]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""The turn markers of hh-rlhf dialogues."""


KINDS: dict[type[Row], Kind] = {
    PreferenceRow: "preference",
    RankedRow: "ranked",
    UnpairedRow: "unpaired",
    DemonstrationRow: "demonstration",
    PromptRow: "prompt",
}


def kind_of_row(row: Row) -> Kind:
    """The name of a row's type: preference, ranked, unpaired, demonstration or prompt."""
    return KINDS[type(row)]


# -- one function per shape --------------------------------------------------------------------


def _preference(fields: Fields) -> Row:
    if _opens_conversation(fields.values["chosen"]):
        row = _implicit_conversations(fields)
        if not fields.complaints and not _agrees(fields.prompt("prompt"), row.prompt):
            fields.complain("prompt", "does not occur in the conversations of chosen and rejected")
        return row
    return PreferenceRow(
        fields.prompt("prompt"),
        fields.response("chosen"),
        fields.response("rejected"),
        scores=_pair_scores(fields),
    )


def _pair_scores(fields: Fields) -> tuple[float, float] | None:
    """Ratings of both responses, or None where a row has neither."""
    chosen, rejected = fields.number("chosen_score"), fields.number("rejected_score")
    if (chosen is None) != (rejected is None):
        missing = "chosen_score" if chosen is None else "rejected_score"
        fields.complain(missing, "is missing although the other response has a score")
    return None if chosen is None or rejected is None else (chosen, rejected)


def _opens_conversation(value: object) -> bool:
    """Whether a list of messages is a whole conversation rather than the assistant's answer."""
    if not is_list(value) or not value or not isinstance(value[0], dict):
        return False
    return cast("dict[str, object]", value[0]).get("role") != "assistant"


def _agrees(prompt: Prompt, conversation: Prompt) -> bool:
    if isinstance(prompt, tuple) or isinstance(conversation, str):
        return prompt == conversation
    return any(m.role == "user" and m.content.strip() == prompt.strip() for m in conversation)


def _implicit(fields: Fields) -> Row:
    if is_list(fields.values["chosen"]) or is_list(fields.values["rejected"]):
        return _implicit_conversations(fields)
    return _implicit_dialogues(fields)


def _implicit_conversations(fields: Fields) -> PreferenceRow:
    """Two conversations that differ in nothing but the assistant's last message."""
    prompt, chosen = fields.conversation("chosen")
    other, rejected = fields.conversation("rejected")
    if not fields.complaints and prompt != other:
        fields.complain("rejected", "differs from 'chosen' before the last message")
    return PreferenceRow(prompt, chosen, rejected, scores=_pair_scores(fields))


def _implicit_dialogues(fields: Fields) -> PreferenceRow:
    """Cut after the last common `\\n\\nAssistant:`; the response keeps its leading space."""
    chosen, rejected = fields.text("chosen"), fields.text("rejected")
    ends = [marker.end() for marker in re.finditer(ASSISTANT, chosen)]
    cut = max((end for end in ends if rejected.startswith(chosen[:end])), default=0)
    if fields.complaints:
        pass
    elif not cut or not chosen.lstrip().startswith(HUMAN.lstrip()):
        fields.complain(
            "chosen",
            "and 'rejected' are not dialogues with a common beginning"
            " '\\n\\nHuman: ... \\n\\nAssistant:', which they must be where there is no prompt",
        )
    else:
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if HUMAN in text[cut:]:
                fields.complain(name, "has another Human turn after the common prompt")
    return PreferenceRow(chosen[:cut], chosen[cut:], rejected[cut:], scores=_pair_scores(fields))


def _instruction(fields: Fields) -> str:
    """The alpaca layout: the instruction, and the input under its heading where there is one."""
    instruction, extra = fields.filled_text("instruction"), fields.optional_text("input")
    return f"{instruction}\n\n### Input:\n{extra}" if extra else instruction


def _instruction_preference(fields: Fields) -> Row:
    prompt = _instruction(fields)
    chosen, rejected = fields.response("chosen"), fields.response("rejected")
    return PreferenceRow(prompt, chosen, rejected, scores=_pair_scores(fields))


def _ranked(fields: Fields) -> Row:
    prompt = fields.prompt("prompt")
    responses, scores = fields.texts("responses"), fields.numbers("scores")
    if scores is None:
        return RankedRow(prompt, responses)
    if len(scores) != len(responses) and not fields.complaints:
        fields.complain("scores", f"has {len(scores)} numbers for {len(responses)} responses")
    if fields.complaints:
        return RankedRow(prompt, responses)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: ties keep their order
    return RankedRow(prompt, tuple(responses[i] for i in order), tuple(scores[i] for i in order))


def _unpaired(fields: Fields) -> Row:
    prompt, completion = fields.prompt("prompt"), fields.response("completion")
    return UnpairedRow(prompt, completion, fields.label("label"))


def _demonstration(response: str) -> Callable[[Fields], Row]:
    return lambda fields: DemonstrationRow(fields.prompt("prompt"), fields.response(response))


def _instruction_demonstration(fields: Fields) -> Row:
    return DemonstrationRow(_instruction(fields), fields.response("output"))


def _messages(fields: Fields) -> Row:
    return DemonstrationRow(*fields.conversation("messages"))


def _prompt(fields: Fields) -> Row:
    return PromptRow(fields.prompt("prompt"))


# -- recognition -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """The columns that a shape needs and those it may have, and how its rows are read."""

    required: tuple[str, ...]
    read: Callable[[Fields], Row]
    optional: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its columns, `prompt/chosen/rejected`."""
        return "/".join(self.required)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.required + self.optional


SCORES = ("chosen_score", "rejected_score")
SUBSET = "subset"
"""The part of the data that a row belongs to: what is measured is also said part by part."""

SHAPES = (
    Shape(("prompt", "chosen", "rejected"), _preference, (*SCORES, SUBSET)),
    Shape(
        ("instruction", "chosen", "rejected"), _instruction_preference, ("input", *SCORES, SUBSET)
    ),
    Shape(("chosen", "rejected"), _implicit, (*SCORES, SUBSET)),
    Shape(("prompt", "responses"), _ranked, ("scores", SUBSET)),
    Shape(("prompt", "completion", "label"), _unpaired, (SUBSET,)),
    Shape(("prompt", "response"), _demonstration("response")),
    Shape(("prompt", "completion"), _demonstration("completion")),
    Shape(("instruction", "output"), _instruction_demonstration, ("input",)),
    Shape(("messages",), _messages),
    Shape(("prompt",), _prompt),
)
"""Every shape, in order of preference: the first whose required columns are all there is taken."""

_RESPONSES = {name for shape in SHAPES for name in shape.required} - {"prompt"}
"""Columns beside which a prompt is not alone: something is missing that belongs to them."""


def recognise(columns: Sequence[str]) -> Shape | None:
    """The shape of a row with these columns.

    >>> recognise(["instruction", "input", "output", "chosen", "rejected"]).name
    'instruction/chosen/rejected'
    >>> recognise(["prompt", "id"]).name, recognise(["prompt", "chosen"])
    ('prompt', None)
    """
    found = next((shape for shape in SHAPES if set(shape.required) <= set(columns)), None)
    alone = found is None or found.read is not _prompt or _RESPONSES.isdisjoint(columns)
    return found if alone else None


@dataclass
class Survey:
    """What the records of a source have for columns: enough to say how they are to be read."""

    first: Record | None = None
    num_entries: int = 0
    num_blank_lines: int = 0
    columns: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """How many records have these columns."""
    parts: dict[tuple[str, str], None] = field(default_factory=dict)
    """(column, "") and (column, key in its messages), in the order in which they first come."""

    @classmethod
    def of(cls, entries: Iterable[Entry | None]) -> Survey:
        """Look at all entries, and remember none but the first record; None is a blank line."""
        survey = cls()
        for entry in entries:
            survey.num_blank_lines += entry is None
            survey.num_entries += entry is not None
            if isinstance(entry, Record):
                survey._add(entry)
        return survey

    def _add(self, record: Record) -> None:
        if self.first is None:
            self.first = record
        self.columns[tuple(record.values)] += 1
        for name, value in record.values.items():
            self.parts[name, ""] = None
            if is_list(value):
                self.parts.update(dict.fromkeys((name, key) for key in _unused_in_messages(value)))


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of a source are read: they have one shape."""

    shape: Shape
    columns: Mapping[str, str]
    ignored_columns: tuple[str, ...]

    @classmethod
    def of(cls, survey: Survey, columns: Mapping[str, str]) -> Layout:
        """The shape that most records have.

        Raises:
            InputError: `columns` names what does not exist, or no record has a known shape.
        """
        _check_columns(survey, columns)
        shape = _common_shape(survey, columns)
        return cls(shape, columns, _unused(survey, shape, columns))

    def read(self, entries: Iterable[Entry | None]) -> Iterator[Row | Problem]:
        """A row, or why there is none, for each entry that is no blank line."""
        for entry in entries:
            if isinstance(entry, Record):
                yield _read_row(entry, self.shape, self.columns)
            elif entry is not None:
                yield entry


def common_form(rows: Iterable[Row | Problem]) -> bool:
    """Whether the prompts of most rows are text; else they are conversations."""
    forms = Counter(isinstance(row.prompt, str) for row in rows if not isinstance(row, Problem))
    return forms.most_common(1)[0][0] if forms else True


def of_form(row: Row | Problem, *, is_text: bool) -> Row | Problem:
    """The row, or that its prompt has another form."""
    if isinstance(row, Problem) or isinstance(row.prompt, str) == is_text:
        return row
    return Problem(row.source, _other_form(is_text))


@dataclass(frozen=True, slots=True)
class ReadRows:
    """The rows of a source that could be read, and the problems of those that could not."""

    rows: tuple[Row, ...]
    problems: list[Problem]
    shape: str
    ignored_columns: tuple[str, ...]


def read_rows(entries: Sequence[Entry], columns: Mapping[str, str]) -> ReadRows:
    """Rows of the shape that most records have; a record of any other shape is a problem.

    Args:
        entries: Records and what could not be read, in the order of the source.
        columns: Our names to the user's, where they differ.

    Raises:
        InputError: `columns` names what does not exist, or no record has a known shape.
    """
    survey = Survey.of(entries)
    if survey.first is None:
        return ReadRows((), [entry for entry in entries if isinstance(entry, Problem)], "", ())
    layout = Layout.of(survey, columns)
    read = list(layout.read(entries))
    is_text = common_form(read)
    checked = [of_form(row, is_text=is_text) for row in read]
    return ReadRows(
        tuple(row for row in checked if not isinstance(row, Problem)),
        [row for row in checked if isinstance(row, Problem)],
        shape_name(layout.shape, is_text=is_text),
        layout.ignored_columns,
    )


def shape_name(shape: Shape, *, is_text: bool) -> str:
    """What a shape is called with its form: `prompt/chosen/rejected, text`."""
    return f"{shape.name}, {'text' if is_text else 'conversations'}"


def _read_row(record: Record, shape: Shape, columns: Mapping[str, str]) -> Row | Problem:
    values = _renamed(record.values, columns)
    found = recognise(list(values))
    fields = Fields(values, columns)
    missing = [name for name in shape.required if name not in values]
    for name in missing:
        fields.complain(name, f"is missing; {_needs(shape, columns)} {_found(record)}")
    if not missing and found is not shape:
        this = f"has the shape {found.name}" if found else f"has no known shape {_found(record)}"
        return Problem(record.source, f"{this}, the others {shape.name}.")
    row = None if missing else shape.read(fields)
    if row is None or fields.complaints:
        return Problem(record.source, "; ".join(fields.complaints) + ".")
    row = replace(row, source=record.source)
    if isinstance(row, DemonstrationRow | PromptRow):
        return row
    return replace(row, subset=fields.tag(SUBSET))


def _other_form(is_text: bool) -> str:
    this, others = ("a conversation", "text") if is_text else ("text", "conversations")
    return f"'prompt' is {this}, in the other rows {others}; a source must have one form."


def _common_shape(survey: Survey, columns: Mapping[str, str]) -> Shape:
    counts: Counter[Shape] = Counter()
    for names, count in survey.columns.items():
        shape = recognise(list(_renamed(dict.fromkeys(names), columns)))
        if shape is not None:
            counts[shape] += count
    if not counts:
        assert survey.first is not None
        shapes = ", ".join(shape.name for shape in SHAPES)
        raise InputError(
            f"{survey.first.source}: no row has a shape that can be recognised "
            f"{_found(survey.first)}; expected the columns of one of {shapes}. "
            "Columns of other names are told by data.columns.prompt=question "
            f"(dpo data check: --column prompt=question).{_separated(survey.first)}"
        )
    shape = counts.most_common(1)[0][0]
    unused = [name for name in columns if name not in shape.columns]
    if unused:
        raise InputError(
            f"columns.{unused[0]}: without effect, for the rows have the shape {shape.name}."
        )
    return shape


def _check_columns(survey: Survey, columns: Mapping[str, str]) -> None:
    ours = list(dict.fromkeys(name for shape in SHAPES for name in shape.columns))
    found = list(dict.fromkeys(name for names in survey.columns for name in names))
    for name, user_name in columns.items():
        if name not in ours:
            raise InputError(
                f"columns: '{printable(name)}' is not one of our names: {', '.join(ours)}."
            )
        if user_name not in found:
            raise InputError(
                f"columns.{name}: there is no column '{printable(user_name)}' (found: "
                f"{', '.join(printable(column) for column in found[:20])})."
            )


def _renamed(values: dict[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """Under our names; a column of the user's that happens to bear a mapped name gives way."""
    if not columns:
        return values
    taken = {*columns, *columns.values()}
    kept = {name: value for name, value in values.items() if name not in taken}
    return kept | {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}


def _needs(shape: Shape, columns: Mapping[str, str]) -> str:
    *first, last = (printable(columns.get(name, name)) for name in shape.required)
    return f"every row needs {', '.join(first)} and {last}" if first else f"every row needs {last}"


def _separated(record: Record) -> str:
    """A sentence about the one column of a CSV file whose lines are cut by something else."""
    [name, *others] = record.values or [""]
    found = [mark for mark in (";", "\t", "|") if mark in name and not others]
    return " A CSV file has commas between its columns." if found else ""


def _found(record: Record) -> str:
    names = ", ".join(printable(name) for name in list(record.values)[:20])
    return f"(found: {names or 'nothing'})"


def _unused(survey: Survey, shape: Shape, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that are not used, and of those that are, what their messages have beyond use."""
    used = {columns.get(name, name) for name in shape.columns}
    ignored = (
        f"{printable(name)}[].{key}" if key else printable(name)
        for name, key in survey.parts
        if (name in used) == bool(key)
    )
    return tuple(dict.fromkeys(ignored))


def _unused_in_messages(messages: list[object]) -> list[str]:
    """What a message holds beyond role and content, where it is not null: `weight`."""
    return [
        printable(key)
        for message in messages
        if isinstance(message, dict)
        for key, value in cast("dict[str, object]", message).items()
        if key not in ("role", "content") and value is not None
    ]
