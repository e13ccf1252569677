"""Requests to servers that a training run needs, and that may be away for a while."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from drpo.config import ConfigError

CONNECT_SECONDS = 10.0
"What a try may take to connect."
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"Seconds between two tries, doubled each time."
LEAST_SECONDS = 1.0
"What a try gets at least, where little time is left."
AWAY = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
BUSY = (429, 502, 503, 504)
"Status codes of a server, or a proxy before it, that may answer later."


class ServerClient:
    """HTTP connections to the servers that a setting names; requests are made again while one is away or busy."""

    def __init__(self, key: str, limit: str, num_servers: int, num_requests: int, token: str | None) -> None:
        """Prepare the connections.

        Args:
            key: the setting that names the servers, with which errors begin.
            limit: the setting that bounds the wait and its value, for errors.
            num_servers: how many servers are asked.
            num_requests: requests to each that are under way at a time.
            token: bearer token; None for none.
        """
        self.key, self._limit = key, limit
        self._session = requests.Session()
        self._session.trust_env = False  # servers are near: no proxy, and no password of ~/.netrc
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE", True)
        self._session.headers["Content-Type"] = "application/json"
        if token is not None:
            self._session.headers["Authorization"] = f"Bearer {token}"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(num_servers, num_requests))
        self._stopped = threading.Event()
        self._draw = random.Random()  # its own, as the run's random numbers are reproducible

    def close(self) -> None:
        """Give up on requests that wait."""
        self._stopped.set()
        self._session.close()

    def request(
        self,
        method: str,
        url: str,
        path: str,
        content: bytes | None = None,
        *,
        until: float | None,
        seconds: float | None = None,
    ) -> requests.Response:
        """Return the answer of a server, whatever its status. Raises ConfigError for none.

        Args:
            method: of HTTP.
            url: of the server.
            path: below it.
            content: JSON.
            until: the request is made again until this time of the monotonic clock; None: it is made once.
            seconds: the longest pause of one try without a byte of its answer, which bounds all of the try where the
                answer comes in one piece; None: until then. To connect may take CONNECT_SECONDS besides.
        """
        pause, place = FIRST_PAUSE, f"{url} does not answer {path.partition('?')[0] or '/'}"
        while True:
            left = seconds if seconds is not None else max(until - time.monotonic(), LEAST_SECONDS)
            try:
                answer = self._session.request(
                    method, url + path, data=content, timeout=(CONNECT_SECONDS, left), allow_redirects=False
                )
            except AWAY as error:
                if until is None or isinstance(error, requests.exceptions.SSLError):
                    raise ConfigError(f"{self.key}: {place}: {error}") from None
                trouble = str(error)
            except OSError as error:  # such as a bundle of certificates that is not there
                raise ConfigError(f"{self.key}: {place}: {error}") from None
            else:
                if until is None or answer.status_code not in BUSY:
                    return answer
                trouble = f"it is busy ({answer.status_code}: {answer.text[:200]})"
            if pause == FIRST_PAUSE:
                logging.getLogger(__name__).warning("%s: %s: %s; waiting for it", self.key, place, trouble)
            if time.monotonic() + pause > until:
                raise ConfigError(
                    f"{self.key}: {place} (waited {self._limit}): {trouble}; start the server, and run the same "
                    "command again to go on from the last checkpoint"
                )
            # By chance, so that those who were refused together do not come back together.
            if self._stopped.wait(pause * self._draw.uniform(0.5, 1)):
                raise ConfigError(f"{self.key}: another request has failed")
            pause = min(2 * pause, LONGEST_PAUSE)

    def values(self, answer: requests.Response, place: str, advice: Callable[[int], str]) -> Any:
        """Return the JSON values of an answer, None of an empty one. Raises ConfigError for an error.

        Args:
            answer: of a server.
            place: its address, as errors name it.
            advice: gives the end of the message for a status.
        """
        if answer.status_code != requests.codes.ok:
            raise ConfigError(
                f"{self.key}: {place} answers {answer.status_code}: {answer.text[:500]}{advice(answer.status_code)}"
            )
        try:
            return answer.json() if answer.content else None
        except requests.exceptions.JSONDecodeError:
            raise ConfigError(
                f"{self.key}: {place} answers with something else than JSON: {answer.text[:200]!r}"
            ) from None
