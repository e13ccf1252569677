"""Requests to a reward server that may be away for a while."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from drpo.config import ConfigError
from drpo.daemon_threads import call_each
from drpo.servers import ServerClient

Call = tuple[str, str, Any]
"Method, path, and body as JSON values."


class Connection:
    """HTTP connections to a server; calls are made again while it is away or busy, until a limit."""

    def __init__(
        self,
        url: str,
        wait_minutes: float,
        request_seconds: float,
        num_requests: int,
        token: str | None,
        stop: threading.Event,
    ) -> None:
        """Prepare the connections.

        Args:
            url: http://host:port.
            wait_minutes: how long a call is made again.
            request_seconds: how long one try waits for the next part of its answer.
            num_requests: calls under way at a time.
            token: bearer token; None for none.
            stop: set when the process is to stop: `call_all` then waits no longer.
        """
        self.url = url.rstrip("/")
        self.max_bytes: int | None = None
        "Most bytes of a request; None where that is not known."
        self._wait_minutes, self._request_seconds = wait_minutes, request_seconds
        limit = f"reward.server.timeout_minutes={wait_minutes:g}"
        self._client = ServerClient("reward.url", limit, 1, num_requests, token)
        self._num_requests, self._stop = num_requests, stop

    def close(self) -> None:
        """Give up on calls that wait."""
        self._client.close()

    def call_all(self, calls: list[Call]) -> list[Any]:
        """Return the answers to several calls, in their order. The first that fails ends the others.

        They wait for a server that is away up to one limit, which begins here. Raises Interrupted when the process is
        to stop.
        """
        until = self._limit()
        try:
            return call_each(lambda call: self._call(*call, until), calls, self._num_requests, self._stop)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON of an answer; raise ConfigError for an error, or none in time."""
        return self._call(method, path, body, self._limit())

    def _limit(self) -> float:
        return time.monotonic() + 60 * self._wait_minutes

    def _call(self, method: str, path: str, body: Any, until: float) -> Any:
        content = None if body is None else json.dumps(body).encode()
        if content is not None and self.max_bytes is not None and len(content) > self.max_bytes:
            raise ConfigError(
                f"reward.url: a request has {len(content)} bytes, and {self.url} takes {self.max_bytes}: lower "
                "reward.batch_size, or start the server with a larger --max-megabytes"
            )
        times = {"until": until, "seconds": self._request_seconds}
        answer = self._client.request(method, self.url, path, content, **times)
        return self._client.values(answer, f"{self.url}{path}", _advice)


def _advice(status: int) -> str:
    match status:
        case 401 | 403:
            return " (set the token in the environment variable DRPO_REWARD_TOKEN)"
        case 404 | 405:
            return " (another kind of server: see reward.server.kind)"
    return ""
