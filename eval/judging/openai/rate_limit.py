"""How fast the judge is asked: requests at once, and requests and tokens in any minute, shared by all workers."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from drpo.config import Section, setting

WINDOW = 60.0
"Seconds in which the limits hold."
_DURATION = re.compile(
    r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?"
)


@dataclass(frozen=True)
class LimitsConfig(Section):
    """How fast the judge is asked (section `limits`)."""

    concurrency: int = setting(8, ge=1)
    """Requests under way at once."""
    requests_per_minute: int | None = setting(None, ge=1)
    """The most requests started in any 60 seconds; null for no limit of ours. The API's own headers are heeded too."""
    tokens_per_minute: int | None = setting(None, ge=1)
    """The most tokens in any 60 seconds, prompt and answer together; a request counts with its longest possible answer
    until it is answered."""


class Start:
    """A request that was let through, with the tokens that it counts for."""

    __slots__ = ("time", "tokens")

    def __init__(self, time: float, tokens: float) -> None:
        self.time, self.tokens = time, tokens


class RateLimiter:
    """Lets requests through so that no window of 60 seconds has more than the limits, first come first served.

    `earlier` are (seconds ago, tokens) of requests that earlier runs started, oldest first: they count, too.
    """

    def __init__(
        self,
        config: LimitsConfig,
        earlier: Iterable[tuple[float, float]] = (),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._config, self._clock, self._sleep = config, clock, sleep
        self._starts = deque(Start(clock() - age, tokens) for age, tokens in earlier)
        self._not_before = 0.0
        self._turn = asyncio.Lock()

    async def wait(self, tokens: float) -> Start:
        """Return when a request of about `tokens` tokens may start.

        One that is larger than the limit alone starts when nothing else is in the window.
        """
        async with self._turn:
            while (delay := self._delay(tokens)) > 1e-6:
                await self._sleep(delay)
            start = Start(self._clock(), tokens)
            self._starts.append(start)
            return start

    def correct(self, start: Start, tokens: float) -> None:
        """A request turned out to have so many tokens."""
        start.tokens = tokens

    def pause(self, seconds: float) -> None:
        """Nothing starts for so many seconds: the API asked for it."""
        self._not_before = max(self._not_before, self._clock() + seconds)

    def observe(self, headers: Mapping[str, str]) -> None:
        """Pause until the reset that an answer's x-ratelimit headers name, if they say that nothing is left."""
        for kind in ("requests", "tokens"):
            remaining = headers.get(f"x-ratelimit-remaining-{kind}")
            reset = parse_duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
            if remaining is not None and remaining.strip() == "0" and reset is not None:
                self.pause(min(reset, WINDOW))

    def _delay(self, tokens: float) -> float:
        now = self._clock()
        while self._starts and self._starts[0].time <= now - WINDOW:
            self._starts.popleft()
        delays = [self._not_before - now]
        requests, most = self._config.requests_per_minute, self._config.tokens_per_minute
        if requests is not None and len(self._starts) >= requests:
            delays.append(self._starts[0].time + WINDOW - now)
        if most is not None:
            total = tokens + sum(start.tokens for start in self._starts)
            for start in self._starts:
                if total <= most:
                    break
                delays.append(start.time + WINDOW - now)
                total -= start.tokens
        return max(delays)


def parse_duration(text: str) -> float | None:
    """Seconds of a duration as the API writes it ("1m30s", "120ms", "2s"); None for anything else."""
    match = _DURATION.fullmatch(text.strip())
    if not match or not any(match.groups()):
        return None
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
