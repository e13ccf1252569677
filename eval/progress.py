"""Progress of long tasks, reported at intervals."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], object]
"""A function that reports a line to the user, such as `print`."""
SECONDS = 15.0


class Progress:
    """A line every SECONDS and at the end: number done, rate, remaining time."""

    def __init__(self, total: int, done: int, noun: str, say: Say) -> None:
        self._total, self._done, self._new, self._noun, self._say = total, done, 0, noun, say
        self._started = self._shown = time.monotonic()

    def advance(self, count: int) -> None:
        """Count `count` more as done."""
        self._done, self._new = self._done + count, self._new + count
        now = time.monotonic()
        if now - self._shown < SECONDS and self._done < self._total:
            return
        self._shown, rate = now, self._new / max(now - self._started, 1e-9)
        remaining = (self._total - self._done) / rate
        self._say(f"{self._done} of {self._total} {self._noun}, {rate:.3g} a second, {remaining:.0f} s left")
