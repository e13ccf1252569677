"""Compare vocabularies: a tokenizer with an embedding, and a second model's tokenizer with the policy's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.config import ConfigError
from drpo.models.model_folder import check_present, read_config
from drpo.models.tokenizer import load_tokenizer, read_tokenizer


def check_embedded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError when the tokenizer has ids that the model does not embed; its pad token is never fed."""
    vocabulary = tokenizer.get_vocab()
    token = max((token for token in vocabulary if token != tokenizer.pad_token), key=vocabulary.__getitem__)
    size = model.get_input_embeddings().weight.shape[0]
    if vocabulary[token] >= size:
        raise ConfigError(
            f"model.tokenizer: token {token!r} has id {vocabulary[token]}, but the model embeds {size} ids; "
            "use the tokenizer that the model was trained with"
        )


def check_own_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str, key: str) -> None:
    """Raise ConfigError when `tokenizer`, from model.tokenizer, has other tokens than that of the model at `path`.

    Only ids that both have are compared, without added tokens: reserved ones may be renamed, new ones get new ids. A
    model without a tokenizer is accepted.
    """
    try:
        model_tokenizer = read_tokenizer(path, key)
    except ConfigError:
        return
    tokens, model_tokens = (
        {i: token for token, i in each.get_vocab().items() if token not in each.added_tokens_encoder}
        for each in (tokenizer, model_tokenizer)
    )
    different = sorted(i for i in tokens.keys() & model_tokens.keys() if tokens[i] != model_tokens[i])
    if different:
        first = different[0]
        raise ConfigError(
            f"model.tokenizer: it is not the vocabulary of {path!r} ({key}): {len(different)} ids are other tokens "
            f"there, the first {first}, {tokens[first]!r} here and {model_tokens[first]!r} there, so the model would "
            "read and write nonsense; set model.tokenizer to null for the model's own, or to one made from it"
        )


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str, key: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model at `path`, which gets token ids of `tokenizer`, the policy's.

    Raises ConfigError, naming `key`, when there is no model, its ids are other tokens, or it has no tokenizer to
    compare. Pad tokens may differ.
    """
    try:
        other = load_tokenizer(path, key)
    except ConfigError as error:
        check_present(path, key)
        reason = str(error).removeprefix(f"{key}: ")
        raise ConfigError(
            f"{key}: its tokenizer must be there too, to hold it against the policy's: {reason}"
        ) from None
    padding = {tokenizer.pad_token, other.pad_token}
    ids, other_ids = (
        {token: i for token, i in each.get_vocab().items() if token not in padding}
        for each in (tokenizer, other)
    )
    if different := {token for token, _ in ids.items() ^ other_ids.items()}:
        token = min(different, key=lambda token: ids.get(token, len(ids)))
        raise ConfigError(
            f"{key}: {path!r} was trained on another vocabulary than the policy's ({len(different)} tokens differ: "
            f"{token!r} is {other_ids.get(token, 'unknown')} there and {ids.get(token, 'unknown')} here), so it would "
            "read nonsense; choose one of the policy's family"
        )
    return other


def check_same_texts(tokenizer: PreTrainedTokenizerBase, path: str, key: str, chat: bool) -> None:
    """Run `check_same_vocabulary`, and raise ConfigError too when texts are delimited differently.

    That is, they begin or end with other tokens, or (`chat`) are rendered by another chat template, which determines
    where they end.
    """
    other = check_same_vocabulary(tokenizer, path, key)
    for name in ("bos_token",) if chat else ("bos_token", "eos_token"):
        if getattr(tokenizer, name) != getattr(other, name):
            raise ConfigError(
                f"{key}: the {name} of {path!r} is {getattr(other, name)!r}, and the policy's is "
                f"{getattr(tokenizer, name)!r}: it was trained on texts that begin or end otherwise; set the same "
                f"{name} in its tokenizer_config.json, or choose another model"
            )
    if chat and tokenizer.chat_template != other.chat_template:
        raise ConfigError(
            f"{key}: the chat template of {path!r} is {'missing' if other.chat_template is None else 'another'}, so it "
            "was trained on texts rendered otherwise; choose a model that was trained with the policy's tokenizer, or "
            "save that tokenizer beside it if it was"
        )


def check_trained_alike(path: str, key: str, chat: bool, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming `key`, unless the reward model at `path` was trained on the policy's text format.

    Its config records whether its texts went through the chat template, and with which arguments.
    """
    trained = read_config(path, key)
    for name, value in (("chat_template", chat), ("chat_template_kwargs", dict(arguments))):
        if trained.get("chat_template") is not None and trained[name] != value:
            raise ConfigError(
                f"{key}: {path!r} was trained with data.{name}={trained[name]}, and the policy's prompts are made with "
                f"{value}: give both the same"
            )
