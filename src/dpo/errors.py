"""What can go wrong on purpose: each error carries the process exit code that the command line
returns for it.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class DPOError(Exception):
    """A failure that the user reads as one sentence, never as a traceback."""

    exit_code = 1


class InputError(DPOError, ValueError):
    """The user's input is wrong: what was expected, what came, where, and what to do (exit 2)."""

    exit_code = 2


class DivergedError(DPOError, ArithmeticError):
    """A loss or gradient stopped being finite; nothing was updated (exit 3)."""

    exit_code = 3


class CheckpointError(DPOError):
    """A checkpoint cannot be trusted: a file is missing or its digest differs (exit 4)."""

    exit_code = 4


class StorageError(DPOError, OSError):
    """The disk is full, read-only or gone; nothing half-written is left behind (exit 5)."""

    exit_code = 5


class Stopped(DPOError):
    """The run was asked to stop, saved its state and can be resumed by the same command (exit
    75).
    """

    exit_code = 75


class RankLost(DPOError):
    """Another process of the run ended or is silent; the same command goes on from the last
    checkpoint (exit 6).
    """

    exit_code = 6


def did_you_mean(word: str, known: Iterable[object]) -> str:
    """The end of a sentence about a word that is none of the known ones; empty where none is near.

    >>> did_you_mean("linaer", ["linear", "cosine"])
    '; did you mean linear?'
    """
    close = difflib.get_close_matches(word.lower(), [str(name) for name in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def did_you_mean_path(name: str) -> str:
    """The same for a file or folder that is not there, among what its folder holds."""
    path = Path(name)
    try:
        others = [file.name for file in path.parent.iterdir()]
        near = difflib.get_close_matches(path.name, others, n=1, cutoff=0.7)
    except (OSError, ValueError):  # no folder either, or a name that none can have
        return ""
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def reason_of(error: Exception) -> str:
    """What another library's error says, on one line, for a sentence of ours.

    >>> reason_of(ValueError("no such\n  project"))
    'no such project'
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
