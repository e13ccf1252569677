"""The HTTP server of the label page: three files, and an API of three calls on a LabelQueue.

It listens on the loopback interface by default, answers only requests with its own name as host (against DNS
rebinding), and accepts calls only with a token that is in the page and drawn anew at each start. Responses are model
output: they are sent as JSON, and the page shows them as text.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from eval.labelling.label_queue import LabelQueue, LabelRefused

PAGE = Path(__file__).resolve().parent / "label_page"
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
TOKEN_PLACE = "{{token}}"
TOKEN_HEADER = "X-Label-Token"
MAX_BODY = 4096
MAX_DRAINED = 1 << 20
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class LabelServer(ThreadingHTTPServer):
    """Serves a LabelQueue on `host` and `port` (0: a free one); `url` is the address of the page."""

    daemon_threads = True

    def __init__(self, queue: LabelQueue, host: str = "127.0.0.1", port: int = 0) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.queue = queue
        self.token = secrets.token_urlsafe(32)
        self.host_names = {host.casefold()} | (
            {"localhost", "127.0.0.1", "::1"} if is_loopback(host) else set()
        )
        super().__init__((host, port), _Handler)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def is_loopback(host: str) -> bool:
    """Return whether the address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class _Refused(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60.0
    server_version = "drpo"
    sys_version = ""
    server: LabelServer

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self) -> tuple[bytes, str]:
        address = self._address()
        if address.path in FILES:
            name, kind = FILES[address.path]
            text = (PAGE / name).read_text(encoding="utf-8")
            return text.replace(TOKEN_PLACE, self.server.token).encode(), kind
        if address.path == "/api/state":
            self._check_token()
            names = parse_qs(address.query, keep_blank_values=True).get("annotator", [])
            return _as_json(self.server.queue.state(names[0] if len(names) == 1 else ""))
        raise _not_here(address.path, ("/api/label", "/api/undo"), "POST")

    def _post(self) -> tuple[bytes, str]:
        body = self._body()
        path = self._address().path
        if path not in ("/api/label", "/api/undo"):
            raise _not_here(path, (*FILES, "/api/state"), "GET")
        self._check_token()
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "the body must be application/json")
        fields = {"annotator", "pair"} | ({"choice", "seconds"} if path == "/api/label" else set())
        values = _json_object(body, fields)
        queue = self.server.queue
        if path == "/api/undo":
            return _as_json(queue.undo(values["annotator"], values["pair"]))
        return _as_json(
            queue.choose(values["annotator"], values["pair"], values["choice"], values["seconds"])
        )

    def _address(self) -> SplitResult:
        try:
            return urlsplit(self.path)
        except ValueError as error:
            raise _Refused(400, f"the address cannot be read: {error}") from None

    def _answer(self, respond: Callable[[], tuple[bytes, str]]) -> None:
        try:
            self._check_host()
            content, kind = respond()
        except (_Refused, LabelRefused) as error:
            self._refuse(error.code, str(error))
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            reason = error.strerror or error
            self._refuse(500, f"the label could not be written, so nothing was stored: {reason}")
        else:
            self._send(200, content, kind)

    def _check_host(self) -> None:
        """Refuse other host names, against DNS rebinding: a page of another site would send that site's name."""
        hosts = self.headers.get_all("Host") or [""]
        try:
            name = urlsplit(f"//{hosts[0]}").hostname or ""
        except ValueError:
            name = ""
        if len(hosts) != 1 or name.casefold() not in self.server.host_names:
            self.close_connection = True  # a body, if any, is not read
            raise _Refused(403, f"this server is not {name or 'without a name'}; open {self.server.url}")

    def _check_token(self) -> None:
        given = self.headers.get(TOKEN_HEADER, "")
        if not secrets.compare_digest(given.encode(), self.server.token.encode()):
            raise _Refused(403, "this page is of an earlier start of the server: load it again")

    def _body(self) -> bytes:
        """Read the whole body, so that the connection can be reused. Raises _Refused and closes it on failure."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            self.close_connection = True
            raise _Refused(411, "the request must give its Content-Length")
        if len(length) > 18 or int(length) > MAX_BODY:
            self.close_connection = True
            self.rfile.read(
                min(int(length[:18]), MAX_DRAINED)
            )  # clients read the answer only after sending everything
            raise _Refused(413, f"the body must not exceed {MAX_BODY} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            raise _Refused(400, "the body is shorter than its Content-Length")
        return body

    def _send(self, code: int, content: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, POST")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, code: int, message: str) -> None:
        self._send(code, *_as_json({"error": message}))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer requests that the base class rejects with JSON, and close the connection, as more may follow."""
        self.close_connection = True
        self.request_version = self.protocol_version  # else a request without a version gets no status line
        if code == HTTPStatus.NOT_IMPLEMENTED:  # an unknown method is the client's error
            code, message = HTTPStatus.METHOD_NOT_ALLOWED, f"no method {self.command} here"
        self._refuse(code, message or HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal shows the address and the progress."""


def _as_json(values: dict[str, Any]) -> tuple[bytes, str]:
    return json.dumps(values).encode(), "application/json; charset=utf-8"


def _json_object(body: bytes, fields: set[str]) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refused(400, "the body is not JSON") from None
    if not isinstance(values, dict) or values.keys() != fields:
        raise _Refused(400, f"the body must be an object with {', '.join(sorted(fields))} and nothing else")
    return values


def _not_here(path: str, elsewhere: tuple[str, ...], method: str) -> _Refused:
    if path in elsewhere:
        return _Refused(405, f"{path} takes {method}")
    return _Refused(404, "there is nothing here")
