"""Response bodies: content in parts, event streams, errors with status 200, malformed bodies."""

from __future__ import annotations

import json

import pytest

from eval.judging.openai.answer import Answer
from eval.judging.openai.answer_body import answer_in, decoded
from eval.judging.openai.retry import ErrorInAnswer, NotAnAnswer


def completion(content=None, finish_reason: str | None = "stop", **message) -> dict:
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": finish_reason}]}


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "A? No."}]}  # Mistral
TEXT = {"type": "text", "text": "B"}


@pytest.mark.parametrize(
    ("content", "text", "refusal"),
    [
        ("B", "B", None),
        (None, None, None),
        ([], None, None),
        ([TEXT], "B", None),
        (TEXT, "B", None),
        ([THOUGHT, TEXT], "B", None),
        (
            [{"type": "reasoning", "text": "A"}, {"type": "output_text", "text": "B", "annotations": []}],
            "B",
            None,
        ),
        (
            [{"type": "redacted_thinking", "data": "A"}, TEXT, {"type": "reference", "reference_ids": [1]}],
            "B",
            None,
        ),
        ([{"text": "A", "thought": True}, {"text": "B"}], "B", None),
        ([{"type": "text", "text": {"value": "B", "annotations": []}}], "B", None),
        ([TEXT, THOUGHT, {"type": "text", "text": "C"}], "B|C", None),
        (["B", "C"], "B|C", None),
        ([THOUGHT], None, None),
        ([{"type": "refusal", "refusal": "I will not."}], None, "I will not."),
        ([{"type": None, "text": "B"}, {"type": "text", "text": None}], "B", None),
        ([None, {"type": "image_url"}], None, None),
    ],
)
def test_content_parts_give_text_and_refusal(content, text, refusal):
    assert answer_in(completion(content), "|") == Answer(text, refusal, "stop")


def test_reasoning_fields_are_not_read():
    for field in ("reasoning", "reasoning_content"):
        assert answer_in(completion(None, "length", **{field: "Preferred: A"}), "") == Answer(
            None, None, "length"
        )


def test_message_fields():
    assert answer_in(completion(None, refusal="no"), "") == Answer(None, "no", "stop")
    assert answer_in(completion("B", None), "") == Answer("B", None, "stop")
    assert answer_in(completion(None, "tool_calls", tool_calls=[{}]), "") == Answer(None, None, "tool_calls")
    assert answer_in({"choices": [], "error": None}, "") == Answer(None, None, None)
    assert answer_in({"choices": [{"message": None}]}, "") == Answer(None, None, "stop")


@pytest.mark.parametrize(
    "payload",
    [
        *(None, 3, "text", [], {}),
        *({"choices": None}, {"choices": {}}, {"choices": ["B"]}, {"choices": [None]}),
        *({"choices": "B"}, {"choices": 3}, {"choices": {"message": {"content": "B"}}}, {"choices": [["B"]]}),
        *({"choices": [{"message": odd}]} for odd in ("B", "", 3, 0, False, ["B"], [])),
        *(completion(content) for content in (3, 0, True, False, 0.5)),
        *(completion([part]) for part in (3, False, ["B"], [])),
        *(completion([TEXT, {"type": "text", "text": odd}]) for odd in (3, ["B"], {"value": 3})),
        *(completion("B", reason) for reason in ("error", "insufficient_system_resource", "network_error")),
    ],
    ids=str,
)
def test_malformed_completion_raises(payload):
    with pytest.raises(NotAnAnswer) as raised:
        answer_in(payload, "")
    assert not isinstance(raised.value, ErrorInAnswer)


