"""Ends of a policy's responses: the eos ids of its generation_config and the stop token of its tokenizer."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from drpo.config import ConfigError
from drpo.models.inputs import unwrap_peft


def stop_ids(policy: nn.Module) -> tuple[int, ...]:
    """Return the eos ids of the policy's generation_config.json or GGUF file.

    There are none if it has only its config's defaults, which may be those of another tokenizer.
    """
    config = getattr(unwrap_peft(policy), "generation_config", None)
    if config is None or getattr(config, "_from_model_config", False) or config.eos_token_id is None:
        return ()
    ids = config.eos_token_id
    return tuple(dict.fromkeys(ids if isinstance(ids, list | tuple) else [ids]))


def check_stop_token(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError when the tokenizer's stop token is not one that the policy generates.

    SFT may teach another one. A policy that is compared with a reference, or rewarded for its samples, would be
    trained on a token that it never generates.
    """
    ids = stop_ids(policy)
    if ids and tokenizer.eos_token_id not in ids:
        tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
        raise ConfigError(
            f"this policy ends its responses with {' or '.join(map(repr, tokens))} (eos_token_id in its "
            f"generation_config.json or GGUF file), but the data's would end with {tokenizer.eos_token!r}: set "
            f"data.stop_token to {tokens[0]!r} or data.chat_template to what the policy was trained with, or teach it "
            "the other one by SFT"
        )


def write_stop_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the stop token first among the eos ids of the model's generation_config, if it has one.

    Plain `generate` then stops there.
    """
    config = getattr(model, "generation_config", None)
    if config is None or tokenizer.eos_token_id is None:
        return
    ids = list(dict.fromkeys([tokenizer.eos_token_id, *stop_ids(model)]))
    config.eos_token_id = ids[0] if len(ids) == 1 else ids
    config._from_model_config = False
