"""Files to records: every byte decoded strictly, every record with the file and line it came from.

Nothing here knows what a preference is. A reader yields one entry per row: a `Record`, a `Problem`
where the row cannot be read, or None for a blank line. So one bad line never hides the next.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, cast

from dpo.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
"""What a data file's name may end in (in any case)."""

MAX_INTEGER_DIGITS = 300
"""Longer integers fit no float, and beyond 4,300 digits Python refuses to read them at all."""

PARQUET_BATCH = 256
"""Rows of a Parquet file that are in memory at once."""

_BOM = codecs.BOM_UTF8
_JSON_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in its file: column names to values, and the place (`prefs.jsonl:7`)."""

    source: str
    values: dict[str, object]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the row at `source` cannot be used."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


Entry = Record | Problem
Stream = BinaryIO | gzip.GzipFile


@dataclass(frozen=True, slots=True)
class FileContent:
    """The entries of one file in order, its blank lines, and the SHA-256 of its bytes."""

    entries: list[Entry]
    num_blank_lines: int
    sha256: str


def data_suffix(name: str) -> str | None:
    """The suffix by which a file is recognised as data, or None.

    >>> data_suffix("prefs.JSONL.gz"), data_suffix("prefs.yaml")
    ('.jsonl.gz', None)
    """
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def printable(text: str, *, limit: int = 60) -> str:
    """A name or message of the user's, safe to print: no control character, no lone surrogate.

    >>> printable("a\\x1b[31m\\ud800")
    'a\\\\x1b[31m\\\\ud800'
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return shown + "..." if len(text) > limit else shown


_REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Bidirectional classes of the marks that change the order of the text after them."""

_ACTING = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of control characters, lone surrogates, and separators of lines and paragraphs."""


def page_text(text: str) -> str:
    r"""Text that a page shows as it is: line ends and tabs stay; every other control character,
    lone surrogate, separator, and mark that reorders text is written out, so that what is read is
    what is there.

    >>> page_text("a\r\nb\x1b[31m \u202edesrever")
    'a\nb\\x1b[31m \\u202edesrever'
    """
    return "".join(ascii(c)[1:-1] if _acts(c) else c for c in text.replace("\r\n", "\n"))


def _acts(c: str) -> bool:
    if c in "\n\t":
        return False
    return unicodedata.category(c) in _ACTING or unicodedata.bidirectional(c) in _REORDERING


def existing(name: str | os.PathLike[str]) -> Path | None:
    """The file or folder of that name, or None where there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, the home of no user, a null character
        return None


def read_file(path: Path) -> FileContent:
    """Read one data file whole.

    Raises:
        InputError: the file cannot be opened, is no data file, or its gzip stream is damaged.
    """
    name, suffix = _named(path)
    with _reading(name):
        data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    entries: list[Entry] = []
    num_blank_lines = 0
    for entry in _entries(name, suffix, io.BytesIO(data)):
        if entry is None:
            num_blank_lines += 1
        else:
            entries.append(entry)
    return FileContent(entries, num_blank_lines, sha256)


class StreamedFile:
    """A data file that is read from the disk as often as its entries are asked for.

    JSON Lines and Parquet, gzipped or not, are read row by row; JSON and CSV at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name, self._suffix = _named(path)
        self._stat = self._now()

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of its bytes.

        Raises:
            InputError: the file cannot be read, or changed meanwhile.
        """
        digest = hashlib.sha256()
        with self._open() as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        self._check_same()
        return digest.hexdigest()

    def entries(self) -> Iterator[Entry | None]:
        """Its entries in order; None for a blank line.

        Raises:
            InputError: the file cannot be read, its gzip stream is damaged, or it is another than
                it was.
        """
        with self._open() as stream:
            yield from _entries(self.name, self._suffix, stream)
        self._check_same()

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with _reading(self.name), self.path.open("rb") as stream:
            yield stream

    def _now(self) -> tuple[int, int]:
        with _reading(self.name):
            found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    def _check_same(self) -> None:
        if self._now() != self._stat:
            raise InputError(f"{self.name}: changed while it was read; start again.")


def _named(path: Path) -> tuple[str, str]:
    """What a file is called in messages, and the suffix that says how it is read."""
    name = printable(str(path), limit=1000)
    suffix = data_suffix(path.name)
    if suffix is None:
        raise InputError(f"{name}: not a data file; expected one of {', '.join(SUFFIXES)}.")
    return name, suffix


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}.") from error


def _entries(name: str, suffix: str, stream: BinaryIO) -> Iterator[Entry | None]:
    """The entries of a file that is open at its beginning."""
    read = _READERS[suffix.removesuffix(".gz")]
    if not suffix.endswith(".gz"):
        yield from read(name, _without_bom(name, stream))
        return
    try:
        with gzip.GzipFile(fileobj=stream) as unzipped:
            yield from read(name, _without_bom(name, unzipped))
    except InputError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{name}: not a whole gzip file ({error}); copy or download it again."
        ) from error


def _without_bom(name: str, stream: Stream) -> Stream:
    """The stream behind its byte order mark, where it has one."""
    start = stream.read(len(_BOM))
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: is UTF-16 text; save it as UTF-8.")
    if start != _BOM:
        stream.seek(0)
    return stream


# -- JSON --------------------------------------------------------------------------------------


class _StrictJson:
    """JSON that notes what `json.loads` passes over: `complaints` on the last value decoded."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def decode(self, text: str, at: int = 0) -> tuple[object, int]:
        """The value that starts at `at`, and the position after it.

        Raises:
            json.JSONDecodeError: not JSON, or nested too deeply to read.
        """
        self.complaints.clear()
        try:
            return self._decoder.raw_decode(text, at)
        except RecursionError as error:
            raise json.JSONDecodeError("nested too deeply", text, at) from error

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = sorted({printable(key) for key in keys if keys.count(key) > 1})
            self.complaints.append(f"repeated key: {', '.join(repeated)}")
        return values

    def _integer(self, digits: str) -> int:
        if len(digits) > MAX_INTEGER_DIGITS:
            self.complaints.append(f"an integer of {len(digits)} digits")
            return 0
        return int(digits)


