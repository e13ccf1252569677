"""The arguments of a chat template: names that it reads, so that a misspelt one is refused."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables

from drpo.config import key
from drpo.data.records import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"What transformers' apply_chat_template takes for itself, or DRPO fills in."
FUNCTIONS = {"raise_exception", "strftime_now"}
"What transformers gives every template."
GENERATION = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")
"Tags of transformers' own around what the model writes; they read nothing."


def check_arguments(tokenizer: PreTrainedTokenizerBase, names: Collection[str]) -> None:
    """Raise DataError for an argument that the tokenizer's chat template does not read, and so would do nothing."""
    if not names:
        return
    try:
        read = template_variables(tokenizer.get_chat_template())
    except (ValueError, TemplateError):  # none, or a broken one: ChatTemplate reports it
        return
    if unread := sorted(set(names) - read):
        raise DataError(
            f"{key('chat_template_kwargs')}.{unread[0]}: the tokenizer's chat template does not read it, so it would "
            f"do nothing; the template reads {', '.join(sorted(read)) or 'no arguments'}"
        )


def template_variables(template: str) -> set[str]:
    """Return the names that a template reads, except those that it sets or is always given."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    parsed = environment.parse(GENERATION.sub("", template))
    return find_undeclared_variables(parsed) - RESERVED - FUNCTIONS
