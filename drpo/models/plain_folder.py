"""Adapt a model folder for plain transformers: left padding with a token that the model embeds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNLIMITED = int(1e9)
"transformers writes 1e30 for a tokenizer that knows no limit."


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Copy the tokenizer, padding on the left with a token that the model embeds, up to its positions.

    A "[PAD]" that `load_tokenizer` added beyond the embedding is never an input here, but would be an index error in
    plain transformers. The copy pads with the stop token instead, which the attention mask hides; `load_tokenizer` adds
    "[PAD]" again.
    """
    plain = copy.deepcopy(tokenizer)
    num_embedded = model.get_input_embeddings().weight.shape[0]
    if plain.pad_token_id >= num_embedded:
        pad_token, plain.pad_token = plain.pad_token, plain.eos_token
        _forget_token(plain, pad_token)
    plain.padding_side = "left"
    config = getattr(model, "backbone", model).config.get_text_config()
    num_positions = getattr(config, "max_position_embeddings", None)
    if num_positions is not None and plain.model_max_length > UNLIMITED:
        plain.model_max_length = num_positions
    return plain


def _forget_token(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Remove an added token from a tokenizer, which has no method for it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] != token]
    state["padding"] = None
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def mend_generation_config(model: PreTrainedModel) -> None:
    """Make the model's generation_config valid for saving: transformers loads some that it refuses to save.

    Folders of earlier versions (Llama 2 Chat) set a temperature without the implied `do_sample`.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def amend_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, if it exists."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, **values}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
