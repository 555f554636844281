"""The arena's web server: this machine only, one secret address, nothing from anywhere else.

What another page in the same browser could try is refused: it does not know the token in the
address; a name that it resolves to this machine is not the Host that is expected (DNS rebinding);
and what changes anything must say that it comes from our own page (Origin), as JSON.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from dpo.errors import DPOError, InputError, StorageError
from dpo.evaluate.arena.session import CHOICES, Session

HOST = "127.0.0.1"
MAX_BODY_BYTES = 1024
MAX_WAIT_SECONDS = 30

FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""What is asked for, the file of the package that answers, and its type. There is nothing else."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class ArenaServer(ThreadingHTTPServer):
    """Serves one session on this machine until it is closed."""

    daemon_threads = True

    def __init__(self, session: Session, *, port: int = 0) -> None:
        """Listen at the port; 0 is any that is free.

        Raises:
            InputError: the port cannot be had.
        """
        self.session = session
        self.token = secrets.token_urlsafe(16)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise InputError(
                f"--port {port}: cannot be had: {error.strerror}; leave it out to get a free one."
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error; anything else is, with its traceback."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def hosts(self) -> tuple[str, str]:
        """What a browser may call us; the second also through a tunnel of the same port."""
        return f"{HOST}:{self.server_port}", f"localhost:{self.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.hosts[0]}/{self.token}/"


class _Refused(Exception):
    """Answered with a status and a sentence."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: ArenaServer
    server_version, sys_version = "dpo", ""
    timeout = MAX_WAIT_SECONDS
    disable_nagle_algorithm = True  # head and body leave at once, without waiting 40 ms

    def do_GET(self) -> None:
        self._answer(self._read)

    def do_POST(self) -> None:
        self._answer(self._write)

    def _read(self) -> tuple[bytes, str]:
        """The page, a file of it, or the state."""
        name = self._asked_for()
        if name == "state":
            return _as_json(self.server.session.state())
        if name not in FILES:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here.")
        file, kind = FILES[name]
        return (files("dpo.evaluate.arena") / "page" / file).read_bytes(), kind

    def _write(self) -> tuple[bytes, str]:
        """The state after a verdict, or after one was taken back."""
        name = self._asked_for()
        body = self._body()
        if name == "judge":
            self.server.session.judge(*_judgement_of(body))
        elif name == "undo":
            self.server.session.undo()
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here.")
        return _as_json(self.server.session.state())

    def _answer(self, find: Callable[[], tuple[bytes, str]]) -> None:
        """Send what is found, or why there is nothing."""
        status, reason = HTTPStatus.OK, ""
        try:
            content, kind = find()
        except _Refused as refused:
            status, reason = refused.status, str(refused)
        except StorageError as error:
            status, reason = HTTPStatus.INSUFFICIENT_STORAGE, str(error)
        except DPOError as error:
            status, reason = HTTPStatus.CONFLICT, str(error)
        if status != HTTPStatus.OK:
            content, kind = _as_json({"error": reason})
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _asked_for(self) -> str:
        """What stands behind the token in the address."""
        if self.headers.get("Host") not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "this is not the host of the arena.")
        _, _, address = self.path.partition("/")
        token, _, name = address.partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "the address lacks the token; use it as printed.")
        return name

    def _body(self) -> Any:
        """The JSON that came with a request of our own page."""
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            raise _Refused(HTTPStatus.FORBIDDEN, "this did not come from the arena's page.")
        if self.headers.get("Content-Type") != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length.")
        if len(length) > 9 or int(length) > MAX_BODY_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "this is no judgement.")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, "expected JSON.") from error

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses hold the token."""


def _as_json(value: Mapping[str, Any]) -> tuple[bytes, str]:
    return json.dumps(value).encode(), "application/json"


def _judgement_of(body: Any) -> tuple[str, Any]:
    """Pair and choice."""
    match body:
        case {"pair": str(pair), "choice": str(choice)} if choice in CHOICES:
            return pair, choice
    raise _Refused(HTTPStatus.BAD_REQUEST, f"expected a pair and one of {', '.join(CHOICES)}.")
