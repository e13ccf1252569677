"""Conversations through the tokenizer's chat template: one prompt text, and the response texts that follow
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from drpo.data.records import DataError, RowError, require_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
PROBE = "(response)"


def is_conversation(value: object) -> bool:
    """Whether `value` is a non-empty list of messages, {"role": ..., "content": ...} each."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def split_conversation(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The messages before the last one, and the text of the last, which must be the assistant's."""
    if messages[-1]["role"] != "assistant":
        raise RowError("no assistant turn", f"the last message is by {messages[-1]['role']!r}")
    return list(messages[:-1]), require_text(messages[-1].get("content"), "the assistant's message")


class ChatTemplate:
    """Renders prompts and responses so that prompt + response is the template's text of the whole
    conversation, up to where the response ends: the template's own end-of-turn marker is left out, since a
    stop token is added when a response is encoded. Raises DataError if the tokenizer has no template or one
    that cannot be used."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise DataError("data.chat_template=true, but the tokenizer has no chat template")
        try:
            question = [{"role": "user", "content": "(prompt)"}]
            following = self._following(self._prompt(question), question, PROBE)
        except RowError as error:
            raise DataError(f"the tokenizer's chat template cannot be used: {error.detail}") from None
        if PROBE not in following:
            raise DataError("the tokenizer's chat template does not render the assistant's message")
        self._closing = following.rpartition(PROBE)[2]

    def render(self, messages: Sequence[Message], responses: Sequence[str]) -> tuple[str, list[str]]:
        """The prompt as text and, for each response, the text that follows it.

        Raises RowError when the prompt does not end with a message to answer, and when the template refuses
        the conversation, renders its prompt otherwise once a response follows, or leaves no response text.
        """
        for message in messages:
            if not isinstance(message.get("content"), str):
                raise RowError("wrong type", f"the content of a {message['role']!r} message is not text")
        if not messages or messages[-1]["role"] == "assistant":
            raise RowError("missing field", "the conversation has no message to answer")
        prompt = self._prompt(messages)
        texts = []
        for response in responses:
            following = self._following(prompt, messages, response)
            if not following.endswith(self._closing):
                raise RowError("chat template", "it ends this response in another way than others")
            texts.append(following.removesuffix(self._closing))
        return prompt, texts

    def _prompt(self, messages: Sequence[Message]) -> str:
        return self._apply(list(messages), add_generation_prompt=True)

    def _following(self, prompt: str, messages: Sequence[Message], response: str) -> str:
        text = self._apply(
            [*messages, {"role": "assistant", "content": response}], add_generation_prompt=False
        )
        if not text.startswith(prompt):
            raise RowError("chat template", "it renders the prompt otherwise when a response follows")
        return text[len(prompt) :]

    def _apply(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise RowError("chat template", str(error)) from None
