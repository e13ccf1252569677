"""Classify API errors by cause: billing, daily quota, content filter, length, location, permission.

OpenAI-compatible servers agree neither on status nor on code: exhausted credit is reported as 400, 402, 403, 412 or
429, and 403 can mean the key, the country or one flagged prompt. The table below decides. Each line names the
providers whose codes or messages it matches (documented or reported in 2026). Codes match at any status, messages only
at the statuses listed with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eval.judging.openai.answer import json_or_none

Cause = Literal["money", "day", "text", "size", "place", "key"]
"""money: credit, plan or spending limit exhausted. day: daily quota exhausted. text: content filter rejected this
prompt. size: prompt too long. place: country, network or account refused. key: permission missing."""

_READ = 300
"Characters of a message that are matched. Validation errors quote the prompt further on, and prompts mention money."


@dataclass(frozen=True, slots=True)
class ApiError:
    """Fields of an error body, independent of the server's format."""

    message: str = ""
    code: str = ""
    "First `code` field, unchanged."
    codes: tuple[str, ...] = ()
    "All code, type and limit fields, in lower case."
    param: str | None = None
    flagged: str = ""
    "Categories reported by a content filter; the word flagged if it reports none."


@dataclass(frozen=True, slots=True)
class _Sign:
    cause: Cause
    codes: frozenset[str]
    statuses: frozenset[int]
    words: re.Pattern[str]


def _sign(cause: Cause, codes: str, statuses: tuple[int, ...], *words: str) -> _Sign:
    return _Sign(cause, frozenset(codes.split()), frozenset(statuses), re.compile("|".join(words), re.I))


_SIGNS = (
    _sign(
        "money",
        "insufficient_quota billing_hard_limit_reached billing_not_active credit_balance_exhausted "  # OpenAI
        "organization_usage_limit_exceeded organization_spend_limit_exceeded project_spend_limit_exceeded "
        "billing_error enforced_spend_limit_reached "  # Anthropic
        "openrouter_credits openrouter_key_limit openrouter_guardrail_budget openrouter_workspace_budget "
        "blocked_api_access "  # Groq's spend limits, with 400
        "arrearage allocationquota.freetieronly accountoverdueerror "  # DashScope, Volcengine
        "exceeded_current_quota_error insufficient_user_quota pre_consume_token_quota_failed "  # Kimi, one-api
        "insufficient_balance not_enough_balance billing_balance_not_enough "  # Novita
        "insufficient_credit insufficient_credits reject_no_credit quote_exceeded spend_limit_exceeded",  # ZenMux
        (400, 401, 403, 412, 429),
        r"credit balance is too low|specified (workspace )?api usage limits",  # Anthropic, with 400
        r"used all available credits|(run )?out of credits|requires more credits",  # xAI (403, 429), OpenRouter
        r"spend(ing)? limit|key limit exceeded|budget (limit )?exceeded",  # Fireworks (412), OpenRouter (403)
        r"insufficient (account )?(balance|credits?|funds|quota)|(balance|funds?) (is |are )?(insufficient|not enough)",
        r"(credits?|balance) (is |are |has been |have been )?(depleted|exhausted|used up)",  # Gemini's prepaid credits
        r"exceeded your (current quota|monthly included credits)|quota is not enough",  # OpenAI, Hugging Face, one-api
        r"account is in good standing|overdue account|in arrears",  # DashScope, with 400; Volcengine
        r"余额不足|额度不足|欠费",  # GLM (429), SiliconFlow (403), new-api (403)
    ),
    _sign(
        "text",
        "content_filter content_policy_violation cyber_policy_violation responsibleaipolicyviolation "  # OpenAI, Azure
        "moderation_blocked safety_check_failed prohibited_content contentpolicyviolation "
        "data_inspection_failed datainspectionfailed "  # DashScope
        "inputtextsensitivecontentdetected outputtextsensitivecontentdetected",  # Volcengine
        (400, 403, 422, 451),
        r"\bflagged\b|\bmoderation\b",  # OpenRouter (403), OpenAI's invalid_prompt
        r"content (management|policy|filter|moderation)|contentpolicyviolation",  # Azure, LiteLLM
        r"(usage|safety) (policy|policies|guidelines)|safety (system|filter|check)",  # OpenAI, xAI (403)
        r"content exists risk|considered high risk",  # DeepSeek, Kimi
        r"(sensitive|inappropriate|unsafe|prohibited|harmful) (content|information|words?)|敏感",  # DashScope, GLM
        r"guardrail.{0,30}(blocked|triggered|intervened)|(blocked|rejected) by .{0,30}guardrail",
    ),
    _sign(
        "size",
        "context_length_exceeded string_above_max_length",
        (400, 403, 413, 422),
        r"context (length|window)|token count|too many tokens|(input|prompt).{0,20} too long",  # Together: 403
    ),
    _sign(
        "place",
        "unsupported_country_region_territory ip_not_authorized account_deactivated access_terminated",
        (400, 401, 403, 429, 451),
        r"(country|region|territory|location)\b.{0,40}\b(not|un)[ -]?(supported|available|allowed)",
        r"not (supported|available|allowed) in your (country|region|territory|location)",
        r"\bip( address)?\b.{0,20}not (authorized|allowed)",
        r"(account|organization).{0,40}(suspended|locked|deactivated|disabled|terminated|restricted|banned)",
    ),
    _sign(
        "key",
        "permission_error insufficient_permissions",
        (403,),
        r"api[ _-]?key|permissions?\b|scopes?\b|not (allowed|authorized|permitted)|(have|has|had|no|not) access",
        r"access (to|denied)|must be verified|subscription|unauthorized|no authorization",
    ),
)
_OF_A_DAY = re.compile(r"(per|by)[ _-]?day|\bdaily\b|\b[rt]pd\b|limit: 0\b", re.I)
"Gemini reports a limit of 0 where the plan does not include the model."


