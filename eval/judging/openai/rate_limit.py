"""The rate limits of a run, shared by all workers: concurrent requests, and requests and tokens per minute."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from drpo.config import Section, setting

WINDOW = 60.0
"Seconds in which the limits hold."


@dataclass(frozen=True)
class LimitsConfig(Section):
    """Limits on the pace of requests (section `limits`)."""

    concurrency: int = setting(8, ge=1)
    """Requests under way at once."""
    requests_per_minute: int | None = setting(None, ge=1)
    """The most requests that this run starts in any 60 seconds; null for no limit."""
    tokens_per_minute: int | None = setting(None, ge=1)
    """The most tokens of this run in any 60 seconds, prompt and answer together; a request counts with its longest
    possible answer until it is answered. null for no limit."""


@dataclass(slots=True)
class Admission:
    """A request admitted at `time`, with the tokens that it counts for."""

    time: float
    tokens: float


class RateLimiter:
    """Admits requests in order of arrival so that no window of 60 seconds exceeds the limits."""

    def __init__(
        self,
        config: LimitsConfig,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._config, self._clock, self._sleep = config, clock, sleep
        self._admitted: deque[Admission] = deque()
        self._not_before = 0.0
        self._turn = asyncio.Lock()

    async def wait(self, tokens: float) -> Admission:
        """Return when a request of about `tokens` tokens may start.

        A request that exceeds the limit by itself starts when nothing else is in the window.
        """
        async with self._turn:
            while (delay := self._delay(tokens)) > 1e-6:
                await self._sleep(delay)
            admission = Admission(self._clock(), tokens)
            self._admitted.append(admission)
            return admission

    def correct(self, admission: Admission, tokens: float) -> None:
        """Set the actual tokens of a request."""
        admission.tokens = tokens

    def pause(self, seconds: float) -> None:
        """Start no request for this many seconds, as an answer's Retry-After asks."""
        self._not_before = max(self._not_before, self._clock() + seconds)

    def _delay(self, tokens: float) -> float:
        """Return the seconds until a request may start; <= 0 for now."""
        now = self._clock()
        while self._admitted and self._admitted[0].time <= now - WINDOW:
            self._admitted.popleft()
        delays = [self._not_before - now]
        requests, max_tokens = self._config.requests_per_minute, self._config.tokens_per_minute
        if requests is not None and len(self._admitted) >= requests:
            delays.append(self._admitted[0].time + WINDOW - now)
        if max_tokens is not None:
            total = tokens + sum(admission.tokens for admission in self._admitted)
            for admission in self._admitted:
                if total <= max_tokens:
                    break
                delays.append(admission.time + WINDOW - now)
                total -= admission.tokens
        return max(delays)