def _skip_space(text: str, at: int) -> int:
    found = _JSON_SPACE.match(text, at)
    assert found is not None
    return found.end()


def _entry(source: str, value: object, complaints: list[str]) -> Entry:
    if complaints:
        return Problem(source, "; ".join(complaints) + ".")
    if not isinstance(value, dict):
        return Problem(source, f"expected an object with named fields, found {kind_of(value)}.")
    return Record(source, cast("dict[str, object]", value))


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not valid JSON: {error.msg} (column {error.colno})"


def _read_jsonl(name: str, stream: Stream) -> Iterator[Entry | None]:
    json_reader = _StrictJson()
    for number, line in enumerate(stream, 1):
        is_last = not line.endswith(b"\n")
        if line.strip():
            line = line.removesuffix(b"\n")
            yield _read_json_line(f"{name}:{number}", line, json_reader, is_last=is_last)
        elif not is_last:  # what follows the final line end is no line
            yield None


def _read_json_line(source: str, line: bytes, json_reader: _StrictJson, *, is_last: bool) -> Entry:
    cut_off = "; the file may have been cut off here" if is_last else ""
    try:
        text = line.decode("utf-8").strip()
        value, end = json_reader.decode(text)
        if end < len(text):
            raise json.JSONDecodeError("more text after the object", text, end)
    except UnicodeDecodeError as error:
        hint = cut_off if error.reason == "unexpected end of data" else ""
        return Problem(source, f"{_not_utf8(error)}{hint}.")
    except json.JSONDecodeError as error:
        return Problem(source, f"{_not_json(error)}{cut_off}.")
    return _entry(source, value, json_reader.complaints)


def _read_json(name: str, stream: Stream) -> Iterator[Entry | None]:
    """A list of objects, or an object with one such list in it; else JSON Lines under this name."""
    data = stream.read()
    text = _decode(name, data)
    if isinstance(text, Problem):
        yield text
        return
    if not text.strip():
        return
    try:
        start = _skip_space(text, 0)
        value, end = _StrictJson().decode(text, start)
        if isinstance(value, dict) and re.compile(r"\s*\{").match(text, end):
            yield from _read_jsonl(name, io.BytesIO(data))
            return
        if _skip_space(text, end) < len(text):
            raise json.JSONDecodeError("more text after the value", text, end)
    except json.JSONDecodeError as error:
        yield Problem(f"{name}:{error.lineno}", _not_json(error) + ".")
        return
    list_start = _list_of_objects(text, start, value)
    if list_start is None:
        yield Problem(
            f"{name}:1",
            "expected a list of objects, or an object with one such list; found "
            f"{_kind_with_lists(value)}.",
        )
        return
    yield from _list_entries(name, text, list_start)


