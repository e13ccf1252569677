"""Separate a reasoning model's answer from its chain of thought.

Servers with a reasoning parser return the chain of thought in its own field. Others leave it in the text: complete,
without its opening marker (if the chat template wrote that into the prompt), or without its end (if the model ran out
of tokens).
"""

from __future__ import annotations

import re

_TAGS = "think|thinking|thought|reasoning|seed:think"
"""<think>: DeepSeek R1, Qwen3, QwQ, GLM 4.5, Kimi K2 Thinking, MiniMax M2, Nemotron, OLMo 3, SmolLM3, Phi 4. <thought>:
Gemini, EXAONE. <seed:think>: Seed-OSS. <thinking>, <reasoning>: models prompted for them."""

_BEGINS = re.compile(
    rf"^[ \t]*(?:(?i:<(?:{_TAGS})>)"
    r"|\[THINK\]"  # Magistral
    r"|◁think▷"  # Kimi VL
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)"  # gpt-oss
    r"|<\|channel>thought|<unused94>"  # Gemma 4, MedGemma
    r"|<\|START_THINKING\|>"  # Command A Reasoning
    r"|<\|begin_of_thought\|>|<\|inner_prefix\|>)"  # OpenThinker, Apertus
    r"|\A\s*(?:(?:assistant)?(?:analysis|commentary)(?=[A-Z])|Here(?:'s| is) my thought process:)",  # gpt-oss, Granite
    re.MULTILINE,
)
_ENDS = re.compile(
    rf"(?i:</(?:{_TAGS})>)"
    r"|\[/THINK\]"
    r"|◁/think▷"
    r"|<\|channel\|>\s*final[^<\n]*(?:<\|constrain\|>[^<\n]*)?<\|message\|>"
    r"|assistantfinal"  # gpt-oss, decoded without special tokens
    r"|<channel\|>|<unused95>"
    r"|<\|END_THINKING\|>"
    r"|<\|end_of_thought\|>|<\|inner_suffix\|>"
    r"|^Here(?:'s| is) my response:",  # Granite 3.2
    re.MULTILINE,
)
_WRAPPERS = re.compile(
    r"\A\s*(?:<answer>|<response>|<\|START_RESPONSE\|>|<\|begin_of_solution\|>|<\|begin_of_box\|>)"
    r"|(?<!\s)(?:\s*(?:</answer>|</response>|<\|END_RESPONSE\|>|<\|end_of_solution\|>|<\|end_of_box\|>|<\|return\|>|<\|end\|>))+\s*\Z"
)
"""Markers around the answer itself: Hunyuan, ERNIE, Command A, OpenThinker, GLM-V, gpt-oss. The lookbehind makes the
search start once per run of whitespace: from each of its characters, it would take quadratic time."""


def after_thoughts(text: str) -> str | None:
    """Return the text after the last closing marker, None if a chain of thought is not closed.

    A closing marker needs no opening one. Text before it is never read: a verdict there is a draft.
    """
    start = 0
    for end in _ENDS.finditer(text):
        start = end.end()
    answer = text[start:]
    if _BEGINS.search(answer):
        return None
    return _WRAPPERS.sub("", answer).strip()
