"""Error bodies of real providers (2024 to 2026), from their documentation or from user reports; sources in comments."""

from __future__ import annotations

import json

import pytest

from eval.judging.openai.error_causes import cause_of, read_error
from eval.judging.openai.retry import classify_status

OPENAI_QUOTA = "You exceeded your current quota, please check your plan and billing details."
XAI = "Your team 16f2 has either used all available credits or reached its monthly spending limit."


def openai(message: str, code: str | None = None, kind: str | None = None) -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


MONEY = {
    # developers.openai.com, error codes; help.openai.com 6614457
    "openai": (429, openai(OPENAI_QUOTA, "insufficient_quota", "insufficient_quota")),
    "openai by type": (429, openai(OPENAI_QUOTA, None, "insufficient_quota")),  # zurawiki/gptcommit#84
    "openai hard limit": (429, openai("Billing hard limit has been reached", "billing_hard_limit_reached")),
    "openai hard limit, images": (400, openai("Billing hard limit", "billing_hard_limit_reached")),
    "openai inactive": (429, openai("Your account is not active", "billing_not_active")),
    "openai credits": (429, openai("No credits", "credit_balance_exhausted", "insufficient_quota")),
    "openai organization": (429, openai("Limit reached", "organization_spend_limit_exceeded")),
    "openai project": (429, openai("Limit reached", "project_spend_limit_exceeded")),
    # anthropics/claude-code#66314; platform.claude.com, errors
    "anthropic": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing.",
            },
        },
    ),
    "anthropic limit": (
        400,
        openai("You have reached your specified API usage limits. You will regain access on"),
    ),
    "anthropic tier": (
        429,
        {"error": {"type": "rate_limit_error", "details": {"error_code": "enforced_spend_limit_reached"}}},
    ),
    # openrouter.ai/docs, errors and debugging; babikov/doka-site#7
    "openrouter": (
        402,
        {"error": {"message": "This request requires more credits, or fewer max_tokens", "code": 402}},
    ),
    "openrouter key": (
        403,
        {
            "error": {
                "message": "Forbidden",
                "code": 403,
                "metadata": {"limit_source": "openrouter_key_limit"},
            }
        },
    ),
    "deepseek": (
        402,
        openai("Insufficient Balance", "invalid_request_error", "unknown_error"),
    ),  # api-docs.deepseek.com
    "xai 429": (429, XAI),  # continuedev/continue#10373
    "xai 403": (403, {"code": "permission-denied", "error": XAI}),  # Anantys-oss/koan#2412
    # pollinations/pollinations#12136
    "fireworks": (
        412,
        openai(
            "Account a is suspended, possibly due to reaching the monthly spending limit",
            "PRECONDITION_FAILED",
        ),
    ),
    "groq": (
        400,
        openai("API access is blocked", "blocked_api_access"),
    ),  # console.groq.com/docs/spend-limits
    "together": (
        402,
        openai("reached its maximum allowed monthly spending limit"),
    ),  # docs.together.ai/docs/error-codes
    "mistral": (402, {"message": "Payment required"}),  # docs.mistral.ai
    # discuss.ai.google.dev 183654
    "gemini prepaid": (
        402,
        {
            "error": {
                "code": 402,
                "message": "Your prepayment credits are depleted.",
                "status": "RESOURCE_EXHAUSTED",
            }
        },
    ),
    "gemini prepaid, before": (
        429,
        [
            {
                "error": {
                    "code": 429,
                    "message": "Your prepayment credits are depleted.",
                    "status": "RESOURCE_EXHAUSTED",
                }
            }
        ],
    ),
    "hugging face": (
        402,
        {"error": "You have exceeded your monthly included credits for Inference Providers."},
    ),
    "kimi": (429, openai("Your account is suspended, check your plan", None, "exceeded_current_quota_error")),
    "glm": (429, openai("余额不足或无可用资源包,请充值。", "1113")),  # docs.z.ai/api-reference/api-code
    "siliconflow": (
        403,
        {"code": 30001, "message": "Sorry, your account balance is insufficient", "data": None},
    ),
    # hsliuping/TradingAgents-CN#170
    "dashscope": (
        400,
        openai("Access denied, please make sure your account is in good standing.", "Arrearage"),
    ),
    "volcengine": (403, openai("Access denied due to overdue account")),  # RooCodeInc/Roo-Code#12309
    "novita": (403, {"code": 403, "reason": "NOT_ENOUGH_BALANCE", "message": "not enough balance"}),
    "one-api": (
        403,
        openai("user quota is not enough", "insufficient_user_quota"),
    ),  # songquanpeng/one-api#1270
    "new-api": (
        403,
        {"error": {"type": "new_api_error", "message": "token quota is not enough, need quota: 1"}},
    ),
    "perplexity": (401, openai("no more", None, "insufficient_quota")),
}


