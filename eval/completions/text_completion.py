"""A response as a reward function is given it where only texts are known."""

from __future__ import annotations

from collections.abc import Sequence

from drpo.data.records import Chat, Message, Record
from drpo.rewards import Completion


def text_completion(
    prompt: str, response: str, ended: bool, reference: str | None, messages: Sequence[Message] | None
) -> Completion:
    """A completion without token ids: whoever wrote the response, they are not known here.

    `messages` are the turns that policies were shown for the prompt. A model with a chat template reads these, since
    it learned on prompts made in this way; None leaves it what the text of the prompt holds.
    """
    chat = None if messages is None else Chat(tuple(messages), prompt)
    return Completion(prompt, response, ended, [], [], Record(prompt, completion=reference, chat=chat))
