"""Anything the user has to validated rows, and rows to the project's own JSONL.

A source is a file (JSONL, JSON, CSV, each also gzipped, or Parquet), a folder of them, a pattern
such as `shards/*.parquet`, a data set on the Hugging Face hub, or a list of these. What is wrong
with it is said at once, up to `MAX_SHOWN_PROBLEMS` rows, each by file and line.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from dpo.atomic import write_text
from dpo.data.files import (
    SUFFIXES,
    Entry,
    FileContent,
    Problem,
    Record,
    StreamedFile,
    data_suffix,
    existing,
    printable,
    read_file,
)
from dpo.data.rows import (
    DemonstrationRow,
    PreferenceRow,
    Prompt,
    PromptRow,
    RankedRow,
    Row,
    UnpairedRow,
)
from dpo.data.shapes import (
    SCORES,
    Kind,
    Layout,
    Survey,
    common_form,
    kind_of_row,
    of_form,
    read_rows,
    shape_name,
)
from dpo.errors import InputError, did_you_mean_path

MAX_SHOWN_PROBLEMS = 20

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOOKS_LOCAL = re.compile(r"[./~\\]|[A-Za-z]:\\")

Source = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """Validated rows of one type and form, and what the log says about where they came from.

    `sha256` is the file's own digest (as `sha256sum` prints it); for several files, the digest of
    their digests; for a hub data set, of its rows.
    """

    rows: tuple[Row, ...]
    kind: Kind
    shape: str
    sha256: str
    num_blank_lines: int
    ignored_columns: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return _described(
            len(self.rows),
            self.kind,
            self.shape,
            self.num_blank_lines,
            self.ignored_columns,
            self.notes,
        )


def _described(
    num_rows: int,
    kind: Kind,
    shape: str,
    num_blank_lines: int,
    ignored_columns: Sequence[str],
    notes: Sequence[str],
) -> str:
    ignored = ", ".join(ignored_columns)
    parts = [
        f"{num_rows:,} {kind} rows",
        f"shape {shape}",
        *([f"{num_blank_lines} blank lines skipped"] if num_blank_lines else []),
        *([f"ignored columns: {ignored}"] if ignored else []),
        *notes,
    ]
    return "; ".join(parts)


def load_rows(
    path: Source | Sequence[Source],
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> LoadedRows:
    """Read and validate every row of one or more sources; all must have one shape.

    Args:
        path: A file, a folder, a pattern, a hub id `owner/name`, or a list of these. What exists is
            local.
        columns: Our column names to the user's, where they differ: `{"prompt": "question"}`.
        split: The split of a hub data set; needed where it has several.
        revision: The revision of a hub data set.
        limit: Look at the first so many rows only.

    Raises:
        InputError: There is no such source, a row cannot be used (the first 20 are listed, with
            the count of the rest), there is no row, or an option is without effect.
    """
    name, parts = _read_sources(path, split, revision, limit)
    entries = [entry for part in parts for entry in part.content.entries][:limit]
    read = read_rows(entries, columns or {})
    if read.problems:
        raise InputError(_report(name, read.problems, len(entries)))
    return LoadedRows(
        rows=read.rows,
        kind=kind_of_row(read.rows[0]),
        shape=read.shape,
        sha256=_joint_sha256([part.content.sha256 for part in parts]),
        num_blank_lines=sum(part.content.num_blank_lines for part in parts),
        ignored_columns=read.ignored_columns,
        notes=tuple(note for part in parts for note in part.notes),
    )


def load_records(
    path: Source | Sequence[Source], *, split: str | None = None, revision: str | None = None
) -> tuple[list[Record], str]:
    """Every row as it stands, whatever its columns, and the digest of the sources, as in
    `load_rows`.

    Raises:
        InputError: There is no such source, or a row cannot be read.
    """
    name, parts = _read_sources(path, split, revision, None)
    entries = [entry for part in parts for entry in part.content.entries]
    problems = [entry for entry in entries if isinstance(entry, Problem)]
    if problems:
        raise InputError(_report(name, problems, len(entries)))
    records = [entry for entry in entries if isinstance(entry, Record)]
    return records, _joint_sha256([part.content.sha256 for part in parts])


class StreamedRows:
    """Validated rows of one type and form, read from the disk as often as they are gone through:
    the rows of `load_rows`, of which only one is in memory.

    What is wrong is said as by `load_rows`, by whoever goes through them first.
    """

    def __init__(
        self,
        path: Source | Sequence[Source],
        *,
        columns: Mapping[str, str] | None = None,
        split: str | None = None,
        revision: str | None = None,
    ) -> None:
        self._name, sources = _named_sources(path, split, revision, None)
        self._columns = columns or {}
        self._parts: list[StreamedFile | _HubData] = []
        self._notes: list[str] = []
        for source in sources:
            for part, notes in _find_source(source, split, revision):
                self._parts.append(StreamedFile(part) if isinstance(part, Path) else part)
                self._notes += notes

    @property
    def sha256(self) -> str:
        """As `LoadedRows.sha256`."""
        return _joint_sha256([part.sha256 for part in self._parts])

    @property
    def content(self) -> list[Any]:
        """What decides the rows: names, digests and columns."""
        return [[[part.name, part.sha256] for part in self._parts], sorted(self._columns.items())]

    def __iter__(self) -> Iterator[Row]:
        _, layout = self._surveyed
        is_text: bool | None = None
        for row in layout.read(self._entries()):
            if is_text is None and not isinstance(row, Problem):
                is_text = isinstance(row.prompt, str)
            found = row if is_text is None else of_form(row, is_text=is_text)
            if isinstance(found, Problem):
                raise InputError(self._report_all(layout))
            yield found

    @property
    def num_rows(self) -> int:
        return self._surveyed[0].num_entries

    @property
    def shape(self) -> str:
        """As `LoadedRows.shape`."""
        return shape_name(self._surveyed[1].shape, is_text=isinstance(self._first.prompt, str))

    def __str__(self) -> str:
        """As that of the `LoadedRows`."""
        survey, layout = self._surveyed
        return _described(
            survey.num_entries,
            kind_of_row(self._first),
            self.shape,
            survey.num_blank_lines,
            layout.ignored_columns,
            self._notes,
        )

    @property
    def _first(self) -> Row:
        return next(iter(self))

    @cached_property
    def _surveyed(self) -> tuple[Survey, Layout]:
        survey = Survey.of(self._entries())
        if not survey.num_entries:
            raise _no_rows(self._name)
        if survey.first is None:
            problems = (entry for entry in self._entries() if isinstance(entry, Problem))
            raise InputError(_report(self._name, problems, survey.num_entries))
        return survey, Layout.of(survey, self._columns)

    def _entries(self) -> Iterator[Entry | None]:
        for part in self._parts:
            yield from part.entries()

    def _report_all(self, layout: Layout) -> str:
        """All that is wrong, as `load_rows` says it."""
        is_text = common_form(layout.read(self._entries()))
        checked = (of_form(row, is_text=is_text) for row in layout.read(self._entries()))
        problems = (row for row in checked if isinstance(row, Problem))
        return _report(self._name, problems, self.num_rows)


def _read_sources(
    path: Source | Sequence[Source], split: str | None, revision: str | None, limit: int | None
) -> tuple[str, list[_Part]]:
    """What the sources are called in messages, and what they hold: at least one row."""
    name, sources = _named_sources(path, split, revision, limit)
    parts = [
        _Part(read_file(part) if isinstance(part, Path) else part.content(), notes)
        for source in sources
        for part, notes in _find_source(source, split, revision)
    ]
    if not any(part.content.entries for part in parts):
        raise _no_rows(name)
    return name, parts


def _named_sources(
    path: Source | Sequence[Source], split: str | None, revision: str | None, limit: int | None
) -> tuple[str, list[Source]]:
    sources = [path] if isinstance(path, str | os.PathLike) else list(path)
    _check_options(sources, split, revision, limit)
    return printable(", ".join(str(source) for source in sources), limit=200), sources


def _no_rows(name: str) -> InputError:
    return InputError(f"{name}: there are no rows; expected at least one.")


def _check_options(
    sources: Sequence[Source], split: str | None, revision: str | None, limit: int | None
) -> None:
    if not sources or "" in sources:  # which a path would take for the working folder
        raise InputError("No data source is named; expected a file, a folder or a hub id.")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1 row, got {limit}.")
    for option, value in (("split", split), ("revision", revision)):
        if value is not None and not any(_is_hub(source) for source in sources):
            raise InputError(f"{option}: only a hub data set has one; {sources[0]} is local.")


def _report(name: str, problems: Iterable[Problem], num_rows: int) -> str:
    """The first problems, and how many there are."""
    shown: list[Problem] = []
    num_problems = 0
    for problem in problems:
        num_problems += 1
        if len(shown) < MAX_SHOWN_PROBLEMS:
            shown.append(problem)
    if num_problems == 1:
        return str(shown[0])
    lines = [f"  {problem}" for problem in shown]
    if num_problems > len(shown):
        lines.append(f"  and {num_problems - len(shown)} more")
    return "\n".join([f"{name}: {num_problems} of {num_rows} rows cannot be used:", *lines])


def _joint_sha256(digests: Sequence[str]) -> str:
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# -- where rows come from ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    content: FileContent
    notes: tuple[str, ...] = ()


def _is_hub(source: Source) -> bool:
    return (
        isinstance(source, str)
        and existing(source) is None
        and _LOOKS_LOCAL.match(source) is None
        and data_suffix(source) is None
        and _HUB_ID.fullmatch(source) is not None
    )


def _find_source(
    source: Source, split: str | None, revision: str | None
) -> Iterator[tuple[Path | _HubData, tuple[str, ...]]]:
    """The files of a source, or its data on the hub, each with what the log says of it."""
    if _is_hub(source):
        yield _open_hub(str(source), split, revision)
        return
    path = existing(source)
    if path is not None:
        yield from _find_files(path)
        return
    name = printable(str(source), limit=1000)
    if not glob.has_magic(str(source)):
        raise InputError(
            f"{name}: there is no such file or folder, and it is no hub id (owner/name)"
            + (did_you_mean_path(str(source)) or ".")
        )
    matches = sorted(glob.glob(os.path.expanduser(source), recursive=True))
    if not matches:
        raise InputError(f"{name}: no file or folder has such a name.")
    for match in matches:
        yield from _find_files(Path(match))


def _find_files(path: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A file, or the data files of a folder in the order of their names."""
    if not path.is_dir():
        yield path, ()
        return
    try:
        visible = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    files = [file for file in visible if file.is_file() and data_suffix(file.name)]
    if not files:
        raise InputError(
            f"{printable(str(path), limit=1000)}: no data file in this folder "
            f"(sub-folders are not searched); expected {', '.join(SUFFIXES)}."
        )
    left_out = [printable(file.name) for file in visible if file not in files]
    note = f"left out of {printable(path.name)}: {', '.join(left_out)}"
    for i, file in enumerate(files):
        yield file, (note,) if left_out and i == 0 else ()