@pytest.mark.parametrize(("status", "body"), MONEY.values(), ids=MONEY)
def test_exhausted_credit_in_every_format_stops_the_run(status, body):
    for given in (body, json.dumps(body), json.dumps(body, ensure_ascii=False)):
        failure = classify_status(status, given, {"retry-after": "1"})
        assert (failure.action, failure.cause) == ("stop", "money"), failure
        assert "money or quota is used up" in failure.detail and not failure.may_be_paid


PASSING = {
    "openai, asking for a card": openai(
        "Rate limit reached for gpt on requests per min (RPM): Limit 3. Please try again in 20s. Visit "
        "https://platform.openai.com/account/billing to add a payment method.",
        "rate_limit_exceeded",
    ),
    "azure": openai(
        "Requests have exceeded token rate limit of your current S0 pricing tier. Please retry after 6 seconds. Please "
        "go to https://aka.ms/oai/quotaincrease to increase the default rate limit.",
        "429",
    ),
    "groq": openai(
        "Limit 6000, Used 5999. Please try again in 1s. Upgrade at https://console.groq.com/settings/billing"
    ),
    "mistral": {
        "object": "error",
        "message": "Service tier capacity exceeded for this model.",
        "code": "3505",
    },
    "vertex": {
        "error": {"message": "Resource exhausted. Please try again later.", "status": "RESOURCE_EXHAUSTED"}
    },
    "gemini": [
        {
            "error": {
                "code": 429,
                "message": f"{OPENAI_QUOTA} limit: 15. Please retry in 45.5s.",
                "status": "RESOURCE_EXHAUSTED",
                "details": [
                    {"violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}]}
                ],
            }
        }
    ],
}


@pytest.mark.parametrize("body", PASSING.values(), ids=PASSING)
def test_rate_limit_that_mentions_billing_is_retried(body):
    failure = classify_status(429, body, {})
    assert failure.action == "retry" and failure.cause is None


def test_in_flight_budget_is_retried():
    """openrouter.ai/docs, limits: 402 with Retry-After until earlier requests are booked."""
    error = {"message": "In-flight", "code": 402, "metadata": {"limit_source": "openrouter_in_flight_budget"}}
    failure = classify_status(402, {"error": error}, {"retry-after": "5"})
    assert (failure.action, failure.retry_after) == ("retry", 5.0)


DAILY = {
    # langgenius/dify#19838
    "gemini": {
        "error": {
            "code": 429,
            "message": f"{OPENAI_QUOTA} Please retry in 45s.",
            "status": "RESOURCE_EXHAUSTED",
            "details": [{"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel"}]}],
        }
    },
    # continuedev/continue#9570: the plan does not have the model
    "gemini without": {
        "error": {
            "message": "Quota exceeded for metric, limit: 0. Please retry in 9s",
            "status": "RESOURCE_EXHAUSTED",
        }
    },
    "openrouter": openai("Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 a day"),
}


@pytest.mark.parametrize("body", DAILY.values(), ids=DAILY)
def test_exhausted_daily_quota_stops_the_run(body):
    failure = classify_status(429, body, {})
    assert (failure.action, failure.cause) == ("stop", "day") and "quota of the day" in failure.detail


def test_daily_limit_with_a_short_delay_is_retried():
    message = "Rate limit reached on tokens per day (TPD): Limit 100000. Please try again in 7m12s."
    assert classify_status(429, openai(message), {}).action == "retry"


