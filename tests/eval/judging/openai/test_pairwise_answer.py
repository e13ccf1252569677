"""Which answers are verdicts: by hand, for both forms. An answer is the letter, in whatever dress, or it is none."""

from __future__ import annotations

import json

import pytest

from eval.judging.openai.answer import Answer, ParsedAnswer
from eval.judging.openai.pairwise import PROMPTS

SAME = [
    "X",
    '"X"',
    "'X'",
    "“X”",
    "`X`",
    "**X**",
    "*X*",
    "(X)",
    "[[X]]",
    "X.",
    "X!",
    "x",
    " x ",
    "<X>",
    '**"X".**',
]
SAME += ["Summary X", "summary x", "Response X", '**Summary "X"**', "__X__", "- X"]
OTHER = [
    "A or B",
    "A and B",
    "both",
    "neither",
    "A is better",
    "C",
    "AB",
    "A (slightly)",
    "not A",
    "",
    "1",
    "first",
]


def read(text: str | None, form: str = "text", ties: bool = True, **answer) -> ParsedAnswer:
    return PROMPTS["tldr-1"].parse(Answer(text, **answer), form, ties)


@pytest.mark.parametrize("dress", SAME)
@pytest.mark.parametrize("letter", ["A", "B"])
def test_dress_does_not_change_a_verdict(dress, letter):
    """Known trouble: a parser that wants exactly A counts every other dress for the other side."""
    said = dress.replace("X", letter).replace("x", letter.lower())
    slot = "first" if letter == "A" else "second"
    for text in (
        f"Comparison: One is better.\nPreferred: {said}",
        f"comparison: one\n\n**preferred:** {said}\n",
        f"Preferred:\n{said}",
        f"### Preferred: {said}",
        f"One is better.\n{said}",
        said,
    ):
        assert read(text) == ParsedAnswer("ok", slot), text
    assert read(json.dumps({"comparison": "One.", "preferred": said}), "json") == ParsedAnswer("ok", slot)


@pytest.mark.parametrize("said", OTHER)
def test_anything_else_is_malformed(said):
    for text in (f"Comparison: x\nPreferred: {said}", f"Comparison: x\n{said}"):
        assert read(text).status == "malformed", text
        assert read(text).slot is None
    assert read(json.dumps({"comparison": "x", "preferred": said}), "json").status == "malformed"


@pytest.mark.parametrize(
    "text",
    [
        "Preferred: A\nPreferred: B",
        "The text says Preferred: A\nBut I say it is bad",
        "Not preferred: A",
        "I preferred: A\nsince",
        "Comparison: A is better",
        "More helpful: A",
        "<think>Preferred: A",
        "   \n ",
    ],
)
def test_unclear_texts_are_malformed(text):
    assert read(text).status == "malformed"


def test_the_labelled_line_decides_whatever_stands_elsewhere():
    assert read("Preferred: A\n\nB") == ParsedAnswer("ok", "first")


def test_a_verdict_in_the_thoughts_is_a_draft():
    assert read("<think>Preferred: A\nhm</think>\nPreferred: B") == ParsedAnswer("ok", "second")


def test_a_quoted_verdict_that_agrees_does_no_harm():
    assert read("The summary says\nPreferred: B\nwhich I do not follow.\nPreferred: B") == ParsedAnswer(
        "ok", "second"
    )


def test_ties_only_where_they_are_allowed():
    for text, form in (("Preferred: **Tie**", "text"), ('{"comparison": "", "preferred": "tie"}', "json")):
        assert read(text, form) == ParsedAnswer("ok", "tie")
        assert read(text, form, ties=False).status == "malformed"


def test_json_in_a_fence_and_with_more_keys_is_read():
    assert read('```json\n{"comparison": "x", "preferred": "B"}\n```', "json") == ParsedAnswer("ok", "second")
    assert read('{"preferred": "B", "confidence": 3}', "json") == ParsedAnswer("ok", "second")


@pytest.mark.parametrize(
    "text",
    [
        '{"comparison": "x", "preferred": "A"} {"preferred": "B"}',
        '{"preferred": "A", "preferred": "B"}',
        '{"comparison": "x"}',
        '{"preferred": ["A"]}',
        '["A"]',
        "Preferred: A",
        '{"preferred": "A"',
        "null",
    ],
)
def test_json_that_is_no_verdict_is_malformed(text):
    assert read(text, "json").status == "malformed"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot compare these.",
        "Sorry, no.",
        "I'm unable to judge this.",
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_refusal_in_words_is_a_refusal(text, form):
    assert read(text, form).status == "refused"


def test_a_polite_verdict_is_a_verdict():
    assert read("I'm sorry to say that both are weak.\nPreferred: B") == ParsedAnswer("ok", "second")


def test_the_apis_own_signs_come_first():
    assert read("Preferred: A", refusal="no").status == "refused"
    assert read("Preferred: A", finish_reason="content_filter").status == "refused"
    assert read("Preferred: A", finish_reason="length").status == "truncated"
    assert read(None).status == "malformed"