@dataclass
class _HubData:
    """A data set of the hub, which `datasets` keeps on the disk."""

    name: str
    rows: Iterable[dict[str, object]]

    def entries(self) -> Iterator[Record]:
        for number, values in enumerate(self.rows, 1):
            yield Record(f"{self.name} row {number}", values)

    @cached_property
    def sha256(self) -> str:
        """Of its rows."""
        digest = hashlib.sha256()
        for values in self.rows:
            # What is no JSON (an image, a date) is no column of ours, and its repr may hold an
            # address.
            line = json.dumps(values, sort_keys=True, default=lambda value: type(value).__name__)
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()

    def content(self) -> FileContent:
        return FileContent(list(self.entries()), 0, self.sha256)


def _open_hub(
    name: str, split: str | None, revision: str | None
) -> tuple[_HubData, tuple[str, ...]]:
    datasets: Any = importlib.import_module("datasets")
    try:
        data: Any = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the hub, its cache and its file readers raise types of their own
        reason = printable((str(error).splitlines() or [type(error).__name__])[0], limit=200)
        raise InputError(
            f"{name}: neither a file or folder here nor a data set that can be read from the hub: "
            f"{reason}"
        ) from error
    if isinstance(data, Mapping):  # a data set of several splits, when none is named
        splits = cast("Mapping[str, Any]", data)
        if len(splits) != 1:
            raise InputError(f"{name}: has the splits {', '.join(splits)}; name one of them.")
        ((split, data),) = splits.items()
    at = f" at {revision}" if revision else ""
    where = f"{name}:{split}" if split else name
    return _HubData(where, data), (f"hub data set {where}{at}",)


