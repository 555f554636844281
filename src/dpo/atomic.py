"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from dpo.errors import DPOError, InputError, StorageError

_STORAGE_FAILURES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
    errno.EEXIST: "a file of that name is in the way",
    errno.EISDIR: "a folder of that name is in the way",
    errno.ENOTDIR: "a part of the path is a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "its folder does not exist",
}
_RUST_OS_ERROR = re.compile(r"os error (\d+)")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a failure of the disk into one sentence that names the path."""
    try:
        yield
    except DPOError:
        raise
    except Exception as error:
        number = _os_error_number(error)
        if number is None:
            raise
        reason = _STORAGE_FAILURES.get(number, str(error))
        raise StorageError(f"{path} cannot be written: {reason}.") from error


def _os_error_number(error: Exception) -> int | None:
    """The operating system's number of a failure, or None where it is none of its.

    safetensors and tokenizers are written in Rust and raise types of their own on a full disk; only
    the text holds the number.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    found = _RUST_OS_ERROR.search(str(error))
    return int(found.group(1)) if found else None


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Write a new file under another name; it is flushed and takes the place of `path` when
    complete.

    Raises:
        StorageError: the disk is full, read-only or gone; an older file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            yield temporary
            _fsync_file(temporary)
            temporary.replace(path)
            fsync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def _fsync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a text file whole or not at all.

    Args:
        errors: what becomes of a lone surrogate, which UTF-8 cannot hold: "backslashreplace" makes
            it its JSON escape.

    Raises:
        StorageError: the disk is full, read-only or gone; an older file is left as it was.
    """
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors, newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, indented, keys in the order given."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")


def jsonable(value: Any) -> Any:
    """The value with non-finite numbers as text ("nan", "inf"), which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    return value


def unfinished(folder: Path) -> Path:
    """The name of a folder while `replace_folder` fills it."""
    return folder.with_name(f".{folder.name}.tmp")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Fill a new folder under another name; it takes the place of `folder` only when complete.

    Raises:
        StorageError: the disk is full, read-only or gone; an older folder is left as it was.
    """
    temporary = unfinished(folder)
    old = folder.with_name(f".{folder.name}.old")
    with storage_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    _fsync_file(file)
            fsync_folder(temporary)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
            fsync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not folder.exists():
                old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def lock_folder(folder: Path) -> TextIOWrapper:
    """Hold a folder for this process until the stream is closed or the process ends.

    Raises:
        InputError: another process holds it.
    """
    stream = (folder / ".lock").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise InputError(f"out: another process is working in {folder}.") from error
    return stream


def clean_up(folder: Path) -> None:
    """Remove what killed writers left in `folder` and the folders in it; what they had moved aside
    comes back.

    Only for a folder that no other process writes to.
    """
    for torn in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp"), *folder.glob(".*.old")]:
        final = torn.with_name(torn.name[1:-4])
        if torn.suffix == ".old" and not final.exists():
            torn.rename(final)
        elif torn.is_dir():
            shutil.rmtree(torn, ignore_errors=True)
        else:
            torn.unlink(missing_ok=True)
