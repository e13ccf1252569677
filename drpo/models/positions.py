"""Limits on the number of tokens: the length of a position table, or the trained range of rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from drpo.config import ConfigError
from drpo.data.encode import Example
from drpo.models.answers import answer

TABLE_NAMES = ("embed_positions", "pos_encoding")
"What transformers calls tables of positions that are no nn.Embedding (GPT-J, CodeGen, CTRL)."


def position_limit(model: nn.Module) -> int | None:
    """Return the longest text in tokens that the model's table of positions allows, or None without a table.

    GPT-2, GPT-Neo, OPT and BioGPT learn such a table, GPT-J and CTRL compute one. Rotary and ALiBi models have none.
    """
    return answer(model, "positions", lambda: _find_limit(model))


def _find_limit(model: nn.Module) -> int | None:
    limits = []
    for name, module in model.named_modules():
        last_name = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in last_name or last_name == "wpe"):
            # OPT's first two rows are unused.
            limits.append(module.num_embeddings - getattr(module, "offset", 0))
        buffers = module.named_buffers(recurse=False)
        limits += [len(table) for table_name, table in buffers if table_name in TABLE_NAMES]
        config = getattr(module, "config", None)
        if getattr(config, "model_type", None) == "mpt":  # its ALiBi biases are made for this many
            limits.append(config.max_seq_len)
    return min(limits, default=None)


def check_width(model: nn.Module, attention_mask: Tensor) -> None:
    """Raise ConfigError when a row of a batch (B, T) has more tokens than the model has positions."""
    limit = position_limit(model)
    if limit is None or attention_mask.shape[-1] <= limit:
        return
    longest = int(attention_mask.sum(dim=-1).max())
    if longest > limit:
        raise ConfigError(
            f"a text has {longest} tokens, but {type(model).__name__} has {limit} positions; set "
            "data.max_prompt_length and the limit of the response so that both together fit"
        )


def check_lengths(model: nn.Module, lengths: Sequence[int], name: str, remedy: str) -> list[str]:
    """Raise ConfigError when texts of these `lengths` have more tokens than the model has positions.

    Rotary positions have no end: texts beyond `max_position_embeddings` of the config give a warning, which is
    returned. `name` is that of the model or its key.
    """
    config = getattr(model, "backbone", model).config.get_text_config()
    limit = position_limit(model)
    end = getattr(config, "max_position_embeddings", None) if limit is None else limit
    longer = [length for length in lengths if end is not None and length > end]
    if not longer:
        return []
    message = (
        f"{name}: {len(longer)} of {len(lengths)} texts are longer than the {end} positions of this "
        f"{config.model_type} model, the longest has {max(longer)} tokens; {remedy}"
    )
    if limit is None:
        return [f"warning: {message}"]
    raise ConfigError(message)


def check_examples(model: nn.Module, examples: Sequence[Example], name: str = "model.path") -> list[str]:
    """Apply `check_lengths` to all examples, each with the longest of its responses."""
    lengths = [len(example.query_ids) + max(map(len, _responses(example)), default=0) for example in examples]
    remedy = "set data.max_prompt_length and data.max_response_length to sizes that fit together"
    return check_lengths(model, lengths, name, remedy)


def check_sampling(
    model: nn.Module, examples: Sequence[Example], max_response_length: int, name: str, key: str
) -> list[str]:
    """Apply `check_lengths` to all prompts with a response of `max_response_length` tokens.

    Args:
        model: the model that samples or scores.
        examples: their prompts are checked.
        max_response_length: tokens of the response.
        name: that of the model or its key, for errors.
        key: recipe key that sets `max_response_length`, for errors.
    """
    lengths = [len(example.query_ids) + max_response_length for example in examples]
    remedy = f"set data.max_prompt_length, or lower {key}={max_response_length}"
    return check_lengths(model, lengths, name, remedy)


def _responses(example: Example) -> list[list[int]]:
    single = (example.completion_ids, example.chosen_ids, example.rejected_ids)
    return [*(ids for ids in single if ids is not None), *example.ranked_ids]
