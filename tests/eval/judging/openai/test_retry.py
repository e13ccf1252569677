"""The retry policy without a server: delays, Retry-After in all its forms, and what each error means."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from statistics import fmean

import pytest

from eval.judging.openai.retry import (
    ErrorInAnswer,
    Failure,
    NotAnAnswer,
    RetryConfig,
    classify,
    classify_status,
    delay_before_retry,
    parse_retry_after,
    retry_hint,
)

CONFIG = RetryConfig(base_delay=2.0, max_delay=10.0)


@pytest.mark.parametrize(("attempt", "longest"), [(1, 2.0), (2, 4.0), (3, 8.0), (4, 10.0), (500, 10.0)])
def test_full_jitter(attempt, longest):
    rng = random.Random(0)
    delays = [delay_before_retry(CONFIG, attempt, None, rng) for _ in range(4000)]
    assert 0 <= min(delays) < 0.01 * longest and 0.99 * longest < max(delays) <= longest
    assert fmean(delays) == pytest.approx(longest / 2, rel=0.04)  # 4 standard errors


def test_a_time_that_the_api_names_is_a_lower_bound():
    rng = random.Random(0)
    delays = [delay_before_retry(CONFIG, 5, 30.0, rng) for _ in range(1000)]
    assert 30.0 <= min(delays) and max(delays) <= 32.0 and max(delays) - min(delays) > 1.9


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "later"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert parse_retry_after(headers) == seconds


def test_retry_after_as_a_date():
    later = email.utils.formatdate(time.time() + 90, usegmt=True)
    earlier = email.utils.formatdate(time.time() - 90, usegmt=True)
    assert 80 < parse_retry_after({"retry-after": later}) <= 90
    assert parse_retry_after({"retry-after": earlier}) == 0.0


@pytest.mark.parametrize(
    ("status", "error", "action", "may_be_paid"),
    [
        (429, {"code": "rate_limit_exceeded"}, "retry", False),
        (429, {"code": "insufficient_quota"}, "stop", False),
        (408, {}, "retry", True),
        (409, {}, "retry", False),
        (500, {}, "retry", False),
        (504, {}, "retry", True),
        (401, {}, "stop", False),
        (403, {}, "give_up", False),
        (403, {"code": "unsupported_country_region_territory"}, "stop", False),
        (498, {"code": "capacity_exceeded"}, "retry", False),
        (404, {"code": "model_not_found"}, "stop", False),
        (400, {"code": "unsupported_value", "param": "temperature"}, "stop", False),
        (400, {"param": "response_format"}, "stop", False),
        (400, {"code": "context_length_exceeded", "param": "messages"}, "give_up", False),
        (400, {"code": "content_filter"}, "refused", False),
        (413, {}, "give_up", False),
        (422, {}, "give_up", False),
    ],
)
def test_what_follows_from_a_status(status, error, action, may_be_paid):
    failure = classify_status(status, {"message": "so it is", **error}, {})
    assert (failure.action, failure.may_be_paid) == (action, may_be_paid)
    assert f"HTTP {status}" in failure.detail and "so it is" in failure.detail
    assert failure.param == (error.get("param") if action == "stop" else None)


@pytest.mark.parametrize("status", [400, 409, 429, 500])
@pytest.mark.parametrize(("asked", "action"), [("true", "retry"), ("false", "give_up")])
def test_x_should_retry_overrides_the_status(status, asked, action):
    """As in OpenAI's client; the cause in the body has priority over both."""
    headers = {"x-should-retry": asked}
    assert classify_status(status, {"message": "hm"}, headers).action == action
    assert classify_status(status, {"code": "insufficient_quota"}, headers).action == "stop"


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("Rate limit reached on tokens per min. Please try again in 7m12.5s.", 432.5),
        ("Please try again in 120ms. Visit the page.", 0.12),
        ("have exceeded call rate limit of your tier. Please retry after 26 seconds.", 26.0),
        ("limit: 10. Please retry in 45.578569677s.", 45.578569677),
        ("try again later", None),
        ("please try again in a while", None),
        ("", None),
    ],
)
def test_delay_in_an_error_message_is_used(message, seconds):
    assert retry_hint(message) == seconds
    assert classify_status(429, {"message": message}, {}).retry_after == seconds
    assert classify_status(429, {"message": message}, {"retry-after": "3"}).retry_after == 3.0


def test_error_inside_a_200_is_classified_by_its_code():
    """OpenRouter: the model failed during generation, which may be charged."""

    def inside(error):
        return classify(ErrorInAnswer({"error": error}))

    assert inside({"code": 502, "message": "down"}) == Failure("retry", "HTTP 502: down", may_be_paid=True)
    assert inside("overloaded").action == "retry" and inside({"code": "x"}).may_be_paid
    assert inside({"code": 402, "message": "Insufficient credits"}).action == "stop"
    assert inside({"code": 403, "message": "flagged"}).action == "refused"
    assert inside({"message": "Insufficient Balance"}).cause == "money"


def test_what_is_no_error_of_a_request_is_not_swallowed():
    with pytest.raises(KeyError):
        classify(KeyError("a bug"))
    assert classify(NotAnAnswer("<html>")).action == "retry"
    assert classify(json.JSONDecodeError("no", "", 0)).action == "retry"
    assert classify(asyncio.TimeoutError()).may_be_paid


@pytest.mark.parametrize("name", ["timeout", "max_attempts", "max_elapsed", "max_failures_in_a_row"])
def test_patience_must_be_positive(name):
    with pytest.raises(ValueError, match=f"^{name} must be >"):
        RetryConfig(**{name: 0})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("120ms", 0.12),
        ("1h2m3.5s", 3723.5),
        ("7.66s", 7.66),
        ("20 secs", 20),
        ("", None),
        ("5", None),
    ],
)
def test_durations_of_the_api(text, seconds):
    assert retry_hint(f"Try again in {text}") == (None if seconds is None else pytest.approx(seconds))