TEXT = {
    # openrouter.ai/docs, errors and debugging
    "openrouter": (
        403,
        {
            "error": {
                "code": 403,
                "message": "Refused",
                "metadata": {"reasons": ["violence"], "flagged_input": "x"},
            }
        },
    ),
    # compl-ai/compl-ai#20
    "azure": (
        400,
        {
            "error": {
                "message": "The response was filtered",
                "code": None,
                "innererror": {
                    "code": "ResponsibleAIPolicyViolation",
                    "content_filter_result": {"hate": {"filtered": False}, "violence": {"filtered": True}},
                },
            }
        },
    ),
    # an upstream filter, seen through a gateway (BerriAI/litellm#16231)
    "behind a gateway": (
        400,
        {
            "error": {
                "message": "Provider returned error",
                "metadata": {"raw": json.dumps(openai("no", "content_filter"))},
            }
        },
    ),
    "litellm": (400, openai("litellm.ContentPolicyViolationError: AzureException", "400")),
    "openai": (
        400,
        openai("Invalid prompt: your prompt was flagged as potentially violating", "invalid_prompt"),
    ),
    "deepseek": (400, {"detail": "Content Exists Risk"}),  # deepseek-ai/DeepSeek-V2#30
    "kimi": (
        400,
        openai("The request was rejected because it was considered high risk", None, "content_filter"),
    ),
    "xai": (403, {"code": "permission-denied", "error": "Content violates usage guidelines."}),
    "dashscope": (400, openai("Input data may contain inappropriate content.", "data_inspection_failed")),
    "glm": (400, openai("系统检测到输入或生成内容可能包含不安全或敏感内容", "1301")),
    "zenmux": (403, openai("Upstream", None, "safety_check_failed")),  # docs.zenmux.ai
    "422": (422, {"detail": "blocked by the content policy"}),
    "451": (451, openai("This content was flagged")),
}


@pytest.mark.parametrize(("status", "body"), TEXT.values(), ids=TEXT)
def test_content_filter_refuses_one_question(status, body):
    failure = classify_status(status, body, {})
    assert (failure.action, failure.cause) == ("refused", "text"), failure
    assert f"HTTP {status}" in failure.detail


def test_categories_of_a_filter_are_reported():
    assert "(violence)" in classify_status(*TEXT["openrouter"], {}).detail
    assert "(violence)" in classify_status(*TEXT["azure"], {}).detail


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (
            403,
            openai("Country, region, or territory not supported", "unsupported_country_region_territory"),
            "place",
        ),
        (400, {"error": {"message": "User location is not supported for the API use."}}, "place"),  # Gemini
        (403, openai("The model is not available in your region"), "place"),
        (400, openai("Organization has been restricted.", "organization_restricted"), "place"),  # Groq
        (401, openai("Your account was closed", "account_deactivated"), "place"),
        (403, openai("You have insufficient permissions. Missing scopes: model.request"), "key"),
        (403, {"type": "error", "error": {"type": "permission_error", "message": "no"}}, "key"),  # Anthropic
        (403, openai("Project p does not have access to model m", "model_not_found"), "key"),
    ],
)
def test_refused_place_or_key_stops_the_run(status, body, cause):
    failure = classify_status(status, body, {})
    assert (failure.action, failure.cause) == ("stop", cause)


def test_too_long_prompt_with_403_fails_one_question():
    """docs.together.ai/docs/error-codes: 403 for too many tokens."""
    body = openai(
        "Input token count + max_tokens parameter must be less than the context length of the model"
    )
    failure = classify_status(403, body, {})
    assert failure.action == "give_up" and not failure.unclear


@pytest.mark.parametrize(
    "body", ["", "Forbidden", {}, {"error": None}, openai("Forbidden"), None, 7, [[[[[["x"]]]]]]]
)
def test_403_without_a_cause_is_unclear(body):
    failure = classify_status(403, body, {})
    assert failure.action == "give_up" and failure.unclear


def test_403_with_an_html_page_is_unclear():
    page = "<html><title>Access denied</title>You do not have permission: your API key, your country</html>"
    assert classify_status(403, page, {}).unclear


@pytest.mark.parametrize("status", [400, 422])
def test_quoted_prompt_does_not_decide_the_cause(status):
    """Servers that check a request quote what they got; the posts here are about people's money."""
    post = (
        "My credit balance is too low, I have insufficient funds and was flagged. They sell harmful content."
    )
    quoted = {
        "detail": [{"type": "missing", "loc": ["body"], "msg": "Field required", "input": {"content": post}}]
    }
    assert classify_status(status, quoted, {}).action == "give_up"
    as_text = openai("[{'type': 'missing', 'input': {'messages': 'You compare two texts'" + 300 * " x" + post)
    assert classify_status(status, as_text, {}).action == "give_up"


def test_fields_are_found_in_nested_bodies():
    nested = [
        {"error": {"message": "m", "code": 400, "metadata": {"raw": '{"message": "inner", "param": "p"}'}}}
    ]
    error = read_error(nested)
    assert (error.message, error.code, error.param) == ("m. inner", "400", "p")
    assert read_error("no JSON {").message == "no JSON {"
    assert read_error({"flagged_input": "x", "reasons": 5}).flagged == "flagged"
    assert read_error({"error": "text", "code": "Some_Code"}).codes == ("some_code",)
    assert cause_of(500, read_error({})) is None
