"""Read response bodies: JSON, event streams, content in parts, errors with status 200."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval.judging.retry import ErrorInAnswer, NotAnAnswer

_BROKEN = frozenset({"error", "insufficient_system_resource", "network_error", "abort"})
"Finish reasons of answers interrupted by the server: OpenRouter, DeepSeek, GLM, vLLM."


@dataclass(frozen=True, slots=True)
class Said:
    """Content of one answer."""

    text: str | None
    refusal: str | None
    finish_reason: str | None
    "None if the completion has no choices."


def decoded(text: str) -> Any:
    """Parse a body as JSON, or as an event stream (sent by some gateways unasked). Raises NotAnAnswer for others."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    chunks = []
    for line in text.splitlines():
        data = line.partition("data:")[2].strip() if line.startswith("data:") else ""
        if data and data != "[DONE]":
            try:
                chunks.append(json.loads(data))
            except ValueError:
                raise NotAnAnswer(text[:80]) from None
    if not chunks or not all(isinstance(chunk, Mapping) for chunk in chunks):
        raise NotAnAnswer(text[:80])
    return _joined(chunks)


def _joined(chunks: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge stream events into one chat completion. Raises NotAnAnswer for a stream without a finish reason."""
    whole: dict[str, Any] = {}
    texts: dict[str, list[str]] = {"content": [], "refusal": []}
    finish_reason = None
    for chunk in chunks:
        whole |= {name: value for name, value in chunk.items() if value is not None}
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or choice.get("message") or {}
            for name, parts in texts.items():
                if isinstance(delta.get(name), str):
                    parts.append(delta[name])
            finish_reason = choice.get("finish_reason") or finish_reason
    if finish_reason is None and not whole.get("error"):
        raise NotAnAnswer("an event stream without a finish reason")
    message = {name: "".join(parts) or None for name, parts in texts.items()}
    return {**whole, "choices": [{"message": message, "finish_reason": finish_reason}]}


def said_in(payload: Any, joint: str) -> Said:
    """Read the first choice of a chat completion, joining text parts with `joint`.

    Raises NotAnAnswer for JSON that is not a chat completion, and ErrorInAnswer if it contains an error, also beside an
    answer, which is then incomplete.
    """
    if not isinstance(payload, Mapping):
        raise NotAnAnswer(json.dumps(payload)[:200])
    choices = payload.get("choices")
    if payload.get("error") or (not choices and _failed(payload.get("base_resp"))):
        raise ErrorInAnswer(payload)
    if not isinstance(choices, list):
        raise NotAnAnswer(json.dumps(payload)[:200])
    if not choices:
        return Said(None, None, None)
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(message, Mapping | None) or not isinstance(choice, Mapping):
        raise NotAnAnswer(json.dumps(payload)[:200])
    if choice.get("error"):
        raise ErrorInAnswer({"error": choice["error"]})
    reason = str(choice.get("finish_reason") or "stop")
    if reason.lower() in _BROKEN:
        raise NotAnAnswer(f"the answer was interrupted with finish_reason {reason}")
    text, refusal = _texts((message or {}).get("content"), joint)
    return Said(_clean(text), _clean((message or {}).get("refusal")) or _clean(refusal), reason)


def _failed(base_resp: Any) -> bool:
    """Whether MiniMax reports an error (with status 200)."""
    return isinstance(base_resp, Mapping) and base_resp.get("status_code") not in (0, None)


def _texts(content: Any, joint: str) -> tuple[str | None, str | None]:
    """Return text and refusal of a message's content, which is a string or a list of parts.

    Parts of type text and output_text form the text, parts of type refusal the refusal. All others (thinking,
    reasoning, reference, image_url, ...) are not part of the answer.
    """
    if not isinstance(content, list | Mapping):
        return content, None
    texts, refusals = [], []
    for part in [content] if isinstance(content, Mapping) else content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping):
            text = part.get("text")
            text = text.get("value") if isinstance(text, Mapping) else text
            if part.get("type", "text") in ("text", "output_text") and not part.get("thought"):
                texts += [text] if isinstance(text, str) else []
            elif part.get("type") == "refusal":
                refusals.append(str(part.get("refusal") or text or "refused"))
    return (joint.join(texts) if texts else None), (joint.join(refusals) if refusals else None)


def _clean(text: Any) -> str | None:
    """Replace unpaired surrogates, which cannot be stored; None for values other than strings."""
    if not isinstance(text, str):
        return None
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
