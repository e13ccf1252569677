"""The pace, on a clock of our own: no window of a minute ever holds more than the limits."""

from __future__ import annotations

import asyncio
import random

import pytest

from eval.judging.openai.rate_limit import LimitsConfig, RateLimiter, parse_duration


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def starts_of(tokens: list[float], **limits) -> list[tuple[float, float]]:
    """(start, tokens) of requests that are all there at once."""
    clock = Clock()
    limiter = RateLimiter(LimitsConfig(**limits), clock=clock, sleep=clock.sleep)

    async def all_of_them():
        return [(await limiter.wait(size)).time for size in tokens]

    return list(zip(asyncio.run(all_of_them()), tokens, strict=True))


def windows(starts: list[tuple[float, float]]) -> list[list[float]]:
    """Tokens of the requests in each minute that begins with one."""
    return [[size for time, size in starts if begin <= time < begin + 59.999] for begin, _ in starts]


def test_requests_per_minute():
    starts = starts_of([1.0] * 50, requests_per_minute=7)
    assert max(map(len, windows(starts))) == 7
    assert [time - 1000 for time, _ in starts] == pytest.approx([60.0 * (i // 7) for i in range(50)])


@pytest.mark.parametrize("seed", range(10))
def test_tokens_per_minute(seed):
    rng = random.Random(seed)
    starts = starts_of([rng.uniform(1, 400) for _ in range(200)], tokens_per_minute=1000)
    assert max(map(sum, windows(starts))) <= 1000
    total, minutes = sum(size for _, size in starts), (starts[-1][0] - 1000) / 60
    assert total / minutes > 500, "it is not much slower than it must be"


def test_both_limits_hold_together():
    rng = random.Random(0)
    starts = starts_of(
        [rng.uniform(1, 400) for _ in range(200)], requests_per_minute=6, tokens_per_minute=1000
    )
    held = windows(starts)
    assert max(map(len, held)) <= 6 and max(map(sum, held)) <= 1000


def test_a_request_larger_than_the_limit_goes_alone():
    starts = starts_of([10.0, 5000.0, 10.0], tokens_per_minute=1000)
    assert [time - 1000 for time, _ in starts] == pytest.approx([0, 60, 120])


def test_a_request_waits_for_the_oldest_ones_only():
    clock = Clock()
    limiter = RateLimiter(LimitsConfig(tokens_per_minute=1000), clock=clock, sleep=clock.sleep)

    async def in_turn():
        starts = []
        for size, pause in ((600, 30), (300, 10), (200, 0), (500, 0)):
            starts.append((await limiter.wait(size)).time - 1000)
            clock.now += pause
        return starts

    # the third needs the first to leave, at 60; the fourth fits beside the second and third
    assert asyncio.run(in_turn()) == pytest.approx([0.0, 30.0, 60.0, 60.0])


def test_an_answer_shorter_than_feared_makes_room():
    clock = Clock()
    limiter = RateLimiter(LimitsConfig(tokens_per_minute=1000), clock=clock, sleep=clock.sleep)

    async def two():
        first = await limiter.wait(900)
        limiter.correct(first, 100)
        return (await limiter.wait(900)).time

    assert asyncio.run(two()) == 1000.0


def test_requests_of_an_earlier_run_count():
    """Two of three places are taken until 60 seconds after they were; 700 of 1000 tokens until then."""
    clock = Clock()
    limits = LimitsConfig(requests_per_minute=3, tokens_per_minute=1000)
    limiter = RateLimiter(limits, [(50.0, 700.0), (20.0, 0.0)], clock=clock, sleep=clock.sleep)

    async def in_turn():
        return [(await limiter.wait(size)).time - 1000 for size in (200, 200, 200)]

    assert asyncio.run(in_turn()) == pytest.approx([0.0, 10.0, 40.0])


def test_without_limits_nothing_waits():
    assert {time for time, _ in starts_of([1e9] * 20)} == {1000.0}


def after(limiter_does) -> float:
    """Seconds that the next request waits after something happened to the limiter."""
    clock = Clock()
    limiter = RateLimiter(LimitsConfig(), clock=clock, sleep=clock.sleep)
    limiter_does(limiter)
    return asyncio.run(limiter.wait(1.0)).time - 1000


def test_a_pause_holds_everybody_and_a_shorter_one_does_not_end_it():
    assert after(lambda limiter: (limiter.pause(5.0), limiter.pause(2.0))) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "12s"}, 12.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m30s"}, 60.0),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "12s"}, 0.0),
        ({"x-ratelimit-remaining-requests": "0"}, 0.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_headers_that_say_nothing_is_left_pause(headers, pause):
    assert after(lambda limiter: limiter.observe(headers)) == pytest.approx(pause)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("120ms", 0.12),
        ("1h2m3.5s", 3723.5),
        ("7.66s", 7.66),
        ("", None),
        ("5", None),
    ],
)
def test_durations_of_the_api(text, seconds):
    assert parse_duration(text) == (None if seconds is None else pytest.approx(seconds))


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="^concurrency must be >= 1"):
        LimitsConfig(concurrency=0)
    with pytest.raises(ValueError, match="^tokens_per_minute must be >= 1 or null"):
        LimitsConfig(tokens_per_minute=0)