def _list_of_objects(text: str, start: int, value: object) -> int | None:
    """Where the list of rows opens in text that is known to be valid JSON, or None."""
    if isinstance(value, list):
        return start
    if not isinstance(value, dict):
        return None
    candidates = _lists_of_objects(value)
    if len(candidates) != 1:
        return None
    json_reader = _StrictJson()
    found = None
    at = _skip_space(text, start + 1)
    while text[at] != "}":
        key, end = json_reader.decode(text, at)
        at = _skip_space(text, _skip_space(text, end) + 1)  # past the colon
        if key == candidates[0]:
            found = at
        _, end = json_reader.decode(text, at)
        at = _skip_space(text, end)
        if text[at] == ",":
            at = _skip_space(text, at + 1)
    return found


def _lists_of_objects(value: dict[str, object]) -> list[str]:
    return [key for key, member in value.items() if _is_list_of_objects(member)]


def _kind_with_lists(value: object) -> str:
    """What a value is; of an object with several lists, such as splits, what to do with them."""
    lists = _lists_of_objects(value) if isinstance(value, dict) else []
    several = f" with {', '.join(map(printable, lists))}; make a file of each"
    return kind_of(value) + (several if len(lists) > 1 else "")


def _is_list_of_objects(value: object) -> bool:
    return is_list(value) and bool(value) and all(isinstance(item, dict) for item in value)


def _list_entries(name: str, text: str, start: int) -> Iterator[Entry]:
    """The elements of the list that opens at `start`, decoded one by one for their line numbers."""
    json_reader = _StrictJson()
    line = 1 + text.count("\n", 0, start)
    counted = start
    at = _skip_space(text, start + 1)
    while text[at] != "]":
        line += text.count("\n", counted, at)
        counted = at
        value, end = json_reader.decode(text, at)
        yield _entry(f"{name}:{line}", value, json_reader.complaints)
        at = _skip_space(text, end)
        if text[at] == ",":
            at = _skip_space(text, at + 1)


# -- CSV and Parquet ---------------------------------------------------------------------------


def _read_csv(name: str, stream: Stream) -> Iterator[Entry | None]:
    """Rows under the header line. CRLF becomes LF, inside quoted cells too."""
    text = _decode(name, stream.read())
    if isinstance(text, Problem):
        yield text
        return
    header: list[str] | None = None
    for line, cells in _csv_lines(text.replace("\r\n", "\n")):
        source = f"{name}:{line}"
        if isinstance(cells, str):
            yield Problem(source, f"not valid CSV: {cells}.")
        elif len(cells) <= 1 and not "".join(cells).strip():
            yield None
        elif header is None:
            header = cells
            repeated = sorted({printable(c) for c in header if header.count(c) > 1})
            if repeated:
                yield Problem(source, f"repeated column: {', '.join(repeated)}.")
                return
        elif len(cells) != len(header):
            yield Problem(
                source, f"expected {len(header)} cells, as in the header, found {len(cells)}."
            )
        else:
            yield Record(source, dict(zip(header, cells, strict=True)))


def _csv_lines(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, cells) per row; the reason instead of the cells where the rest is unreadable."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a dialogue of more than 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, str(error)
            return


def _read_parquet(name: str, stream: Stream) -> Iterator[Entry]:
    pyarrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        file: Any = parquet.ParquetFile(stream)
        columns: list[str] = file.schema_arrow.names
        repeated = sorted({printable(column) for column in columns if columns.count(column) > 1})
        if repeated:
            yield Problem(name, f"repeated column: {', '.join(repeated)}.")
            return
        number = 0
        for batch in file.iter_batches(batch_size=PARQUET_BATCH):
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{name} row {number}", values)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = printable(str(error).splitlines()[0] if str(error) else "", limit=200)
        yield Problem(name, f"not a readable Parquet file: {reason}")


_READERS: dict[str, Callable[[str, Stream], Iterator[Entry | None]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# -- shared ------------------------------------------------------------------------------------


def is_list(value: object) -> TypeGuard[list[object]]:
    """Whether a decoded value is a list; its items may be anything."""
    return isinstance(value, list)


def kind_of(value: object) -> str:
    """What a decoded value is, in words for a message.

    >>> kind_of(None), kind_of(True), kind_of(1.5), kind_of({})
    ('null', 'true', 'a number', 'an object')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _decode(name: str, data: bytes) -> str | Problem:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        return Problem(f"{name}:{line}", _not_utf8(error) + ".")


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x} at {error.start}: {error.reason}); save it as UTF-8"
