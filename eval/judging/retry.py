"""What to do when a request gets no answer: try again, give this one up, or stop the whole run."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import openai

Action = Literal["retry", "refused", "give_up", "stop"]
"""retry: it may pass. refused: the API would not have this text judged. give_up: this request cannot work, others may.
stop: no request can work until somebody acts."""

QUOTA_CODES = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated"}
)
SETTING_CODES = frozenset(
    {"unsupported_parameter", "unsupported_value", "unknown_parameter", "model_not_found"}
)
SETTINGS = frozenset(
    {"temperature", "response_format", "reasoning_effort", "max_tokens", "max_completion_tokens", "model"}
)
FILTER_CODES = frozenset({"content_filter", "content_policy_violation", "cyber_policy_violation"})


@dataclass(frozen=True)
class RetryConfig:
    """How patient the judge's client is (section `retry`)."""

    timeout: float = 120.0
    """Seconds for one request."""
    max_attempts: int = 8
    """The most requests for one question; then it has failed."""
    max_elapsed: float = 600.0
    """Seconds after which a question is not tried again, waiting included."""
    base_delay: float = 1.0
    """Seconds: before attempt k a random time up to base_delay * 2^(k-1) passes, unless the API names one."""
    max_delay: float = 60.0
    """Seconds that the random wait never exceeds."""
    max_failures_in_a_row: int = 10
    """The run stops when so many questions in a row got no answer."""

    def __post_init__(self) -> None:
        for name in ("timeout", "max_attempts", "max_elapsed", "max_failures_in_a_row"):
            if not getattr(self, name) > 0:
                raise ValueError(f"retry.{name} must be positive, got {getattr(self, name)}")
        for name in ("base_delay", "max_delay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"retry.{name} must be >= 0, got {getattr(self, name)}")


class NotAnAnswer(Exception):
    """The server said 200, but with something that is no chat completion: a page of a proxy, say."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request got no answer and what follows."""

    action: Action
    detail: str
    retry_after: float | None = None
    "Seconds that the API wants us to wait."
    may_be_paid: bool = False
    "The request reached the API and nobody knows whether it was worked on."
    param: str | None = None
    "The setting that the API complained about."


def classify(error: Exception) -> Failure:
    """What follows from an error of the client. Re-raises what is not an error of a request."""
    match error:
        case openai.APIStatusError():
            body = error.body if isinstance(error.body, Mapping) else {}
            return classify_status(
                error.status_code, {"message": error.message, **body}, error.response.headers
            )
        case openai.APITimeoutError() | openai.APIConnectionError():
            sent = type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")
            what = "no answer in time" if isinstance(error, openai.APITimeoutError) else "connection failed"
            return Failure("retry", f"{what}: {error.__cause__ or error}", may_be_paid=sent)
        case asyncio.TimeoutError():
            return Failure("retry", "no answer in time", may_be_paid=True)
        case NotAnAnswer() | json.JSONDecodeError():
            return Failure("retry", f"the answer is not that of the API: {error}", may_be_paid=True)
    raise error


def classify_status(status: int, error: Mapping[str, Any], headers: Mapping[str, str]) -> Failure:
    """What follows from an HTTP status, the `error` object of the body and the headers."""
    code, param = str(error.get("code") or ""), error.get("param")
    detail = f"HTTP {status}{f' {code}' if code else ''}: {_shorten(str(error.get('message', '')))}"
    if code in QUOTA_CODES:
        return Failure("stop", f"the account's quota is used up ({detail})")
    if code in FILTER_CODES:
        return Failure("refused", detail)
    if status == 401:
        return Failure("stop", f"the API key is not accepted ({detail})")
    if status == 403:
        return Failure("stop", f"the API key may not do this ({detail})")
    if status == 404:
        return Failure("stop", f"there is no such model or address ({detail})")
    if code in SETTING_CODES or param in SETTINGS:
        return Failure("stop", f"the model does not take a setting of the recipe ({detail})", param=param)
    if status in (408, 409, 429) or status >= 500:
        unknown = status in (408, 502, 504) or status >= 520  # said by something in front of the API
        return Failure("retry", detail, parse_retry_after(headers), may_be_paid=unknown)
    return Failure("give_up", detail)


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by retry-after-ms or Retry-After (a number, or a date); None if neither can be read."""
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def delay_before_retry(
    config: RetryConfig, attempt: int, retry_after: float | None, rng: random.Random
) -> float:
    """Seconds before the next attempt, after `attempt` of them.

        retry_after + U(0, base)                       when the API names a time
        U(0, min(max_delay, base * 2^(attempt - 1)))   otherwise ("full jitter", Brooker 2015)

    The random part keeps workers that failed together from coming back together.
    """
    if retry_after is not None:
        return retry_after + rng.uniform(0, config.base_delay)
    return rng.uniform(0, min(config.max_delay, config.base_delay * 2.0 ** min(attempt - 1, 60)))


def _shorten(text: str, length: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
