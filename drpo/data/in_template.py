"""Existing texts in another model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drpo.data.chat import ChatTemplate
from drpo.data.dialogue import parse_prompt
from drpo.data.encode import encode_prompts, encode_responses
from drpo.data.records import DataError, Message, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_in_template(
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatTemplate,
    prompt: str,
    response: str,
    ended: bool,
    messages: Sequence[Message] | None = None,
) -> tuple[list[int], list[int]]:
    """Encode a prompt and a response to it in the template's markup.

    Raises DataError when the template refuses the turns.

    Args:
        tokenizer: the tokenizer of the template.
        chat: the template.
        prompt: the prompt as text.
        response: taken as it is, without the changes that the template would make.
        ended: whether the stop token follows the response.
        messages: the turns of the prompt; None for those that its text contains (`parse_prompt`).
    """
    turns = parse_prompt(prompt) if messages is None else list(messages)
    try:
        text, _, rendered = chat.convert(turns, [], prompt)
    except RowError as error:
        raise DataError(f"a chat template refuses the prompt {prompt[:60]!r}: {error}") from None
    (query_ids,) = encode_prompts(tokenizer, [(text, rendered.literal)])
    (response_ids,) = encode_responses(tokenizer, [chat.opening + response], chat.opening)
    return query_ids, response_ids if ended else response_ids[:-1]
