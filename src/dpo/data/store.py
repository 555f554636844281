"""Tables on disk that are read through memory-mapped Arrow files: as long as the disk allows.

A store is a folder of Arrow files, named by what it was made of. It appears whole or not at all;
whoever finds it uses it, whoever does not makes it, and of several at once one makes it while the
others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import pyarrow as pa

from dpo.atomic import replace_folder, storage_errors, write_json

VERSION = 1
"""Counts changes of what a store holds; a part of every name."""

BATCH = 1024
"""Rows that are written at once."""

GIVE_BACK = 128
"""Rows that are read between two times that pages are given back: the kernel maps some 64 KiB about
each place that is read.
"""

FACTS = "facts.json"

T = TypeVar("T")
Facts = dict[str, Any]


def cache_folder() -> Path:
    """`$DPO_CACHE`, or `dpo` in the user's cache folder."""
    named = os.environ.get("DPO_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "dpo"


def store_name(content: Any) -> str:
    """The name of a store: SHA-256 of what decides its content, as JSON."""
    text = json.dumps([VERSION, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def made(folder: Path, make: Callable[[Path], Facts]) -> tuple[Facts, bool]:
    """The facts of a store, and whether it was there; `make` fills the folder where it is not, or
    not whole, and returns them.

    Raises:
        StorageError: the disk is full, read-only or gone; nothing half-made is left.
    """
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        found = _facts(folder)
        if found is not None:
            return found, True
        with replace_folder(folder) as temporary:
            facts = make(temporary)
            sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            write_json(temporary / FACTS, {"files": sizes, "facts": facts})
        return facts, False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes this store."""
    with storage_errors(folder), folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _facts(folder: Path) -> Facts | None:
    """The facts of a whole store: every file is there and as long as it was when written."""
    try:
        known = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in known["files"]}
        return known["facts"] if sizes == known["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def writing(file: Path, schema: Any) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that appends a row to a new Arrow file; at most `BATCH` rows are in memory."""
    rows: list[dict[str, Any]] = []
    with file.open("wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def append(row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) == BATCH:
                flush()

        def flush() -> None:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            rows.clear()

        yield append
        if rows:
            flush()


class View(Sequence[T], Generic[T]):
    """A sequence whose items are made when they are asked for."""

    @abstractmethod
    def _at(self, place: int) -> T:
        """The item at a place from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self._at(place) for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        return self._at(index % len(self))


class Mapped(View[T]):
    """The rows of an Arrow file, each made from its mapped columns when it is asked for.

    Mapped pages count as the process's resident memory until the kernel wants them back. They are
    given back after every `GIVE_BACK` rows, so that what is resident stays flat; they remain in the
    page cache of the system, from where the next reading has them.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            self._pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._reader = pa.ipc.open_file(pa.py_buffer(self._pages))
        self._num_batches = int(self._reader.num_record_batches)
        last = self._reader.get_batch(self._num_batches - 1).num_rows if self._num_batches else 0
        self._num_rows = max(0, self._num_batches - 1) * BATCH + last
        self._columns = lru_cache(maxsize=64)(self._load)
        self._num_read = 0

    def _load(self, number: int) -> Any:
        return self._open(self._reader.get_batch(number))

    @abstractmethod
    def _open(self, batch: Any) -> Any:
        """The columns of an Arrow batch, as `_row` reads them; nothing is copied."""

    @abstractmethod
    def _row(self, columns: Any, number: int) -> T:
        """Row `number` of a batch."""

    def __len__(self) -> int:
        return self._num_rows

    def _at(self, place: int) -> T:
        batch, number = divmod(place, BATCH)
        row = self._row(self._columns(batch), number)
        self._num_read += 1
        if self._num_read % GIVE_BACK == 0:
            self._give_back()
        return row

    def _give_back(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # on every Unix
            self._pages.madvise(mmap.MADV_DONTNEED)
