"""Small tokenizers of the kinds that matter for encoding, trained on a few sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "I can help you with that. I cannot help you with that!\n\nHuman: why not?\n\nAssistant: because",
    "SUBREDDIT: r/advice\n\nTITLE: my room mate\n\nPOST: He never washes the dishes.\n\nTL;DR: dishes, again",
    "The sky is blue, the grass is green; naïve café owners said “hello” in 2024.",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
SPECIAL = ["<|endoftext|>", "[PAD]", "<s>", "<|im_start|>", "<|im_end|>"]


def byte_level(
    texts: Iterable[str] = SENTENCES,
    vocab_size: int = 500,
    bos: bool = False,
    eos: bool = False,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-NeoX and Llama 3 have; it adds `<s>` before and `<|endoftext|>` after a text
    on demand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> " * bos + "$A" + " <|endoftext|>" * eos,
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "<|endoftext|>")],
        )
    return _wrap(tokenizer, chat_template)


def single_bytes(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte: a text's length in tokens grows with every character."""
    return byte_level(texts=(), vocab_size=len(SPECIAL) + 256, bos=bos)


def sentencepiece(newlines: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: a space is put before every text, and unknown characters become bytes; with
    `newlines` it has tokens of several, and of newlines with what follows them."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    texts = [sentence if newlines else sentence.replace("\n", " ") for sentence in SENTENCES]
    learner.train_from_iterator([*texts, "a\n\nb\nc\n\n\nd" * newlines], trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in learned["merges"]],
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(tokenizer, None)


def _wrap(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", pad_token="[PAD]"
    )
    wrapped.chat_template = chat_template
    return wrapped


def with_markup(chat_template: str) -> PreTrainedTokenizerFast:
    """Bytes in words of Qwen's and Llama's kind, and whatever a chat template writes in angle brackets as a token."""
    words = r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "[PAD]", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, "\n\n\n\n. \n\n.\n\n \n .\n"] * 3, trainer)
    markup = sorted(set(re.findall(r"\[gMASK\]|<[^<>\s'\"{}]+>|<｜[^<>]+｜>", chat_template)))
    tokenizer.add_special_tokens([token for token in markup if "think" not in token])
    tokenizer.add_tokens([token for token in markup if "think" in token])
    return _wrap(tokenizer, chat_template)
