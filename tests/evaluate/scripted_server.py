"""An HTTP server on this machine that answers as a test wants, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    number: int
    """Requests before this one."""

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass(frozen=True)
class Reply:
    """What is sent back, after a delay."""

    content: str | bytes = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0


def completion(text: str | None, usage: dict[str, int] | None = None) -> Reply:
    """A chat completion as the protocol has it."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "choices": [choice]}
    return Reply(json.dumps(body | ({"usage": usage} if usage is not None else {})))


class Scripted:
    """A running server."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.asked: list[Asked] = []
        self.base_url = f"http://127.0.0.1:{server.server_port}/v1"

    @property
    def questions(self) -> list[str]:
        return [asked.question for asked in self.asked]


@contextmanager
def serving(answer: Callable[[Asked], Reply]) -> Iterator[Scripted]:
    """Serve until the block ends; `answer` is called once for each request."""
    over, lock = threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked = Asked(self.path, dict(self.headers), body, len(scripted.asked))
                scripted.asked.append(asked)
            reply = answer(asked)
            over.wait(reply.delay_seconds)
            content = reply.content
            content = content.encode() if isinstance(content, str) else content
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # it did not wait for the answer

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scripted = Scripted(server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield scripted
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
