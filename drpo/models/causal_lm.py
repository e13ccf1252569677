"""Load causal language models from a folder, the hub or a GGUF file, or make them with fresh weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from drpo.config import ConfigError
from drpo.models.attention import attention_errors
from drpo.models.gguf import dense_weights, location, reading
from drpo.models.model_folder import check_complete, is_causal_lm, kind_of, read_config

if TYPE_CHECKING:
    from drpo.models.loading import ModelConfig


def read_causal_lm(config: ModelConfig, key: str) -> PreTrainedModel:
    """Read the model at `config.path`; raise ConfigError, naming `key`, if it is missing or incomplete."""
    saved = read_config(config.path, key)
    if not is_causal_lm(saved.get("model_type"), saved.get("architectures")):
        raise ConfigError(
            f"{key}: {config.path!r} holds {kind_of(saved)}; a decoder-only causal language model is needed"
        )
    options: dict[str, Any] = {"dtype": config.dtype}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    source, gguf = location(config.path, key)
    file, errors = Path(source, *gguf.values()), nullcontext()
    if gguf:
        options |= gguf | dense_weights(file, saved, key)
        errors = reading(file, key)
    with errors, attention_errors(config.attn_implementation):
        model, info = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
    check_complete(info, config.path, key)
    if gguf:  # its config holds all generation settings, and counts as a generation_config.json
        model.generation_config._from_model_config = False
    return model


def fresh_causal_lm(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Make a model by `config.architecture` with random weights; raise ConfigError unless it is a causal LM."""
    special = {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    architecture = AutoConfig.for_model(**{**special, **config.architecture})
    if not is_causal_lm(architecture.model_type, None):
        raise ConfigError(
            f"model.architecture.model_type: {architecture.model_type} is not a causal language model"
        )
    dtype = "float32" if config.dtype == "auto" else config.dtype
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    with torch.random.fork_rng(devices=[]), attention_errors(config.attn_implementation):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(architecture, **options)
