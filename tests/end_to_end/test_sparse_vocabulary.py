"""Tokenizers whose ids have holes."""

from __future__ import annotations

import json

from tiny_models import ARCHITECTURES
from tiny_tokenizers import single_bytes
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from drpo.models.loading import ModelConfig, load_policy
from drpo.models.tokenizer import load_tokenizer
from drpo.rollout.generator import vocabulary_of


def test_ids_may_have_holes_as_in_the_vocabularies_of_tiktoken(tmp_path):
    """Special tokens stand behind ids that no token has: those are never sampled, these are."""
    saved = json.loads(single_bytes()._tokenizer.to_str())
    moved = {"<|endoftext|>": 270, "<s>": 263, "<|im_start|>": 280, "<|im_end|>": 299}
    kept = [token for token in saved["model"]["vocab"] if token not in (*moved, "[PAD]")]
    saved["model"]["vocab"] = {token: i for i, token in enumerate(kept)} | moved
    saved["added_tokens"] = [
        {**token, "id": moved[token["content"]]}
        for token in saved["added_tokens"]
        if token["content"] in moved
    ]
    sparse = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)), eos_token="<|endoftext|>"
    )
    sparse.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == 300 and len(loaded) == 261
    vocabulary = vocabulary_of(loaded, 384, [299])
    assert vocabulary.stop_ids == (270, 299)
    holes = set(range(256, 300)) - set(moved.values())
    assert set(vocabulary.suppressed_ids) == holes | set(range(300, 384))
    fresh = load_policy(
        ModelConfig(architecture={"model_type": "llama", **ARCHITECTURES["llama"]}, vocab_size=300), loaded
    )
    assert fresh.config.vocab_size == 301
