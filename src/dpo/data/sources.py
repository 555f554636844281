"""Anything the user has to validated rows, and rows to the project's own JSONL.

A source is a file (JSONL, JSON, CSV, each also gzipped, or Parquet), a folder of them, a data set
on the Hugging Face hub, or a list of these. What is wrong with it is said at once, up to
`MAX_SHOWN_PROBLEMS` rows, each by file and line.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dpo.atomic import write_text
from dpo.data.files import (
    SUFFIXES,
    Entry,
    FileContent,
    Problem,
    Record,
    data_suffix,
    existing,
    printable,
    read_file,
)
from dpo.data.rows import (
    DemonstrationRow,
    PreferenceRow,
    Prompt,
    RankedRow,
    Row,
    UnpairedRow,
)
from dpo.data.shapes import SCORES, Kind, kind_of_row, read_rows
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
        ignored = ", ".join(self.ignored_columns)
        parts = [
            f"{len(self.rows):,} {self.kind} rows",
            f"shape {self.shape}",
            *([f"{self.num_blank_lines} blank lines skipped"] if self.num_blank_lines else []),
            *([f"ignored columns: {ignored}"] if ignored else []),
            *self.notes,
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
        path: A file, a folder, a hub id `owner/name`, or a list of these. What exists is local.
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


def _read_sources(
    path: Source | Sequence[Source], split: str | None, revision: str | None, limit: int | None
) -> tuple[str, list[_Part]]:
    """What the sources are called in messages, and what they hold: at least one row."""
    sources = [path] if isinstance(path, str | os.PathLike) else list(path)
    name = printable(", ".join(str(source) for source in sources), limit=200)
    _check_options(sources, split, revision, limit)
    parts = [part for source in sources for part in _read_source(source, split, revision)]
    if not any(part.content.entries for part in parts):
        raise InputError(f"{name}: there are no rows; expected at least one.")
    return name, parts


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


def _report(name: str, problems: Sequence[Problem], num_rows: int) -> str:
    if len(problems) == 1:
        return str(problems[0])
    shown = [f"  {problem}" for problem in problems[:MAX_SHOWN_PROBLEMS]]
    if len(problems) > MAX_SHOWN_PROBLEMS:
        shown.append(f"  and {len(problems) - MAX_SHOWN_PROBLEMS} more")
    return "\n".join([f"{name}: {len(problems)} of {num_rows} rows cannot be used:", *shown])


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


def _read_source(source: Source, split: str | None, revision: str | None) -> Iterator[_Part]:
    if _is_hub(source):
        yield _read_hub(str(source), split, revision)
        return
    path = existing(source)
    if path is None:
        raise InputError(
            f"{printable(str(source), limit=1000)}: there is no such file or folder, "
            "and it is no hub id (owner/name)" + (did_you_mean_path(str(source)) or ".")
        )
    if path.is_dir():
        yield from _read_folder(path)
    else:
        yield _Part(read_file(path))


def _read_folder(folder: Path) -> Iterator[_Part]:
    try:
        visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}.") from error
    files = [path for path in visible if path.is_file() and data_suffix(path.name)]
    if not files:
        raise InputError(
            f"{printable(str(folder), limit=1000)}: no data file in this folder "
            f"(sub-folders are not searched); expected {', '.join(SUFFIXES)}."
        )
    left_out = [printable(path.name) for path in visible if path not in files]
    note = f"left out of {printable(folder.name)}: {', '.join(left_out)}"
    for i, path in enumerate(files):
        yield _Part(read_file(path), (note,) if left_out and i == 0 else ())


def _read_hub(name: str, split: str | None, revision: str | None) -> _Part:
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
    where = f"{name}:{split}" if split else name
    entries: list[Entry] = []
    digest = hashlib.sha256()
    for number, values in enumerate(data, 1):
        entries.append(Record(f"{where} row {number}", values))
        # What is no JSON (an image, a date) is no column of ours, and its repr may hold an address.
        line = json.dumps(values, sort_keys=True, default=lambda value: type(value).__name__)
        digest.update(line.encode() + b"\n")
    at = f" at {revision}" if revision else ""
    return _Part(FileContent(entries, 0, digest.hexdigest()), (f"hub data set {where}{at}",))


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


# -- one type of row to another ----------------------------------------------------------------


def as_pairs(rows: Iterable[Row]) -> tuple[PreferenceRow, ...]:
    """Preference rows as they stand; of a ranked row, every pair whose order is strict.

    A ranking of K responses gives K(K-1)/2 pairs, the better one chosen, in the order of the
    ranking; two responses of equal score give none.

    Raises:
        InputError: A row is neither, or not one pair has a strict order.
    """
    pairs: list[PreferenceRow] = []
    for row in rows:
        if isinstance(row, PreferenceRow):
            pairs.append(row)
        elif isinstance(row, RankedRow):
            pairs += _pairs_of_ranking(row)
        else:
            raise InputError(
                f"{_where(row)}expected preference or ranked rows, got {kind_of_row(row)} rows; "
                "every row needs a chosen and a rejected response, or a ranking."
            )
    if not pairs:
        raise InputError("There is no pair of responses of which one is preferred.")
    return tuple(pairs)


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
        InputError: Nothing is left, or a demonstration is asked for its rejected response.
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
        found.append(DemonstrationRow(row.prompt, text, row.source))
    if not found:
        raise InputError(f"There is no {response} response to imitate.")
    return tuple(found)


def _where(row: Row) -> str:
    return f"{row.source}: " if row.source else ""
