"""One annotator's way through the pairs: what is shown, what was said, and back again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any, Literal, get_args

from dpo.data.files import page_text
from dpo.errors import InputError
from dpo.evaluate.arena.judgements import (
    Judgement,
    JudgementFile,
    JudgementVerdict,
    Retraction,
    Summary,
    describe,
    read_judgements,
    summary_of,
)
from dpo.evaluate.arena.pairs import Pair, Side

Choice = Literal["left", "right", "tie", "skip"]
CHOICES: tuple[Choice, ...] = get_args(Choice)


class Session:
    """The pairs that are left to judge, and those that were judged, in order.

    Safe to call from several threads: every call is whole before the next begins.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        file: JudgementFile,
        *,
        annotator: str,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Go on from what stands in the file; pairs with identical answers are ties at once.

        Raises:
            StorageError: the file cannot be written.
        """
        self._file, self._annotator, self._seed, self._clock = file, annotator, seed, clock
        self._lock = threading.Lock()
        self._names = pairs[0].a.responder, pairs[0].b.responder
        self._shown_since: tuple[str, float] | None = None
        """The pair that is shown, and since when."""
        known = {x.pair: x.verdict for x in file.standing if x.annotator == annotator}
        for pair in pairs:
            if pair.identical and pair.id not in known:
                file.append(self._judgement(pair, "tie"))
        shown = {pair.id: pair for pair in pairs if not pair.identical}
        self._num_identical = len(pairs) - len(shown)
        self._judged = [
            shown[x] for x, verdict in known.items() if x in shown and verdict != "skip"
        ]
        done = {pair.id for pair in self._judged}
        self._queue = [pair for pair in reversed(shown.values()) if pair.id not in done]
        """What is left to judge, the next one last."""

    def progress(self) -> dict[str, int]:
        """How many pairs were judged, of how many, and how many are not shown."""
        return {
            "done": len(self._judged),
            "total": len(self._judged) + len(self._queue),
            "identical": self._num_identical,
        }

    def state(self) -> dict[str, Any]:
        """All that the page is told. No name is in it before every pair was judged."""
        with self._lock:
            if not self._queue:
                summary = describe(self._summary())
                return {**self.progress(), "pair": None, "summary": summary}
            pair = self._queue[-1]
            if self._shown_since is None or self._shown_since[0] != pair.id:
                self._shown_since = pair.id, self._clock()
            a, b = page_text(pair.a.text), page_text(pair.b.text)
            left, right = (a, b) if pair.left(self._seed) == "a" else (b, a)
            prompt = page_text(pair.prompt)
            shown = {"id": pair.id, "prompt": prompt, "left": left, "right": right}
            return {**self.progress(), "pair": shown}

    def judge(self, pair_id: str, choice: Choice) -> None:
        """Write the verdict on the pair that is shown, and go on to the next.

        Raises:
            InputError: another pair is shown (a second window judged this one).
            StorageError: the file cannot be written; the pair is still shown.
        """
        with self._lock:
            if not self._queue or self._queue[-1].id != pair_id:
                raise InputError("this pair is no longer the one to judge; here is the next.")
            pair = self._queue[-1]
            self._file.append(self._judgement(pair, choice))
            self._judged.append(self._queue.pop())

    def undo(self) -> None:
        """Take back the last verdict, of an earlier start too, and show its pair again.

        Raises:
            InputError: there is none.
            StorageError: the file cannot be written; the verdict stands.
        """
        with self._lock:
            if not self._judged:
                raise InputError("there is nothing to undo.")
            retracts = self._judged[-1].id
            self._file.append(
                Retraction(retracts=retracts, annotator=self._annotator, timestamp=_now())
            )
            self._queue.append(self._judged.pop())
            self._shown_since = None

    def summary(self) -> Summary:
        """What the file says about the two responders, everyone's verdicts together."""
        with self._lock:
            return self._summary()

    def _summary(self) -> Summary:
        a, b = self._names
        found = read_judgements([self._file.path])
        return summary_of(a, b, [x for x in found if (x.a, x.b) == (a, b)])

    def _judgement(self, pair: Pair, choice: Choice) -> Judgement:
        left = None if pair.identical else pair.left(self._seed)
        shown_for = None
        if left is not None and self._shown_since is not None:
            shown_for = round(self._clock() - self._shown_since[1], 3)
        return Judgement(
            pair=pair.id,
            prompt_digest=pair.prompt_digest,
            a=pair.a.responder,
            b=pair.b.responder,
            temperature=pair.sampled.temperature,
            sample=pair.sampled.sample,
            left=left,
            verdict=_verdict(choice, left),
            annotator=self._annotator,
            seconds=shown_for,
            timestamp=_now(),
            sentence_bert=pair.sentence_bert,
        )


def _verdict(choice: Choice, left: Side | None) -> JudgementVerdict:
    """The choice from a's side."""
    if choice == "tie" or choice == "skip":
        return choice
    return "win" if (choice == "left") == (left == "a") else "loss"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
