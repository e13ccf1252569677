"""Train tokenizers on the data, or load them; the pad token is never the stop token."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drpo.config import ConfigError
from drpo.models.gguf import UNREADABLE, location, reading
from drpo.models.model_folder import check_folder, is_local

STOP_TOKEN = "<|endoftext|>"
PAD_TOKEN = "[PAD]"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
SMALLEST_VOCABULARY = 256 + 2
"""Every byte, the stop token and the pad token."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`; any text survives encoding and decoding unchanged.

    At most `vocab_size` tokens, among them every byte, the stop token "<|endoftext|>" and "[PAD]". Raises
    ValueError below 258.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[STOP_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def load_tokenizer(path: str | Path, key: str = "model.tokenizer") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, hub id or GGUF file, with "[PAD]" added if its pad token is none or the stop.

    The id of an added token may lie outside the model's embedding: pad ids are never inputs of a model. Raises
    ConfigError, naming the `key` of the recipe, when there is no tokenizer at `path` or it has no stop (eos) token.
    """
    tokenizer = read_tokenizer(str(path), key)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{key}: the tokenizer at {str(path)!r} has no eos token, so a response has no end; set one and save it"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def read_tokenizer(path: str, key: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder, hub id or GGUF file as it is; raise ConfigError, naming `key`, without one."""
    source, gguf = location(path, key, unless=("config.json", *TOKENIZER_FILES))
    if gguf:
        with reading(Path(source, gguf["gguf_file"]), key, "a tokenizer from "):
            return AutoTokenizer.from_pretrained(source, **gguf)
    if is_local(path):
        check_folder(path, key, TOKENIZER_FILES)
    try:
        return AutoTokenizer.from_pretrained(source)
    except UNREADABLE as error:
        raise ConfigError(f"{key}: cannot load a tokenizer from {path!r}: {error}") from error
