"""Conversations in the tokenizer's chat template: one prompt text, and the response texts that follow it."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from drpo.config import key
from drpo.data.dialogue import dialogue
from drpo.data.markup import Span, find_special, special_tokens
from drpo.data.records import Chat, DataError, Message, RowError, require_encodable, require_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, REPLY = "(prompt)", "(response)"
SHOWN = 60
THINKING_SWITCHES = ("enable_thinking", "thinking")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "tool_calls")
"Keys of a reply that its text does not hold."


def is_conversation(value: object) -> bool:
    """Return whether `value` is a non-empty list of messages, {"role": ..., "content": ...} each."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def require_messages(values: Sequence[object], field: str) -> list[Message]:
    """Return the values as messages, without keys whose value is None; RowError for one without a role."""
    for number, message in enumerate(values, start=1):
        where = f"message {number} of {field}"
        if not isinstance(message, Mapping):
            raise RowError(
                "wrong type", f"{where} is {type(message).__name__}, not an object with role and content"
            )
        require_text(message.get("role"), f"role in {where}")
    return without_none(values)


def without_none(messages: Sequence[Message]) -> list[Message]:
    """Drop the keys of messages whose value is None.

    Columnar files give every message the keys of any.
    """
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def split_conversation(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """Split off the text of the last message, which must be the assistant's."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError("no assistant turn", f"the last message is by {last['role']!r}")
    if unread := [key for key in THOUGHTS if last.get(key)]:
        raise RowError(
            "unread field", f"the assistant's message has {unread[0]}; only its content is a response"
        )
    return list(messages[:-1]), require_text(last.get("content"), "the assistant's message")


class ChatTemplate:
    """The tokenizer's chat template, as renderer of prompts and responses.

    Prompt + response + stop token is the template's text of the whole conversation, up to the token that ends the
    assistant's turn. `arguments` are the template's own (enable_thinking: false). A template that renders no header
    for the assistant gets the one that it writes before a reply as the end of the prompt. Raises DataError, naming
    the property that is missing, if the tokenizer has no template or one that cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        stop_token: str | None = None,
    ) -> None:
        self._tokenizer, self._arguments, self._header = tokenizer, dict(arguments or {}), ""
        if not tokenizer.chat_template:
            raise DataError(f"{key('chat_template')}=true, but the tokenizer has no chat template")
        self._special = special_tokens(tokenizer)
        question = {"role": "user", "content": QUESTION}
        try:
            prompt = self._prompt([question])
            following = self._following(prompt, [question], REPLY)
            bare = self._apply([question], add_generation_prompt=False)
        except RowError as error:
            detail = f"{error.detail}. {self._remedy()}"
            raise DataError(f"the tokenizer's chat template cannot be used: {detail}") from None
        if QUESTION not in prompt or REPLY not in following:
            role = "user" if QUESTION not in prompt else "assistant"
            raise DataError(
                f"the tokenizer's chat template does not render the {role}'s message, a text; templates of "
                "models that see images want lists of parts. Give the tokenizer a template for texts"
            )
        self.opening, _, self._closing = following.rpartition(REPLY)
        if bare == prompt and self.opening.strip():
            # The header is not the model's to write; a space before the reply belongs to its first word.
            self._header = self.opening.rstrip(" ")
            self.opening = self.opening[len(self._header) :]
        self.stop_token, self._tail = self._end_of_turn(question, stop_token)

    def render(self, messages: Sequence[Message], responses: Sequence[str]) -> tuple[str, list[str]]:
        """Render the prompt as text and, for each response, the text that follows it up to the stop token.

        Raises RowError when a message has no role or no text, when the prompt does not end with a message to
        answer, and when the template refuses the conversation, renders its prompt otherwise once a response
        follows, or changes the response.
        """
        for message in messages:
            role, content = require_text(message.get("role"), "role in a message"), message.get("content")
            if not isinstance(content, str):
                raise RowError("wrong type", f"the content of a {role!r} message is not text")
            require_encodable(content, f"the content of a {role!r} message")
        if not messages or messages[-1]["role"] == "assistant":
            raise RowError("missing field", "the conversation has no message to answer")
        prompt = self._prompt(messages)
        return prompt, [self._response(prompt, messages, response) for response in responses]

    def convert(
        self, messages: Sequence[Message], responses: Sequence[str], source: str | None
    ) -> tuple[str, list[str], Chat]:
        """Render a conversation, and return also what a record keeps of it.

        `source` is the prompt as the data has it; None for the messages as a dialogue.
        """
        prompt, texts = self.render(messages, responses)
        source = dialogue(messages) if source is None else source
        turns = tuple(without_none(messages))
        return prompt, texts, Chat(turns, source, self.opening, self._spelled(turns), self._arguments)

    def _response(self, prompt: str, messages: Sequence[Message], response: str) -> str:
        following = self._following(prompt, messages, response)
        if not following.endswith(self._closing):
            raise RowError("chat template", "it ends this response in another way than others")
        body = following.removesuffix(self._closing)
        reply = response if body.endswith(response) else response.strip()
        # A thought that the prompt has begun is part of a response that has it whole.
        if not (prompt + body).endswith(reply):
            raise RowError(
                "chat template", f"it leaves out or rearranges a part of the response {response[:SHOWN]!r}"
            )
        opening = body[: max(len(body) - len(reply), 0)]
        if opening.strip() and opening != self.opening:
            raise RowError(
                "chat template", f"it opens this response with {opening!r}, others with {self.opening!r}"
            )
        return body + self._tail

    def _end_of_turn(self, question: Message, stop_token: str | None) -> tuple[str | None, str]:
        """Return the token that ends the assistant's turn, and the text between reply and token.

        It is `stop_token` if given; else the first special token after a final reply; else the one before the next user
        turn; else None.
        """
        place, token = find_special(self._closing, self._special)
        if token is not None and stop_token in (None, token):
            return token, self._closing[:place]
        if stop_token is None and self._closing.strip():
            raise DataError(
                f"the tokenizer's chat template ends a reply with {self._closing!r}, which holds no special token of "
                "this tokenizer, so nothing tells the model to stop: take the tokenizer that the template is made "
                f"for, or name the token that is to end a response as {key('stop_token')}"
            )
        return self._next_turn(question) if stop_token is None else stop_token, ""

    def _next_turn(self, question: Message) -> str | None:
        reply = {"role": "assistant", "content": REPLY}
        try:
            text = self._apply([question, reply, question], add_generation_prompt=False)
        except RowError:
            return None
        place, token = find_special(text.rpartition(REPLY)[2].lstrip(), self._special)
        return token if place == 0 and token != self._tokenizer.bos_token else None

    def _spelled(self, messages: Sequence[Message]) -> tuple[Span, ...]:
        """Find special tokens that messages spell out, which are ordinary text: their places in the prompt."""
        if not any(find_special(message["content"], self._special)[1] for message in messages):
            return ()
        stand_ins = {token: chr(0xF0000 + number) for number, token in enumerate(sorted(self._special))}
        masked_messages = []
        for message in messages:
            content = message["content"]
            for token in sorted(self._special, key=len, reverse=True):
                content = content.replace(token, stand_ins[token])
            masked_messages.append({**message, "content": content})
        tokens = {stand_in: token for token, stand_in in stand_ins.items()}
        text, spans = "", []
        for character in self._prompt(masked_messages):
            if character in tokens:
                spans.append((len(text), len(text) + len(tokens[character])))
            text += tokens.get(character, character)
        if text != self._prompt(messages):
            raise RowError("chat template", "it reads special tokens that a message spells out")
        return tuple(spans)

    def _prompt(self, messages: Sequence[Message]) -> str:
        return self._apply(messages, add_generation_prompt=True) + self._header

    def _following(self, prompt: str, messages: Sequence[Message], response: str) -> str:
        text = self._apply(
            [*messages, {"role": "assistant", "content": response}], add_generation_prompt=False
        )
        if not text.startswith(prompt):
            place = len(os.path.commonprefix([prompt, text]))
            raise RowError(
                "chat template",
                f"it renders the prompt otherwise when a response follows: {prompt[place:][:SHOWN]!r} becomes "
                f"{text[place:][:SHOWN]!r}, so no training text is what the model sees when it answers",
            )
        return text[len(prompt) :]

    def _remedy(self) -> str:
        """Return the argument that makes the template usable, or a note that there is none."""
        for name in THINKING_SWITCHES:
            if name not in self._arguments:
                try:
                    ChatTemplate(self._tokenizer, {**self._arguments, name: False})
                except DataError:
                    continue
                return f"{key('chat_template_kwargs')}={{{name}: false}} makes it usable"
        return "Give the tokenizer another template"

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                without_none(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._arguments,
            )
        except TemplateError as error:
            raise RowError("chat template", str(error)) from None
        except Exception as error:  # a template is a program, and may fail in any way
            raise RowError("chat template", f"{type(error).__name__}: {error}") from None
        require_encodable(text, "what the chat template makes of the messages")
        return text
