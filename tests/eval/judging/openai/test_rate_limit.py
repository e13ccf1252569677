"""The pace, on a clock of our own: no window of a minute ever holds more than the limit."""

from __future__ import annotations

import asyncio

import pytest

from drpo.config import ConfigError, make_section
from eval.judging.openai.rate_limit import LimitsConfig, RateLimiter


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def starts_of(num_requests: int, requests_per_minute: int | None, gaps: float = 0.0) -> list[float]:
    """Seconds at which requests start that arrive together, or `gaps` after the start of the one before."""
    clock = Clock()
    limiter = RateLimiter(requests_per_minute, clock=clock, sleep=clock.sleep)

    async def in_turn():
        starts = []
        for _ in range(num_requests):
            await limiter.wait()
            starts.append(clock.now - 1000)
            clock.now += gaps
        return starts

    return asyncio.run(in_turn())


def test_requests_per_minute():
    assert starts_of(50, 7) == pytest.approx([60.0 * (i // 7) for i in range(50)])


def test_a_request_waits_for_the_oldest_one_only():
    # two a minute, 25 seconds apart: the third waits for the first to leave, at 60, the fourth for the second, at 85
    assert starts_of(5, 2, gaps=25.0) == pytest.approx([0.0, 25.0, 60.0, 85.0, 120.0])


def test_no_window_of_a_minute_exceeds_the_limit():
    starts = starts_of(60, 6, gaps=3.7)
    assert max(sum(begin <= time < begin + 59.999 for time in starts) for begin in starts) == 6


def test_without_limits_nothing_waits():
    assert set(starts_of(20, None)) == {0.0}


def test_a_pause_holds_everybody_and_a_shorter_one_does_not_end_it():
    clock = Clock()
    limiter = RateLimiter(None, clock=clock, sleep=clock.sleep)
    limiter.pause(5.0)
    limiter.pause(2.0)
    asyncio.run(limiter.wait())
    assert clock.now - 1000 == pytest.approx(5.0)


@pytest.mark.parametrize(("name", "rule"), [("concurrency", ">= 1"), ("requests_per_minute", ">= 1 or null")])
def test_limits_must_be_positive(name, rule):
    with pytest.raises(ConfigError, match=f"^limits.{name} must be {rule}, got 0$"):
        make_section(LimitsConfig, {name: 0}, "limits.")


def test_the_retired_limit_on_tokens_names_what_replaces_it():
    with pytest.raises(ConfigError, match=r"^limits.tokens_per_minute is the API's .* requests_per_minute$"):
        make_section(LimitsConfig, {"tokens_per_minute": 1000}, "limits.")
