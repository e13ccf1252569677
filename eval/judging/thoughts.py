"""Where a model's thoughts end and its answer begins, in a text that holds both.

A server that knows its model sends the thoughts apart. One that does not leaves them in the text: whole, or without
their opening marker where the chat template wrote it, or without an end where the model ran out of tokens.
"""

from __future__ import annotations

import re

_TAGS = "think|thinking|thought|reasoning|seed:think"
"""<think>: DeepSeek R1, Qwen3, QwQ, GLM 4.5, Kimi K2 Thinking, MiniMax M2, Nemotron, OLMo 3, SmolLM3, Phi 4. <thought>:
Gemini, EXAONE. <seed:think>: Seed-OSS. <thinking>, <reasoning>: models that were asked for them."""

_BEGINS = re.compile(
    rf"^[ \t]*(?:(?i:<(?:{_TAGS})>)"
    r"|\[THINK\]"  # Magistral
    r"|◁think▷"  # Kimi VL
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)"  # gpt-oss
    r"|<\|channel>thought|<unused94>"  # Gemma 4, MedGemma
    r"|<\|START_THINKING\|>"  # Command A Reasoning
    r"|<\|begin_of_thought\|>|<\|inner_prefix\|>)"  # OpenThinker, Apertus
    r"|\A\s*(?:(?:assistant)?(?:analysis|commentary)(?=[A-Z])|Here(?:'s| is) my thought process:)",  # below
    re.MULTILINE,
)
_ENDS = re.compile(
    rf"(?i:</(?:{_TAGS})>)"
    r"|\[/THINK\]"
    r"|◁/think▷"
    r"|<\|channel\|>\s*final[^<\n]*(?:<\|constrain\|>[^<\n]*)?<\|message\|>"
    r"|assistantfinal"  # gpt-oss, its special tokens left out
    r"|<channel\|>|<unused95>"
    r"|<\|END_THINKING\|>"
    r"|<\|end_of_thought\|>|<\|inner_suffix\|>"
    r"|^Here(?:'s| is) my response:",  # Granite 3.2
    re.MULTILINE,
)
_WRAPPERS = re.compile(
    r"\A\s*(?:<answer>|<response>|<\|START_RESPONSE\|>|<\|begin_of_solution\|>|<\|begin_of_box\|>)"
    r"|(?:\s*(?:</answer>|</response>|<\|END_RESPONSE\|>|<\|end_of_solution\|>|<\|end_of_box\|>|<\|return\|>|<\|end\|>))+\s*\Z"
)
"What Hunyuan, ERNIE, Command A, OpenThinker, GLM-V and gpt-oss put around the answer itself."


def after_thoughts(text: str) -> str | None:
    """The answer: what follows the last end of a thought. None where thoughts have begun that do not end.

    A marker of an end needs no beginning. What stands before it is never looked at: a verdict there is a draft.
    """
    start = 0
    for end in _ENDS.finditer(text):
        start = end.end()
    answer = text[start:]
    if _BEGINS.search(answer):
        return None
    return _WRAPPERS.sub("", answer).strip()
