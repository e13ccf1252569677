"""The token that ends a response: one for all stages, and the tokenizer's eos token from here on."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from drpo.config import key, names_keys
from drpo.data.chat import ChatTemplate
from drpo.data.records import DataError
from drpo.data.template_arguments import check_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drpo.data.load import DataConfig


def template_of(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return the tokenizer's chat template as the data asks for it; None for data without one.

    Raises DataError for a template that cannot be used, or does not read an argument that it is given.
    """
    if not config.chat_template:
        return None
    check_arguments(tokenizer, config.chat_template_kwargs)
    return ChatTemplate(tokenizer, config.chat_template_kwargs, config.stop_token)


@names_keys
def with_stop_token(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the stop token of responses as its eos token: a copy if its eos token has to change.

    It is `data.stop_token`; without one the end of turn of the chat template, or the tokenizer's own. Encoding,
    sampling, scoring and saving with this tokenizer then agree. Raises DataError for a token that the tokenizer
    does not have, or pads with.
    """
    token = config.stop_token
    if token is not None and token not in tokenizer.get_vocab():
        raise DataError(f"{key('stop_token')}: {token!r} is not a single token of this tokenizer")
    if token is None and (chat := template_of(config, tokenizer)) is not None:
        token = chat.stop_token
    if token in (None, tokenizer.eos_token):
        return tokenizer
    if token == tokenizer.pad_token:
        if config.stop_token is not None:
            raise DataError(
                f"{key('stop_token')}: {token!r} is the padding token, which is never sampled; name another token"
            )
        raise DataError(
            f"the tokenizer's chat template ends a turn with {token!r}, which is its padding token and so never "
            "sampled: take pad_token out of its tokenizer_config.json, and another is added to pad with; or name "
            f"another token that ends a response as {key('stop_token')}"
        )
    return ending_with(tokenizer, token)


def ending_with(tokenizer: PreTrainedTokenizerBase, token: str) -> PreTrainedTokenizerBase:
    """Copy the tokenizer, with `token` as its eos token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = token
    return tokenizer
