"""The pace of a run, shared by all workers: concurrent requests, and requests per minute."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar

from drpo.config import Section, setting

WINDOW = 60.0
"Seconds in which the limit holds."


@dataclass(frozen=True)
class LimitsConfig(Section):
    """Limits on the pace of requests (section `limits`)."""

    concurrency: int = setting(8, ge=1)
    """Requests under way at once."""
    requests_per_minute: int | None = setting(None, ge=1)
    """The most requests that this run starts in any 60 seconds; null for no limit."""

    RETIRED: ClassVar[dict[str, str]] = {
        "tokens_per_minute": "is the API's limit to keep: all workers wait as its errors ask (Retry-After); to stay "
        "below it from the start, lower concurrency or requests_per_minute",
    }


class RateLimiter:
    """Admits requests in order of arrival so that no window of 60 seconds exceeds the limit."""

    def __init__(
        self,
        requests_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._admitted: deque[float] = deque(maxlen=requests_per_minute or 0)
        "Times of the last requests, as many as a window admits; empty without a limit."
        self._not_before = 0.0
        self._turn = asyncio.Lock()

    async def wait(self) -> None:
        """Return when a request may start."""
        async with self._turn:
            while (delay := self._delay()) > 1e-6:
                await self._sleep(delay)
            self._admitted.append(self._clock())

    def pause(self, seconds: float) -> None:
        """Start no request for this many seconds, as an answer's Retry-After asks."""
        self._not_before = max(self._not_before, self._clock() + seconds)

    def _delay(self) -> float:
        """Return the seconds until a request may start; <= 0 for now."""
        start = self._not_before
        if self._admitted and len(self._admitted) == self._admitted.maxlen:
            start = max(start, self._admitted[0] + WINDOW)
        return start - self._clock()
