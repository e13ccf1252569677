"""The body of an answer in the shapes that servers give it: a JSON, a stream of events, parts of text, an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval.judging.retry import ErrorInAnswer, NotAnAnswer

_BROKEN = frozenset({"error", "insufficient_system_resource", "network_error", "abort"})
"Reasons of OpenRouter, DeepSeek, GLM and vLLM to stop in the middle, through no fault of the question."


@dataclass(frozen=True, slots=True)
class Said:
    """What a model answered."""

    text: str | None
    refusal: str | None
    finish_reason: str | None
    "None when there are no choices at all."


def decoded(text: str) -> Any:
    """The JSON of a body. A stream that nobody asked for is put together. Raises NotAnAnswer for anything else."""
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
    """One chat completion from the events of a stream, which is not whole without a reason to finish."""
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
        raise NotAnAnswer("a stream of events without an end")
    message = {name: "".join(parts) or None for name, parts in texts.items()}
    return {**whole, "choices": [{"message": message, "finish_reason": finish_reason}]}


def said_in(payload: Any, joint: str) -> Said:
    """What a chat completion says in its first choice; texts in parts are joined by `joint`.

    Raises NotAnAnswer for JSON that is no chat completion, ErrorInAnswer where it holds an error in place of an answer
    or beside it: such an answer breaks off.
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
        raise NotAnAnswer(f"the answer broke off with finish_reason {reason}")
    text, refusal = _texts((message or {}).get("content"), joint)
    return Said(_clean(text), _clean((message or {}).get("refusal")) or _clean(refusal), reason)


def _failed(base_resp: Any) -> bool:
    """MiniMax's way to say that there is no answer, with status 200."""
    return isinstance(base_resp, Mapping) and base_resp.get("status_code") not in (0, None)


def _texts(content: Any, joint: str) -> tuple[str | None, str | None]:
    """Text and refusal of a message's content: a text, or parts of which some are text.

    Of {type: text | output_text, text} the text counts, of {type: refusal, refusal} the refusal. Thoughts ({type:
    thinking | reasoning | ...}) and everything else are not part of the answer.
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
    """Text that can be stored: half of a surrogate pair becomes a replacement character."""
    if not isinstance(text, str):
        return None
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