# -- our own JSONL -----------------------------------------------------------------------------


def write_jsonl(rows: Sequence[Row], path: Source) -> None:
    """Write rows such that `load_rows` gives the same rows back; whole or not at all.

    Raises:
        InputError: No rows, rows of several types or forms, a name that does not end in `.jsonl`,
            or text that is not Unicode (a lone surrogate).
        StorageError: The file cannot be written; what was there before is untouched.
    """
    path = Path(path).expanduser()
    if not path.name.lower().endswith(".jsonl"):
        raise InputError(f"{path}: expected a name that ends in .jsonl.")
    forms = sorted({f"{kind_of_row(row)} rows with {_form(row.prompt)}" for row in rows})
    if len(forms) != 1:
        raise InputError(f"{path}: expected rows of one type, got {' and '.join(forms) or 'none'}.")
    text = "".join(json.dumps(_as_json(row), ensure_ascii=False) + "\n" for row in rows)
    try:
        write_text(path, text)
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: a row has a lone surrogate, which is no text.") from error


def _form(prompt: Prompt) -> str:
    return "a text prompt" if isinstance(prompt, str) else "a conversation"


def _as_json(row: Row) -> dict[str, object]:
    prompt: object = row.prompt
    if not isinstance(row.prompt, str):
        prompt = [message._asdict() for message in row.prompt]
    match row:
        case PreferenceRow():
            pair = {"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected}
            return (
                pair
                if row.scores is None
                else {**pair, **dict(zip(SCORES, row.scores, strict=True))}
            )
        case RankedRow():
            scores = {} if row.scores is None else {"scores": row.scores}
            return {"prompt": prompt, "responses": row.responses, **scores}
        case UnpairedRow():
            return {"prompt": prompt, "completion": row.completion, "label": row.label}
        case DemonstrationRow():
            return {"prompt": prompt, "response": row.response}
        case PromptRow():
            return {"prompt": prompt}


# -- one type of row to another ----------------------------------------------------------------


def as_pairs(rows: Iterable[Row]) -> tuple[PreferenceRow, ...]:
    """Preference rows as they stand; of a ranked row, every pair whose order is strict.

    A ranking of K responses gives K(K-1)/2 pairs, the better one chosen, in the order of the
    ranking; two responses of equal score give none.

    Raises:
        InputError: A row is neither, or not one pair has a strict order.
    """
    pairs = tuple(each_pair(rows))
    if not pairs:
        raise no_pair()
    return pairs


def each_pair(rows: Iterable[Row]) -> Iterator[PreferenceRow]:
    """The pairs of `as_pairs`, one by one; there may be none."""
    for row in rows:
        if isinstance(row, PreferenceRow):
            yield row
        elif isinstance(row, RankedRow):
            yield from _pairs_of_ranking(row)
        else:
            raise InputError(
                f"{_where(row)}expected preference or ranked rows, got {kind_of_row(row)} rows; "
                "every row needs a chosen and a rejected response, or a ranking."
            )


def no_pair() -> InputError:
    """What is said of rows without a pair."""
    return InputError("There is no pair of responses of which one is preferred.")


def _pairs_of_ranking(row: RankedRow) -> Iterator[PreferenceRow]:
    for better, worse in itertools.combinations(range(len(row.responses)), 2):
        scores = None if row.scores is None else (row.scores[better], row.scores[worse])
        if scores is None or scores[0] > scores[1]:
            better_text, worse_text = row.responses[better], row.responses[worse]
            yield PreferenceRow(row.prompt, better_text, worse_text, row.source, scores, row.subset)


def as_rankings(rows: Iterable[Row]) -> tuple[RankedRow, ...]:
    """Ranked rows as they stand; a preference row is a ranking of two.

    Raises:
        InputError: A row is neither, or scores its chosen response below the rejected one.
    """
    rankings: list[RankedRow] = []
    for row in rows:
        if isinstance(row, RankedRow):
            rankings.append(row)
        elif isinstance(row, PreferenceRow):
            two = (row.chosen, row.rejected)
            if row.scores is not None and row.scores[0] < row.scores[1]:
                raise InputError(
                    f"{_where(row)}chosen_score {row.scores[0]:g} is below rejected_score "
                    f"{row.scores[1]:g}; a ranking goes by the scores."
                )
            rankings.append(RankedRow(row.prompt, two, row.scores, row.source, row.subset))
        else:
            raise InputError(
                f"{_where(row)}expected ranked or preference rows, got {kind_of_row(row)} rows; "
                "every row needs responses in an order."
            )
    return tuple(rankings)


def as_unpaired(rows: Iterable[Row]) -> tuple[UnpairedRow, ...]:
    """Unpaired rows as they stand; of a preference row, the chosen response as desirable and the
    rejected one as undesirable.

    Raises:
        InputError: A row is neither, or all labels are the same.
    """
    judged: list[UnpairedRow] = []
    for row in rows:
        if isinstance(row, UnpairedRow):
            judged.append(row)
        elif isinstance(row, PreferenceRow):
            for text, label in ((row.chosen, True), (row.rejected, False)):
                judged.append(UnpairedRow(row.prompt, text, label, row.source, row.subset))
        else:
            raise InputError(
                f"{_where(row)}expected unpaired or preference rows, got {kind_of_row(row)} rows; "
                "every row needs a completion and a label."
            )
    if len({row.label for row in judged}) < 2:
        raise InputError("Expected desirable and undesirable completions; all have one label.")
    return tuple(judged)


def as_demonstrations(
    rows: Iterable[Row], *, response: Literal["chosen", "rejected"] = "chosen"
) -> tuple[DemonstrationRow, ...]:
    """What supervised fine-tuning imitates: the better response of each row (or the worse).

    The chosen of a preference row, the best of a ranking, an unpaired completion that is labelled
    desirable, a demonstration as it stands; with `response="rejected"` the rejected, the worst,
    the undesirable. Only unpaired rows of the other label drop out: `len(rows)` less the length of
    the result.

    Raises:
        InputError: Nothing is left, a demonstration is asked for its rejected response, or there
            are prompts alone.
    """
    better = response == "chosen"
    found: list[DemonstrationRow] = []
    for row in rows:
        match row:
            case PreferenceRow():
                text = row.chosen if better else row.rejected
            case RankedRow():
                text = row.responses[0 if better else -1]
            case UnpairedRow():
                if row.label is not better:
                    continue
                text = row.completion
            case DemonstrationRow():
                if not better:
                    raise InputError(f"{_where(row)}a demonstration has no rejected response.")
                text = row.response
            case PromptRow():
                raise InputError(
                    f"{_where(row)}expected rows with responses, got prompt rows; every row needs "
                    "something to imitate."
                )
        found.append(DemonstrationRow(row.prompt, text, row.source))
    if not found:
        raise InputError(f"There is no {response} response to imitate.")
    return tuple(found)


def _where(row: Row) -> str:
    return f"{row.source}: " if row.source else ""
