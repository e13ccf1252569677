"""Special tokens in texts: their places, and whether they are markup or spelled out."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"Start and end of characters in a text."
MarkedPrompt = tuple[str, tuple[Span, ...]]
"A prompt, and where special tokens in it are ordinary text. Two of the same text may differ in tokens."


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the special tokens and their ids: all that are never ordinary text, with or without a role."""
    added = tokenizer.added_tokens_decoder.items()
    with_role = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token.content: i for i, token in added if token.special} | dict(with_role)


def find_special(text: str, tokens: Collection[str], start: int = 0) -> tuple[int, str | None]:
    """Return the place of the first of `tokens` in a text, and the longest token there.

    Without one it is (len(text), None).
    """
    matches = [(place, token) for token in tokens if token and (place := text.find(token, start)) >= 0]
    return min(matches, key=lambda item: (item[0], -len(item[1])), default=(len(text), None))
