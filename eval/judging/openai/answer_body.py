"""Read response bodies: JSON, event streams, content in parts, errors with status 200."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from drpo.jsonl import encodable, lines_of
from eval.judging.openai.answer import Answer, json_or_none
from eval.judging.openai.retry import ErrorInAnswer, NotAnAnswer

Kind = TypeVar("Kind", list, dict)

_BROKEN = frozenset({"error", "insufficient_system_resource", "network_error", "abort"})
"Finish reasons of answers interrupted by the server: OpenRouter, DeepSeek, GLM, vLLM."


def decoded(text: str) -> Any:
    """Parse a body as JSON, or as an event stream (sent by some gateways unasked). Raises NotAnAnswer for others."""
    text = text.removeprefix("\ufeff")
    payload = json_or_none(text)
    if payload is not None:
        return payload
    chunks = []
    for _, line in lines_of(text.replace("\r", "\n")):  # a stream's lines may end in \r alone
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data and data != "[DONE]":
            chunks.append(json_or_none(data))
    if not chunks or not all(isinstance(chunk, Mapping) for chunk in chunks):
        raise NotAnAnswer(text[:80])
    return _joined(chunks)


def _joined(chunks: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge stream events into one chat completion.

    Raises NotAnAnswer for an event that is not part of a completion, and for a stream without a finish reason. An
    error is left for `answer_in` to raise.
    """
    whole: dict[str, Any] = {}
    for chunk in chunks:
        whole |= {name: value for name, value in chunk.items() if value is not None}
    if _has_error(whole):
        return whole
    texts: list[str] = []
    refusals: list[str] = []
    finish_reason = error = None
    for chunk in chunks:
        for choice in _typed(list, chunk.get("choices"), chunk):
            choice = _typed(dict, choice, chunk)
            message = _typed(dict, choice.get("delta"), chunk) or _typed(dict, choice.get("message"), chunk)
            text, refusal = _texts(message.get("content"), "")
            texts.append(text or "")
            refusals.append(text_or_none(message.get("refusal")) or refusal or "")
            finish_reason = choice.get("finish_reason") or finish_reason
            error = choice.get("error") or error
    if finish_reason is None and not error:
        raise NotAnAnswer("an event stream without a finish reason")
    message = {"content": "".join(texts) or None, "refusal": "".join(refusals) or None}
    return {**whole, "choices": [{"message": message, "finish_reason": finish_reason, "error": error}]}


def answer_in(payload: Any, joint: str) -> Answer:
    """Read the first choice of a chat completion, joining text parts with `joint`.

    Raises NotAnAnswer for JSON that is not a chat completion, and ErrorInAnswer if it contains an error, even next to
    an answer, which is then incomplete.
    """
    if isinstance(payload, Mapping) and _has_error(payload):
        raise ErrorInAnswer(payload)
    choices = payload.get("choices") if isinstance(payload, Mapping) else None
    if choices is None:
        raise _not_an_answer(payload)
    if not _typed(list, choices, payload):
        return Answer(None, finish_reason=None)
    choice = choices[0]
    if not isinstance(choice, Mapping):
        raise _not_an_answer(payload)
    if choice.get("error"):
        raise ErrorInAnswer({"error": choice["error"]})
    message = _typed(dict, choice.get("message"), payload)
    reason = encodable(str(choice.get("finish_reason") or "stop"))
    if reason.lower() in _BROKEN:
        raise NotAnAnswer(f"the answer was interrupted with finish_reason {reason}")
    text, refusal = _texts(message.get("content"), joint)
    return Answer(text_or_none(text), text_or_none(message.get("refusal")) or text_or_none(refusal), reason)


def objects_in(listed: Any) -> list[Mapping[str, Any]]:
    """Return the objects of a reply that lists models or batches. Raises NotAnAnswer for other JSON."""
    objects = listed.get("data") if isinstance(listed, Mapping) else None
    if not isinstance(objects, list) or not all(isinstance(item, Mapping) for item in objects):
        raise NotAnAnswer(json.dumps(listed)[:80])
    return objects


def _has_error(payload: Mapping[str, Any]) -> bool:
    """Return whether a body reports an error with status 200, in `error` or as MiniMax does."""
    if payload.get("error"):
        return True
    base_resp = payload.get("base_resp")
    failed = isinstance(base_resp, Mapping) and base_resp.get("status_code") not in (0, None)
    return failed and not payload.get("choices")


def _texts(content: Any, joint: str) -> tuple[str | None, str | None]:
    """Return text and refusal of a message's content, which is a string or a list of parts.

    Parts of type text and output_text form the text, parts of type refusal the refusal. All others (thinking,
    reasoning, reference, image_url, ...) are not part of the answer. Raises NotAnAnswer for content of another shape.
    """
    if content is None or isinstance(content, str):
        return content, None
    texts, refusals = [], []
    for part in [content] if isinstance(content, Mapping) else _typed(list, content, content):
        part = {"text": part} if isinstance(part, str) else _typed(dict, part, content)
        text = part.get("text")
        text = text.get("value") if isinstance(text, Mapping) else text
        kind = part.get("type") or "text"
        if kind in ("text", "output_text") and not part.get("thought"):
            if not isinstance(text, str | None):
                raise _not_an_answer(content)
            texts += [] if text is None else [text]
        elif kind == "refusal":
            refusals.append(str(part.get("refusal") or text or "refused"))
    return (joint.join(texts) if texts else None), (joint.join(refusals) if refusals else None)


def _typed(kind: type[Kind], value: Any, whole: Any) -> Kind:
    """Return a list or an object of `whole`, an empty one for null. Raises NotAnAnswer for other values."""
    if not isinstance(value, kind | None):
        raise _not_an_answer(whole)
    return value or kind()


def _not_an_answer(payload: Any) -> NotAnAnswer:
    return NotAnAnswer(json.dumps(payload)[:200])


def text_or_none(value: Any) -> str | None:
    """Return a text that can be stored, None for other values. Halves of surrogate pairs are replaced."""
    return encodable(value) if isinstance(value, str) else None