def cause_of(status: int | None, error: ApiError) -> Cause | None:
    """Return the cause of an error, None if only its status is known. `status` is None for an error inside a 200."""
    message = error.message[:_READ]
    # Gemini's message is the same for all limits.
    if "resource_exhausted" in error.codes and status in (429, None):
        if _OF_A_DAY.search(" ".join([message, *error.codes])):
            return "day"
        return "money" if _SIGNS[0].words.search(re.sub("exceeded your current quota", "", message)) else None
    for sign in _SIGNS:
        if sign.codes.intersection(error.codes):
            return sign.cause
    if "openrouter_in_flight_budget" in error.codes:  # transient: earlier requests are still being billed
        return None
    if status == 402:
        return "money"
    if error.flagged:
        return "text"
    if message.lstrip().startswith("<"):  # an HTML page comes from a proxy, which does not know the cause
        return None
    for sign in _SIGNS:
        if (status is None or status in sign.statuses) and sign.words.search(message):
            return sign.cause
    if status == 429 and _OF_A_DAY.search(message):
        return "day"
    return None


# --- bodies ---------------------------------------------------------------------------------------------


_MESSAGE_FIELDS = ("message", "detail", "error", "status_msg", "msg")
_CODE_FIELDS = ("code", "type", "status", "error_type", "error_code", "reason", "limit_source", "quotaId")
_NESTED_FIELDS = "error errors detail innererror metadata raw details violations base_resp".split()


def read_error(body: Any) -> ApiError:
    """Read the fields of an error body: parsed JSON, JSON as text, or plain text. Never raises."""
    messages: list[Any] = []
    codes: list[tuple[str, str]] = []
    params: list[Any] = []
    flagged: list[str] = []
    for part in _parts(body, 10):
        if isinstance(part, str):
            messages.append(part)
            continue
        messages += [part.get(name) for name in _MESSAGE_FIELDS]
        values = [(name, part.get(name)) for name in _CODE_FIELDS]
        codes += [(k, str(v)) for k, v in values if isinstance(v, str | int) and not isinstance(v, bool)]
        params.append(part.get("param"))
        flagged += _flagged(part)
    return ApiError(
        ". ".join(dict.fromkeys(text for text in messages if isinstance(text, str))),
        next((code for name, code in codes if name == "code"), ""),
        tuple(code.lower() for _, code in codes),
        next((param for param in params if isinstance(param, str)), None),
        "; ".join(flagged),
    )


def _flagged(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield the categories that the content filter of OpenRouter, or that of Azure, reports in an object."""
    reasons, results = part.get("reasons"), part.get("content_filter_result")
    if isinstance(reasons, list) or "flagged_input" in part:
        yield ", ".join(map(str, reasons if isinstance(reasons, list) else [])) or "flagged"
    if isinstance(results, Mapping):
        objects = [(name, result) for name, result in results.items() if isinstance(result, Mapping)]
        yield ", ".join(k for k, v in objects if v.get("filtered") or v.get("detected")) or "flagged"


def _parts(body: Any, depth: int) -> Iterator[Mapping[str, Any] | str]:
    """Yield the body and the objects nested in it, outermost first.

    Gemini wraps errors in a list; gateways put the upstream error into `metadata.raw`, as text.
    """
    if depth == 0:
        return
    if isinstance(body, str):
        inner = json_or_none(body) if body.lstrip().startswith(("{", "[")) else None
        yield from [body] if inner is None else _parts(inner, depth - 1)
    elif isinstance(body, list):
        for item in body[:5]:
            yield from _parts(item, depth - 1)
    elif isinstance(body, Mapping):
        yield body
        for name in _NESTED_FIELDS:
            value = body.get(name)
            if isinstance(value, Mapping | list) or (name == "raw" and isinstance(value, str)):
                yield from _parts(value, depth - 1)
