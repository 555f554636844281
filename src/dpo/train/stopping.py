"""SIGTERM and SIGINT: the first stops a run where it can go on later, a second one at once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dpo.errors import Stopped
from dpo.train import ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GO_ON = "The same command goes on from here."

log = logging.getLogger("dpo")


@dataclass
class StopRequest:
    """Set by the first signal; the loop saves and leaves after the step at hand."""

    signal: int | None = None


@contextmanager
def stop_after_step() -> Iterator[StopRequest]:
    """Inside, the first signal is only noted."""
    request = StopRequest()

    def note(number: int) -> None:
        request.signal = number
        log.warning("Stopping after this step (again to stop at once).")

    with _on_first_signal(note):
        yield request


@contextmanager
def stop_here() -> Iterator[None]:
    """Inside, the first signal raises `Stopped`: for work before and after the steps, which keeps
    what it has by itself or is short.
    """

    def leave(number: int) -> None:
        raise Stopped(f"Stopped by {signal.Signals(number).name}. {GO_ON}")

    with _on_first_signal(leave):
        yield


@contextmanager
def _on_first_signal(react: Callable[[int], None]) -> Iterator[None]:
    """Inside, the first of the signals is reacted to, and the next one ends the process.

    Of several ranks none is ended by the next one: it may be the first, passed on by the launcher,
    which ends by SIGKILL what does not end by itself.
    """
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL if ranks.size() == 1 else signal.SIG_IGN)
        react(number)

    try:
        for each in SIGNALS:
            previous[each] = signal.signal(each, handle)
    except ValueError:  # not the main thread: its owner decides when to stop
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
