"""Questions to an OpenAI-compatible chat endpoint, each asked once: answers are kept on disk.

One question is one POST to `{base_url}/chat/completions` at temperature 0. What passes by itself is
tried again (429, 5xx, timeouts, broken connections, answers that are not in the protocol), after
1, 2, 4, ... seconds or what the server asks for; what does not, fails at once. An answer is written
as soon as it is there, under a digest of all that decides it, so a killed run asks again only what
was in flight.

The key is read from the environment, sent in the header of the request, and goes nowhere else:
whatever the server says is searched for it before it is kept or shown.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from dpo.atomic import storage_errors, write_text
from dpo.errors import InputError
from dpo.evaluation_config import EndpointConfig, is_loopback
from dpo.train.reference import cache_folder

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 300.0
"""Where a server asks for more, the question fails instead."""
MAX_FAILURES_IN_A_ROW = 5
"""So many and the endpoint is taken for gone."""
MAX_ANSWER_BYTES = 16 * 2**20
TRY_AGAIN = frozenset({408, 409, 425, 429})
NEVER_ANSWERS = {401: "is the key right", 403: "may this key use it", 404: "are base_url and model"}
"""Statuses that every question would get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a question: its text, or why there is none.

    Token counts are None where the server gave no usage.
    """

    text: str | None
    failure: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    num_retries: int = 0
    cached: bool = False


class _Refusal(NamedTuple):
    """A try without an answer."""

    reason: str
    retry: bool
    wait_seconds: float = 0.0
    """What the server asks to wait, at least."""


class ChatEndpoint:
    """An endpoint with its settings, its key and its answers so far."""

    def __init__(
        self, config: EndpointConfig, *, pause: Callable[[float], object] | None = None
    ) -> None:
        """Read the key; nothing is sent.

        Args:
            pause: waits that many seconds between two tries; by default until then or until the
                questions are given up.

        Raises:
            InputError: the key's variable is not set, or holds no key.
        """
        self.config = config
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._key = _read_key(config.key_variable)
        self._folder = cache_folder() / "judge"
        self._opener = _opener(self._url)
        self._given_up = threading.Event()
        self._pause = pause or self._given_up.wait

    def ask_all(
        self, questions: Sequence[str], progress: Callable[[int], None] = lambda done: None
    ) -> list[Answer]:
        """The answers, in the order of the questions; several are asked at a time.

        Raises:
            InputError: the endpoint refuses every question, or does not answer any more.
            StorageError: an answer cannot be written.
        """
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        answers: list[Answer] = []
        failures = 0
        self._given_up.clear()
        pool = ThreadPoolExecutor(self.config.parallel)
        try:
            for answer in pool.map(self._ask, questions):
                answers.append(answer)
                progress(1)
                failures = failures + 1 if answer.text is None else 0
                if failures == MAX_FAILURES_IN_A_ROW:
                    raise InputError(
                        f"endpoint: {failures} questions in a row had no answer from {self._url}; "
                        f"the last: {answer.failure}. What was answered is kept: the same command "
                        "goes on from there."
                    )
        finally:
            self._given_up.set()
            pool.shutdown(cancel_futures=True)
        return answers

    def _ask(self, question: str) -> Answer:
        """The answer to one question: the one on disk, or a new one, which is written there.

        Raises:
            InputError: the endpoint would refuse every question (wrong key, address or model).
        """
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
        }
        request = {"url": self._url, "body": body}
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        file = self._folder / f"{digest}.json"
        found = _read(file)
        if found is not None:
            return found
        if self._given_up.is_set():
            return Answer(text=None, failure="given up")
        answer = self._ask_until_answered(json.dumps(body).encode("ascii"))
        if answer.text is not None:
            write_text(file, json.dumps({**request, "answer": asdict(answer)}, indent=1) + "\n")
        return answer

    def _ask_until_answered(self, body: bytes) -> Answer:
        wait, retries = FIRST_WAIT_SECONDS, 0
        while True:
            outcome = self._try(body)
            if isinstance(outcome, Answer):
                return replace(outcome, num_retries=retries)
            seconds = max(wait, outcome.wait_seconds)
            last = retries + 1 == self.config.max_attempts or seconds > LONGEST_WAIT_SECONDS
            if not outcome.retry or last or self._given_up.is_set():
                return Answer(text=None, failure=outcome.reason, num_retries=retries)
            self._pause(seconds)
            wait, retries = min(2 * wait, LONGEST_WAIT_SECONDS), retries + 1

    def _try(self, body: bytes) -> Answer | _Refusal:
        """One request."""
        try:
            status, retry_after, content = self._post(body)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                reason = f"no answer within {self.config.timeout_seconds:g} seconds"
            return _Refusal(self._without_key(str(reason) or type(error).__name__), retry=True)
        if status == 200:
            return self._answer_in(content)
        said = self._without_key(_message_in(content))[:200]  # cut after, or a part would show
        reason = f"status {status} ({said})" if said else f"status {status}"
        if status in NEVER_ANSWERS:
            self._given_up.set()  # here, so that no other thread begins another question
            raise InputError(f"endpoint: {self._url} gives {reason}; {NEVER_ANSWERS[status]}?")
        again = status in TRY_AGAIN or status >= 500
        return _Refusal(reason, retry=again, wait_seconds=_seconds(retry_after))

    def _post(self, body: bytes) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and content."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        try:
            response = self._opener.open(request, timeout=self.config.timeout_seconds)
        except urllib.error.HTTPError as error:  # any other status is an answer too
            response = error
        with response:
            content = response.read(MAX_ANSWER_BYTES)
            return response.status, response.headers.get("Retry-After"), content

    def _answer_in(self, content: bytes) -> Answer | _Refusal:
        try:
            reply = json.loads(content)
            text = reply["choices"][0]["message"]["content"]
            if text is not None and not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return _Refusal("an answer that is not a chat completion", retry=True)
        usage = reply.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        return Answer(
            text=self._without_key(text or ""),  # null: nothing was said, a refusal for example
            prompt_tokens=_count(counts.get("prompt_tokens")),
            completion_tokens=_count(counts.get("completion_tokens")),
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _read_key(variable: str | None) -> str:
    """The key in an environment variable; "" where none is named."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:  # the name is not repeated: it may be a key that was put in the wrong place
        raise InputError("endpoint.key_variable: there is no environment variable of that name.")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(
            "endpoint.key_variable: the variable holds no key: expected letters, digits and signs."
        )
    return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: followed, it would take the key to another place."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Through the environment's proxies, except to this machine."""
    proxies = urllib.request.ProxyHandler({} if is_loopback(url) else None)
    return urllib.request.build_opener(proxies, _NoRedirect)


def _read(file: Path) -> Answer | None:
    """An answer from before; None where there is none, or its file is damaged."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))["answer"]
        answer = Answer(**{**fields, "cached": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if isinstance(answer.text, str) else None


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for: a number of seconds, or a date."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _message_in(content: bytes) -> str:
    """The server's own words about an error, in one line."""
    text = content.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)
        error = found.get("error", found.get("detail", found))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
