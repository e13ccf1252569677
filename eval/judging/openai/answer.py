"""Answers of a judge model: the interface of prompts for judges, and the parts common to all answers.

A way of asking is one module such as `pairwise`: the prompt and the parser of its answers. This module parses what is
independent of the question: refusals, truncated answers, thoughts, JSON inside a code fence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from eval.judging.matchup import Question
from eval.judging.openai.thoughts import after_thoughts
from eval.judging.verdict import Slot, Status

Form = Literal["json", "text"]

_CUT = frozenset({"length", "max_tokens", "model_length", "model_context_window_exceeded"})
"Finish reasons at the length limit: OpenAI, Gemini and Anthropic, Mistral, Anthropic (context window)."
_FILTERED = frozenset(
    {"content_filter", "refusal", "sensitive", "guardrail_intervened"}  # OpenAI, Anthropic, GLM, Bedrock
    | {"safety", "recitation", "blocklist", "prohibited_content", "spii"}  # Gemini
)
_FENCE = re.compile(r"\A```(?:json)?[^\S\n]*\n(.*?)\n?```\Z", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"\A\W*(i['\u2019]?m (very |really |so )?sorry|sorry|my apologies|i apologi[sz]e|i can(['\u2019]?t|not| not)\b"
    r"|i (won['\u2019]?t|will not|must decline|am (unable|not able))|i['\u2019]m (unable|not able))",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Answer:
    """An unparsed answer of the judge."""

    text: str | None
    refusal: str | None = None
    "The API's own field for a refusal."
    finish_reason: str | None = "stop"
    "None if the completion has no choices."


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """The content of an answer: the slot that won when the status is "ok", else the reason for its absence."""

    status: Status
    slot: Slot | None = None
    detail: str = ""


class JudgePrompt(Protocol):
    """A way of asking: the messages of a question, and how an answer to them is parsed."""

    def messages(self, question: Question, form: Form, ties: bool, sample: int) -> list[dict[str, str]]:
        """Return the messages of one call. `sample` > 0 asks again after an unreadable answer."""

    def response_format(self, ties: bool) -> dict[str, Any]:
        """Return the JSON schema of an answer in the form json, as the API takes it."""

    def parse(self, answer: Answer, form: Form, ties: bool) -> ParsedAnswer:
        """Read an answer that was asked for in this form."""


class Unreadable(ValueError):
    """An answer without a verdict; the message describes what it contains instead."""


def parse_answer(answer: Answer, form: Form, read_slot: Callable[[str], Slot]) -> ParsedAnswer:
    """Read an answer: its status by the API's fields, its slot by `read_slot`, which raises Unreadable.

    A truncated answer has no verdict even where one can be made out: its end is unknown.
    """
    if answer.refusal:
        return ParsedAnswer("refused", detail=shorten(answer.refusal))
    reason = (answer.finish_reason or "").lower()
    if reason.partition(":")[0] in _FILTERED:  # Gemini: "content_filter: PROHIBITED_CONTENT"
        why = "" if reason == "content_filter" else f" ({answer.finish_reason})"
        return ParsedAnswer("refused", detail=f"stopped by the content filter{why}")
    if reason in _CUT:
        return ParsedAnswer("truncated", detail="the answer reached its length limit")
    whole = (answer.text or "").strip()
    # Markers inside a JSON object are quotes, not a chain of thought.
    is_object = form == "json" and isinstance(json_or_none(without_fence(whole)), dict)
    text = whole if is_object else after_thoughts(whole)
    if text is None:  # a verdict in thoughts is a draft
        return ParsedAnswer("malformed", detail="thoughts without an end")
    if not text:
        is_tool_call = reason in ("tool_calls", "function_call")
        absence = "a call of a tool in place of an answer" if is_tool_call else "empty answer"
        return ParsedAnswer("malformed", detail="thoughts and no answer" if whole else absence)
    try:
        return ParsedAnswer("ok", read_slot(text))
    except Unreadable as error:
        if _REFUSAL.match(text):
            return ParsedAnswer("refused", detail=shorten(text))
        return ParsedAnswer("malformed", detail=str(error))


def without_fence(text: str) -> str:
    """Return the content of a Markdown code fence, or the text itself where it is not one."""
    fenced = _FENCE.match(text)
    return fenced.group(1) if fenced else text


def json_or_none(text: str | bytes) -> Any:
    """Parse JSON, or return None for text that is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def shorten(text: str, length: int = 120) -> str:
    """Return the text on one line, cut to `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
