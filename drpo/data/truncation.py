"""Truncate prompts that are too long, or reject them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from drpo.config import key
from drpo.data.encode import query_counter
from drpo.data.markup import MarkedPrompt, Span
from drpo.data.records import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["refuse", "left", "paragraph"]
Cut = Callable[[str, Callable[[str], int], int], str]
"Shorten a text to a number of tokens, given the function that counts them; RowError if nothing of it fits."


def shorten_prompts(
    queries: Mapping[MarkedPrompt, list[int]],
    max_length: int | None,
    cut: Cut | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[MarkedPrompt, MarkedPrompt | RowError]:
    """Return, for each prompt of more than `max_length` tokens, its truncation or a RowError.

    `queries` contains the ids by prompt; `cut` shortens a text, None refuses every long prompt.
    """
    if max_length is None:
        return {}
    num_tokens = query_counter(tokenizer)
    shortened: dict[MarkedPrompt, MarkedPrompt | RowError] = {}
    for prompt, ids in queries.items():
        if len(ids) <= max_length:
            continue
        try:
            if cut is None:
                raise RowError(
                    "prompt too long", f"{len(ids)} tokens, {key('max_prompt_length')}={max_length}"
                )
            shortened[prompt] = _shorten(prompt, max_length, cut, num_tokens)
        except RowError as error:
            shortened[prompt] = error
    return shortened


def _shorten(
    prompt: MarkedPrompt,
    max_length: int,
    cut: Cut,
    num_tokens: Callable[[str, Sequence[Span]], int],
) -> MarkedPrompt:
    text, literal = prompt

    def left(shorter: str) -> tuple[Span, ...]:
        """Return those of the places that are still in a text, which is the same until one ends."""
        return tuple(span for span in literal if text[: span[1]] == shorter[: span[1]])

    def length(shorter: str) -> int:
        return num_tokens(shorter, left(shorter))

    shorter = cut(text, length, max_length)
    return shorter, left(shorter)
