"""What stands for a prompt that is too long: its truncation, or the reason to leave it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from drpo.data.encode import query_counter, truncate_left
from drpo.data.markup import MarkedPrompt, Span
from drpo.data.records import RowError
from drpo.data.tasks.tldr import truncate_query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["refuse", "left", "paragraph"]


def shorten_prompts(
    queries: Mapping[MarkedPrompt, list[int]],
    max_length: int | None,
    truncation: Truncation,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[MarkedPrompt, MarkedPrompt | RowError]:
    """For each prompt of more than `max_length` tokens its truncation, or the RowError; `queries` holds the
    ids by prompt."""
    if max_length is None:
        return {}
    num_tokens = query_counter(tokenizer)
    shortened: dict[MarkedPrompt, MarkedPrompt | RowError] = {}
    for prompt, ids in queries.items():
        if len(ids) <= max_length:
            continue
        try:
            if truncation == "refuse":
                raise RowError("prompt too long", f"{len(ids)} tokens, data.max_prompt_length={max_length}")
            shortened[prompt] = _shorten(prompt, max_length, truncation, num_tokens)
        except RowError as error:
            shortened[prompt] = error
    return shortened


def _shorten(
    prompt: MarkedPrompt,
    max_length: int,
    truncation: Truncation,
    num_tokens: Callable[[str, Sequence[Span]], int],
) -> MarkedPrompt:
    text, literal = prompt

    def left(shorter: str) -> tuple[Span, ...]:
        """Those of the places that a text has still: it is the same until one ends."""
        return tuple(span for span in literal if text[: span[1]] == shorter[: span[1]])

    def length(shorter: str) -> int:
        return num_tokens(shorter, left(shorter))

    cut = truncate_left if truncation == "left" else truncate_query
    shorter = cut(text, length, max_length)
    return shorter, left(shorter)