@pytest.mark.parametrize(
    "payload",
    [
        {"error": {"code": 502, "message": "down"}},
        {"error": "down", "choices": []},
        {**completion("Half an ans"), "error": {"code": 502}},
        {
            "choices": [
                {"message": {"content": "Half an ans"}, "error": {"code": 502}, "finish_reason": "error"}
            ]
        },
        {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
    ],
    ids=str,
)
def test_error_with_status_200_raises(payload):
    with pytest.raises(ErrorInAnswer):
        answer_in(payload, "")


def test_success_status_of_minimax_is_accepted():
    assert answer_in({**completion("B"), "base_resp": {"status_code": 0}, "error": None}, "").text == "B"


# --- text -------------------------------------------------------------------------------------------------


def events(*chunks) -> str:
    lines = [": keep-alive", *(f"data: {json.dumps(chunk)}" for chunk in chunks), "data: [DONE]"]
    return "\n\n".join(lines) + "\n"


def delta(finish_reason=None, **fields) -> dict:
    return {"model": "m", "choices": [{"delta": fields, "finish_reason": finish_reason}], "usage": None}


def test_event_stream_is_assembled():
    """It was paid and contains an answer."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    parts = [delta(role="assistant"), delta(reasoning="A?"), delta(content='{"a'), delta(content='": 1}')]
    text = events(*parts, delta("stop"), {"choices": [], "usage": usage})
    payload = decoded(text)
    assert answer_in(payload, "") == Answer('{"a": 1}', None, "stop")
    assert payload["usage"] == usage and payload["model"] == "m"


def test_error_in_an_event_stream_raises():
    with pytest.raises(ErrorInAnswer):
        answer_in(decoded(events(delta(content="Half"), {"error": {"code": 502, "message": "down"}})), "")


def test_error_of_a_choice_in_an_event_stream_raises():
    failed = {"choices": [{"delta": {}, "error": {"code": 502}, "finish_reason": None}]}
    with pytest.raises(ErrorInAnswer):
        answer_in(decoded(events(delta(content="Half"), failed)), "")


def test_error_beside_malformed_choices_raises():
    """The error names the cause: money used up, for one."""
    for payload in (
        {"choices": "B", "error": {"code": 402, "message": "Insufficient credits"}},
        {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
    ):
        for text in (json.dumps(payload), events(payload)):
            with pytest.raises(ErrorInAnswer):
                answer_in(decoded(text), "")


def test_event_stream_with_content_in_parts_is_assembled():
    """Parts of one text are joined without the newline that separates the parts of a whole answer."""
    thought = delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "B?"}]}])
    parts = [delta(content=[{"type": "text", "text": text}]) for text in ("Prefer", "red: ")]
    last = delta("stop", content=[{"type": "output_text", "text": "A"}, {"type": "text", "text": "!"}])
    assert answer_in(decoded(events(thought, *parts, last)), "\n") == Answer("Preferred: A!", None, "stop")
    refused = [delta(content=[{"type": "refusal", "refusal": "I will "}]), delta("stop", refusal="not.")]
    assert answer_in(decoded(events(*refused)), "\n") == Answer(None, "I will not.", "stop")


@pytest.mark.parametrize("cut", ["\u2028", "\u2029", "\x85", "\u2028data: 3\u2028"], ids=ascii)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=ascii)
def test_unicode_line_ends_do_not_cut_an_event(cut, end):
    chunks = [delta(content=f"One{cut}"), delta("stop", content="B")]
    lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}" for chunk in chunks]
    text = "\ufeff" + (2 * end).join([": keep-alive", *lines, "data: [DONE]"]) + end
    assert answer_in(decoded(text), "") == Answer(f"One{cut}B", None, "stop")


@pytest.mark.parametrize(
    "chunk",
    [
        *({"choices": odd} for odd in (["B"], [["B"]], {"0": {}}, {}, "B", "", 3, False)),
        *({"choices": [{"delta": odd}]} for odd in ("B", "", ["B"], [], 3, False)),
        *({"choices": [{"message": odd}]} for odd in ("B", ["B"], 3)),
        *(delta(content=odd) for odd in (3, False, [3], [["B"]], [{"text": 3}], {"text": ["B"]})),
    ],
    ids=str,
)
def test_malformed_event_raises(chunk):
    """Alone, and between events of a good answer."""
    for chunks in ([chunk], [delta(content="B"), chunk, delta("stop")]):
        with pytest.raises(NotAnAnswer) as raised:
            answer_in(decoded(events(*chunks)), "")
        assert not isinstance(raised.value, ErrorInAnswer)


NESTED = "[" * 5000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>",
        "data: [DONE]",
        "data: x\n",
        events(3),
        events(delta(content="B")),
        NESTED,
        f"data: {NESTED}",
    ],
    ids=lambda text: text[:20],
)
def test_other_texts_raise(text):
    with pytest.raises(NotAnAnswer):
        decoded(text)


def test_whitespace_around_json_is_ignored():
    """DeepSeek sends empty lines to keep the connection alive."""
    assert decoded("\n\n \n" + json.dumps(completion("B")) + "\n") == completion("B")
