"""Policy for requests without an answer: retry, give this one up, or stop the whole run."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import openai

from drpo.config import Section, setting
from drpo.jsonl import encodable
from eval.judging.openai.answer import shorten
from eval.judging.openai.error_causes import Cause, cause_of, read_error

Action = Literal["retry", "refused", "give_up", "stop"]
"""retry: it may pass. refused: the API would not have this text judged. give_up: this request cannot work, others may.
stop: no request can work without user action."""

SETTING_CODES = frozenset("unsupported_parameter unsupported_value unknown_parameter model_not_found".split())
SETTINGS = frozenset(
    {"temperature", "response_format", "reasoning_effort", "max_tokens", "max_completion_tokens", "model"}
)
_UNITS = {"ms": 0.001, "h": 3600.0, "m": 60.0, "s": 1.0, " sec": 1.0}
_PART = rf"(\d+(?:\.\d+)?)({'|'.join(_UNITS)})"
_HINT = re.compile(rf"(?:try again|retry) (?:in|after) ((?:{_PART})+)")
_STOPPING_CAUSES: dict[Cause | None, str] = {
    "money": "the account's money or quota is used up",
    "place": "the API key may not do this with this account or from this location",
    "key": "the API key may not do this",
}
_STOPPING_STATUSES: dict[int | None, str] = {
    401: "the API key is not accepted",
    404: "there is no such model or address",
}


@dataclass(frozen=True)
class RetryConfig(Section):
    """How patient the judge's client is (section `retry`)."""

    timeout: float = setting(120.0, gt=0)
    """Seconds for one request."""
    max_attempts: int = setting(8, ge=1)
    """The most requests for one question; then it has failed."""
    max_elapsed: float = setting(600.0, gt=0)
    """Seconds after which a question is not tried again, waiting included."""
    base_delay: float = setting(1.0, ge=0)
    """Seconds: before attempt k a random time up to base_delay * 2^(k-1) passes, unless the API names one."""
    max_delay: float = setting(60.0, ge=0)
    """Seconds that the random wait never exceeds."""
    max_failures_in_a_row: int = setting(10, ge=1)
    """The run stops when so many questions in a row got no answer."""


class NotAnAnswer(Exception):
    """A body with status 200 that is no chat completion, such as the page of a proxy."""


class ErrorInAnswer(NotAnAnswer):
    """A body that contains an error, with status 200. `payload` is the body."""

    def __init__(self, payload: Any) -> None:
        super().__init__(json.dumps(payload)[:200])
        self.payload = payload


@dataclass(frozen=True, slots=True)
class Failure:
    """The cause of a missing answer, and the action."""

    action: Action
    detail: str
    retry_after: float | None = None
    "Seconds to wait before the next attempt, by the API."
    may_be_paid: bool = False
    "The request reached the API, and may have been processed."
    param: str | None = None
    "The setting that the API rejected."
    cause: Cause | None = None
    "Cause by the body, None if it contains none."
    unclear: bool = False
    "May concern the key or only this prompt: fatal only if the model has not answered before."


def classify(error: Exception) -> Failure:
    """Decide on an error of the client. Re-raises errors that are not about a request."""
    match error:
        case openai.APIStatusError():
            return classify_status(error.status_code, error.response.text, error.response.headers)
        case openai.APITimeoutError() | openai.APIConnectionError():
            sent = type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")
            timed_out = isinstance(error, openai.APITimeoutError)
            problem = "no answer in time" if timed_out else "connection failed"
            return Failure("retry", f"{problem}: {error.__cause__ or error}", may_be_paid=sent)
        case asyncio.TimeoutError():
            return Failure("retry", "no answer in time", may_be_paid=True)
        case ErrorInAnswer():
            return _classify_inside(error.payload)
        # The last three are of the client's parser.
        case NotAnAnswer() | json.JSONDecodeError() | UnicodeDecodeError() | RecursionError():
            return Failure("retry", f"the answer is not that of the API: {error}", may_be_paid=True)
    raise error


def classify_status(status: int | None, body: Any, headers: Mapping[str, str]) -> Failure:
    """Decide on an error by its body, then by the header x-should-retry, then by its status.

    `status` is None for an error inside a 200 that has no code of its own.
    """
    error = read_error(body)
    cause = cause_of(status, error)
    code = "" if error.code == str(status) else error.code
    message = shorten(error.message, 300) + (f" ({error.flagged})" if error.flagged else "")
    where = f"HTTP {status}" if status else "an error inside an answer"
    detail = encodable(f"{where}{f' {code}' if code else ''}: {message}")
    if cause == "text":
        return Failure("refused", detail, cause=cause)
    if reason := _STOPPING_CAUSES.get(cause) or _STOPPING_STATUSES.get(status):
        return Failure("stop", f"{reason} ({detail})", cause=cause)
    if SETTING_CODES.intersection(error.codes) or error.param in SETTINGS:
        reason = f"the model does not take a setting of the recipe ({detail})"
        return Failure("stop", reason, param=error.param)
    wait = parse_retry_after(headers)
    if wait is None:
        wait = retry_hint(error.message)
    # Gemini's delay ignores the daily quota.
    if cause == "day" and (wait is None or "resource_exhausted" in error.codes):
        return Failure("stop", f"the quota of the day is used up ({detail})", cause=cause)
    should_retry = headers.get("x-should-retry")
    passes = status is None or status in (402, 408, 409, 429, 498) or status >= 500
    if should_retry == "true" or (passes and should_retry != "false"):
        # sent by a proxy, or after generation has started
        unknown = status is None or status in (408, 502, 504) or status >= 520
        return Failure("retry", detail, wait, may_be_paid=unknown, cause=cause)
    return Failure("give_up", detail, cause=cause, unclear=status in (403, 451) and cause is None)


def _classify_inside(payload: Mapping[str, Any]) -> Failure:
    """Classify an error sent with status 200 by the code in its body (OpenRouter)."""
    inner = payload.get("error")
    code = inner.get("code") if isinstance(inner, Mapping) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else None
    failure = classify_status(status, payload, {})
    return replace(failure, may_be_paid=failure.action in ("retry", "refused"))  # generation may have started


def unclear_text(failure: Failure) -> str:
    """Format the reason for stopping at an unclear refusal before any answer."""
    return (
        f"the API refuses requests without saying whether because of the key, the place or the text "
        f"({failure.detail}), and the model has answered nothing so far: check the key's permissions"
    )


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait by retry-after-ms or Retry-After (number or date); None without either."""
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        date = email.utils.parsedate_tz(headers.get("retry-after", ""))
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
    except (ValueError, OverflowError):  # the 99th of January
        return None


def retry_hint(message: str) -> float | None:
    """Return the seconds that an error message asks to wait ("try again in 7m12s"), None if it names none."""
    hint = _HINT.search(message.lower())
    return None if hint is None else sum(float(n) * _UNITS[unit] for n, unit in re.findall(_PART, hint[1]))


def delay_before_retry(
    config: RetryConfig, attempt: int, retry_after: float | None, rng: random.Random
) -> float:
    """Draw the seconds before the next attempt, after `attempt` of them.

        retry_after + U(0, base)                       when the API names a time
        U(0, min(max_delay, base * 2^(attempt - 1)))   otherwise ("full jitter", Brooker 2015)

    The random part spreads out workers that failed together.
    """
    if retry_after is not None:
        return retry_after + rng.uniform(0, config.base_delay)
    return rng.uniform(0, min(config.max_delay, config.base_delay * 2.0 ** min(attempt - 1, 60)))
