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
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from eval.labelling.label_queue import LabelQueue, RequestRefused

PAGE = Path(__file__).resolve().parent / "label_page"
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
METHODS = {**dict.fromkeys((*FILES, "/api/state"), "GET"), "/api/label": "POST", "/api/undo": "POST"}
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
    """HTTP server of a LabelQueue on `host` and `port` (0: a free one); `url` is the address of the page."""

    daemon_threads = True

    def __init__(self, queue: LabelQueue, host: str = "127.0.0.1", port: int = 0) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.queue = queue
        self.token = secrets.token_urlsafe(32)
        loopback_names = ("localhost", "127.0.0.1", "::1") if is_loopback(host) else ()
        self.host_names = {host.casefold(), *loopback_names}
        super().__init__((host, port), _Handler)
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}/"

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
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60.0
    server_version = "drpo"
    sys_version = ""
    server: LabelServer

    def do_GET(self) -> None:
        """Answer a request of either method."""
        try:
            self._check_host()
            content, kind = self._answer()
        except RequestRefused as error:
            self._refuse(error.code, str(error))
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            reason = error.strerror or error
            self._refuse(500, f"the label could not be written, so nothing was stored: {reason}")
        else:
            self._send(200, content, kind)

    do_POST = do_GET

    def _answer(self) -> tuple[bytes, str]:
        """Return the content of the answer and its type. Raises RequestRefused for an invalid request."""
        body = self._body() if self.command == "POST" else b""
        try:
            address = urlsplit(self.path)
        except ValueError as error:
            raise RequestRefused(400, f"the address cannot be read: {error}") from None
        path, queue = address.path, self.server.queue
        if path not in METHODS:
            raise RequestRefused(404, "there is nothing here")
        if self.command != METHODS[path]:
            raise RequestRefused(405, f"{path} takes {METHODS[path]}")
        if path in FILES:
            name, kind = FILES[path]
            text = (PAGE / name).read_text(encoding="utf-8")
            return text.replace(TOKEN_PLACE, self.server.token).encode(), kind
        token = self.headers.get(TOKEN_HEADER, "")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise RequestRefused(403, "this page is of an earlier start of the server: load it again")
        if path == "/api/state":
            names = parse_qs(address.query, keep_blank_values=True).get("annotator", [])
            return _as_json(queue.state(names[0] if len(names) == 1 else ""))
        if self.headers.get_content_type() != "application/json":
            raise RequestRefused(415, "the body must be application/json")
        if path == "/api/undo":
            return _as_json(queue.undo(*_values(body, ("annotator", "pair"))))
        return _as_json(queue.choose(*_values(body, ("annotator", "pair", "choice", "seconds"))))

    def _check_host(self) -> None:
        """Refuse other host names, against DNS rebinding: a page of another site would send that site's name."""
        hosts = self.headers.get_all("Host") or [""]
        try:
            name = urlsplit(f"//{hosts[0]}").hostname or ""
        except ValueError:
            name = ""
        if len(hosts) != 1 or name.casefold() not in self.server.host_names:
            self.close_connection = True  # a body, if any, is not read
            name = name or "without a name"
            raise RequestRefused(403, f"this server is not {name}; open {self.server.url}")

    def _body(self) -> bytes:
        """Read the whole body, so that the connection can be reused. Raises RequestRefused and closes it on failure."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            self.close_connection = True
            raise RequestRefused(411, "the request must give its Content-Length")
        if len(length) > 18 or int(length) > MAX_BODY:
            self.close_connection = True
            self.rfile.read(min(int(length[:18]), MAX_DRAINED))  # clients send everything before they read
            raise RequestRefused(413, f"the body must not exceed {MAX_BODY} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            raise RequestRefused(400, "the body is shorter than its Content-Length")
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


def _values(body: bytes, fields: Sequence[str]) -> list[Any]:
    """Return the values of `fields`, which must be those of the JSON object in the body."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestRefused(400, "the body is not JSON") from None
    if not isinstance(content, dict) or content.keys() != set(fields):
        names = ", ".join(sorted(fields))
        raise RequestRefused(400, f"the body must be an object with {names} and nothing else")
    return [content[name] for name in fields]
