"""Reading a verdict out of an answer, strictly: quotes, markdown and case change nothing, all else is malformed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from eval.judging.openai.thoughts import after_thoughts
from eval.judging.verdict import Slot, Status

Form = Literal["json", "text"]

PARSER_VERSION = 2
"""Goes up when an answer may be read in another way than before. Answers are stored as they came, so stored ones are
then read anew, and nothing is asked again."""

JSON_VERDICT = "preferred"
"The key of the verdict in a JSON answer."

_SLOTS: dict[str, Slot] = {"a": "first", "b": "second", "tie": "tie"}
_DECORATION = "*_`~#>\"'\u201c\u201d\u2018\u2019\u00ab\u00bb()[]{}<>- \t"
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
    """What came back from the judge, before anybody read it."""

    text: str | None
    refusal: str | None = None
    "The API's own field for a refusal."
    finish_reason: str | None = "stop"


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What an answer says: the slot that won when the status is "ok", else why there is none."""

    status: Status
    slot: Slot | None = None
    detail: str = ""


class _Unreadable(ValueError):
    """The answer holds no verdict; the message says what it holds instead."""


def read_answer(answer: Answer, form: Form, label: str, noun: str, ties: bool) -> ParsedAnswer:
    """Status and slot of an answer that was asked for in this form.

    `label` introduces the verdict in the text form ("Preferred"), `noun` is what the prompt calls a response
    ("Summary"). An answer that was cut off is truncated even where a verdict can be made out: its end is unknown.
    """
    if answer.refusal:
        return ParsedAnswer("refused", detail=_shorten(answer.refusal))
    reason = (answer.finish_reason or "").lower()
    if reason.partition(":")[0] in _FILTERED:  # Gemini: "content_filter: PROHIBITED_CONTENT"
        why = "" if reason == "content_filter" else f" ({answer.finish_reason})"
        return ParsedAnswer("refused", detail=f"stopped by the content filter{why}")
    if reason in _CUT:
        return ParsedAnswer("truncated", detail="the answer reached its length limit")
    whole = (answer.text or "").strip()
    text = whole if form == "json" and _is_json(whole) else after_thoughts(whole)
    if text is None:  # a verdict in thoughts is a draft
        return ParsedAnswer("malformed", detail="thoughts without an end")
    if not text:
        return ParsedAnswer("malformed", detail=_nothing_said(whole, reason))
    try:
        slot = _read_json(text, noun) if form == "json" else _read_text(text, label, noun)
    except _Unreadable as error:
        if _REFUSAL.match(text):
            return ParsedAnswer("refused", detail=_shorten(text))
        return ParsedAnswer("malformed", detail=str(error))
    if slot == "tie" and not ties:
        return ParsedAnswer("malformed", detail="a tie, which was not among the choices")
    return ParsedAnswer("ok", slot)


def _nothing_said(whole: str, reason: str) -> str:
    if whole:
        return "thoughts and no answer"
    return (
        "a call of a tool in place of an answer"
        if reason in ("tool_calls", "function_call")
        else "empty answer"
    )


def _without_fence(text: str) -> str:
    fenced = _FENCE.match(text)
    return fenced.group(1) if fenced else text


def _is_json(text: str) -> bool:
    """Whether the text is one JSON object. Markers inside it are then quotes, not a chain of thought."""
    try:
        return isinstance(json.loads(_without_fence(text)), dict)
    except (ValueError, RecursionError):
        return False


def _read_json(text: str, noun: str) -> Slot:
    try:
        answer = json.loads(_without_fence(text), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"not JSON: {error}") from None
    if not isinstance(answer, dict) or not isinstance(answer.get(JSON_VERDICT), str):
        raise _Unreadable(f"JSON without a {JSON_VERDICT!r} of type text")
    slot = _slot(answer[JSON_VERDICT], noun)
    if slot is None:
        raise _Unreadable(f"{JSON_VERDICT} is {_shorten(answer[JSON_VERDICT])!r}")
    return slot


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise _Unreadable(f"a key comes twice: {keys}")
    return dict(pairs)


def _read_text(text: str, label: str, noun: str) -> Slot:
    """The verdict of the labelled line (or of the line below a bare label); without one, of a last line that holds a
    verdict and nothing else.

    Several labelled lines must agree: a judge may quote one from the texts it compares.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    labelled = re.compile(
        rf"[\W_]*{re.escape(label)}[{re.escape(_DECORATION)}]*:(?P<verdict>.*)", re.IGNORECASE
    )
    verdicts = []
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if match := labelled.fullmatch(line):
            verdicts.append(match.group("verdict").strip(_DECORATION) or below)
    if not verdicts:
        slot = _slot(lines[-1], noun)
        if slot is None:
            raise _Unreadable(f"no line {label!r}, and the last line is {_shorten(lines[-1])!r}")
        return slot
    slots = {_slot(verdict, noun) for verdict in verdicts}
    if len(slots) > 1:
        raise _Unreadable(f"several different verdicts: {[_shorten(v) for v in verdicts]}")
    slot = slots.pop()
    if slot is None:
        raise _Unreadable(f"{label} is {_shorten(verdicts[0])!r}")
    return slot


def _slot(verdict: str, noun: str) -> Slot | None:
    """`**"A".**`, `summary a` -> first; anything that is more than the name of a slot -> None."""
    bare = verdict.strip(_DECORATION + ".,;:!").lower()
    named = re.fullmatch(rf"(?:{re.escape(noun.lower())}|response)[{re.escape(_DECORATION)}]*(a|b)", bare)
    return _SLOTS.get(named.group(1) if named else bare)


def _shorten(text: str, length: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
