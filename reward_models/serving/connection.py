"""Requests to a reward server that may be away for a while."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from drpo.config import ConfigError

CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"Seconds between two tries, doubled each time."
AWAY = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
BUSY = (429, 502, 503, 504)
"Status codes of a server, or a proxy before it, that may answer later."
Call = tuple[str, str, Any]
"Method, path, and body as JSON values."


class Connection:
    """HTTP connections to a server; calls are made again while it is away or busy, until a limit."""

    def __init__(
        self, url: str, wait_minutes: float, request_seconds: float, num_requests: int, token: str | None
    ) -> None:
        """Prepare the connections.

        Args:
            url: http://host:port.
            wait_minutes: how long a call is made again.
            request_seconds: how long one try may take.
            num_requests: calls under way at a time.
            token: bearer token; None for none.
        """
        self.url = url.rstrip("/")
        self.max_bytes: int | None = None
        "Most bytes of a request; None where that is not known."
        self._wait_minutes, self._timeout = wait_minutes, (CONNECT_SECONDS, request_seconds)
        self._session = requests.Session()
        self._session.trust_env = False  # the server is near: no proxy, and no password of ~/.netrc
        self._session.headers["Content-Type"] = "application/json"
        if token is not None:
            self._session.headers["Authorization"] = f"Bearer {token}"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=num_requests))
        self._pool = ThreadPoolExecutor(num_requests)
        self._stopped = threading.Event()
        self._draw = random.Random()  # its own, as the run's random numbers are reproducible

    def close(self) -> None:
        """Give up on calls that wait."""
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._session.close()

    def call_all(self, calls: list[Call]) -> list[Any]:
        """Return the answers to several calls, in their order. The first that fails ends the others."""
        futures = [self._pool.submit(self.call, *call) for call in calls]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in done if future.exception() is not None]
        if failed:
            self.close()
            failed[0].result()
        return [future.result() for future in futures]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON of an answer; raise ConfigError for an error, or none in time."""
        content = None if body is None else json.dumps(body).encode()
        if content is not None and self.max_bytes is not None and len(content) > self.max_bytes:
            raise ConfigError(
                f"reward.url: a request has {len(content)} bytes, and {self.url} takes {self.max_bytes}: lower "
                "reward.batch_size, or start the server with a larger --max-megabytes"
            )
        deadline, pause = time.monotonic() + 60 * self._wait_minutes, FIRST_PAUSE
        while True:
            trouble, answer = self._try(method, path, content)
            if not trouble:
                return self._json(answer, path)
            if pause == FIRST_PAUSE:
                logging.getLogger(__name__).warning("reward.url: %s, waiting for it", trouble)
            if time.monotonic() + pause > deadline:
                raise ConfigError(
                    f"reward.url: {trouble} (waited reward.server.timeout_minutes={self._wait_minutes:g}); start the "
                    "server, and run the same command again to go on from the last checkpoint"
                )
            # By chance, so that those who were refused together do not come back together.
            if self._stopped.wait(pause * self._draw.uniform(0.5, 1)):
                raise ConfigError("reward.url: another request has failed")
            pause = min(2 * pause, LONGEST_PAUSE)

    def _try(self, method: str, path: str, content: bytes | None) -> tuple[str, requests.Response | None]:
        """Return what keeps the server from answering now, or "" and its answer."""
        place = f"{self.url} does not answer {path or '/'}"
        try:
            answer = self._session.request(
                method, self.url + path, data=content, timeout=self._timeout, allow_redirects=False
            )
        except requests.exceptions.SSLError as error:
            raise ConfigError(f"reward.url: {place}: {error}") from None
        except AWAY as error:
            return f"{place}: {error}", None
        except requests.RequestException as error:
            raise ConfigError(f"reward.url: {place}: {error}") from None
        if answer.status_code in BUSY:
            return f"{place}, it is busy ({answer.status_code}: {answer.text[:200]})", None
        return "", answer

    def _json(self, answer: requests.Response, path: str) -> Any:
        if answer.status_code != requests.codes.ok:
            raise ConfigError(
                f"reward.url: {self.url}{path} answers {answer.status_code}: {answer.text[:500]}"
                + _advice(answer.status_code)
            )
        try:
            return answer.json()
        except requests.exceptions.JSONDecodeError:
            raise ConfigError(
                f"reward.url: {self.url}{path} answers with something else than JSON: {answer.text[:200]!r}"
            ) from None


def _advice(status: int) -> str:
    match status:
        case 401 | 403:
            return " (set the token in the environment variable DRPO_REWARD_TOKEN)"
        case 404 | 405:
            return " (another kind of server: see reward.server.kind)"
    return ""
