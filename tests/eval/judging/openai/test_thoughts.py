"""Chains of thought of all model families (markers from chat templates and the parsers of vLLM and SGLang)."""

from __future__ import annotations

import json

import pytest

from eval.judging.openai.answer import Answer
from eval.judging.openai.pairwise import PROMPTS
from eval.judging.openai.thoughts import after_thoughts

DRAFT = "Preferred: A\nNo, the other one says more.\nPreferred: A"
MARKERS = {
    "deepseek, qwen": ("<think>\n", "\n</think>\n\n"),
    "asked for": ("<thinking>", "</thinking>"),
    "gemini, exaone": ("<thought>\n", "</thought>\n"),
    "seed": ("<seed:think>", "</seed:think>"),
    "magistral": ("[THINK]", "[/THINK]"),
    "kimi": ("◁think▷", "◁/think▷"),
    "gpt-oss": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "gpt-oss, JSON": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>",
    ),
    "gpt-oss, bare": ("analysis", "assistantfinal"),
    "gemma": ("<|channel>thought\n", "<channel|>"),
    "command": ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    "openthinker": ("<|begin_of_thought|>", "<|end_of_thought|>\n<|begin_of_solution|>"),
    "apertus": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "granite": ("Here is my thought process:\n", "\nHere is my response:\n"),
}
ENDINGS = ["", "<|return|>", "<|END_RESPONSE|>", "</answer>\n", "<|end|><|return|>"]


def read(text: str, form: str = "text"):
    return PROMPTS["tldr-1"].parse(Answer(text), form, True)


@pytest.mark.parametrize(("begin", "end"), MARKERS.values(), ids=MARKERS)
def test_only_text_after_the_thoughts_is_read(begin, end):
    for answer in ("Preferred: B", "B", "Comparison: The second says more.\nPreferred: **B**"):
        for ending in ENDINGS:
            assert read(f"{begin}{DRAFT}{end}{answer}{ending}").slot == "second"
    verdict = json.dumps({"comparison": "x", "preferred": "B"})
    assert read(f'{begin}{{"preferred": "A"}}? No.{end}{verdict}', "json").slot == "second"
    assert after_thoughts(f"{begin}{DRAFT}{end}") == ""
    assert read(f"{begin}{DRAFT}{end}").detail == "thoughts and no answer"


@pytest.mark.parametrize(("begin", "end"), MARKERS.values(), ids=MARKERS)
def test_closing_marker_needs_no_opening_one(begin, end):
    """Some chat templates write the opening marker into the prompt."""
    assert read(f"{DRAFT}{end}Preferred: B").slot == "second"
    assert read(f"{DRAFT}{end}B").slot == "second"


@pytest.mark.parametrize(("begin", "end"), MARKERS.values(), ids=MARKERS)
def test_unclosed_thoughts_contain_no_verdict(begin, end):
    """Truncated by a server that reports finish_reason stop."""
    for text in (f"{begin}Well.\n{DRAFT}", f"{begin}one{end}\n{begin}Two.\n{DRAFT}"):
        assert after_thoughts(text) is None
        assert (read(text).status, read(text).detail) == ("malformed", "thoughts without an end")
        assert read(text, "json").status == "malformed"


def test_interleaved_thoughts_and_quoted_markers():
    assert read("<think>a</think>Hm.\n<think>Preferred: A</think>\nPreferred: B").slot == "second"
    assert read('<think>It says "</think>\nPreferred: A", a trick.\n</think>\nPreferred: B').slot == "second"


def test_answer_without_thoughts_is_unchanged():
    plain = "Comparison: The first is an analysis, its tag <think> is odd.\nPreferred: A"
    assert after_thoughts(f" {plain}\n") == plain and read(plain).slot == "first"
    assert read("analysis of both: fine\nPreferred: A").slot == "first"


@pytest.mark.parametrize("fence", ["", "```json\n"])
def test_markers_inside_json_are_quotes(fence):
    answer = json.dumps({"comparison": "A ends with </think> and\n<think>, odd.", "preferred": "B"})
    assert read(f"{fence}{answer}{fence and chr(10) + '```'}", "json").slot == "second"
