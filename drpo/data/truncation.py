"""What stands for a prompt that is too long: its truncation, or the reason to leave it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from drpo.data.encode import query_counter, truncate_left
from drpo.data.records import RowError
from drpo.data.tldr import truncate_query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["refuse", "left", "paragraph"]


def shorten_prompts(
    queries: Mapping[str, list[int]],
    max_length: int | None,
    truncation: Truncation,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, str | RowError]:
    """For each prompt of more than `max_length` tokens its truncation, or the RowError; `queries` holds the
    ids by prompt."""
    if max_length is None:
        return {}
    num_tokens = query_counter(tokenizer)
    shortened: dict[str, str | RowError] = {}
    for prompt, ids in queries.items():
        if len(ids) <= max_length:
            continue
        try:
            match truncation:
                case "refuse":
                    raise RowError(
                        "prompt too long", f"{len(ids)} tokens, data.max_prompt_length={max_length}"
                    )
                case "left":
                    shortened[prompt] = truncate_left(prompt, num_tokens, max_length)
                case "paragraph":
                    shortened[prompt] = truncate_query(prompt, num_tokens, max_length)
        except RowError as error:
            shortened[prompt] = error
    return shortened
