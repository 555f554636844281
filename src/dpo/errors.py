"""What can go wrong on purpose: each error carries the process exit code that the command line
returns for it.
"""


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


def reason_of(error: Exception) -> str:
    """What another library's error says, on one line, for a sentence of ours.

    >>> reason_of(ValueError("no such\n  project"))
    'no such project'
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
