"""Hashes that show whether two models, vocabularies or chat templates are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from reward_models.model import RewardModel

OF_NO_SCORE = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "score_normalised",
)
"Keys of a config that name where a model was, what wrote it, and how its score came to be."


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all tokens with their ids: equal for tokenizers whose ids mean the same."""
    return _sha256(json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of a tokenizer's chat template, None without one."""
    return _sha256(json.dumps(tokenizer.chat_template)) if tokenizer.chat_template else None


def model_id(model: RewardModel, tokenizer: PreTrainedTokenizerBase, precision: str) -> str:
    """Return the SHA-256 of all that the scores depend on: weights, config with zero and unit, tokenizer, precision.

    The same model has it on every machine and after every restart.
    """
    digest = hashlib.sha256()
    texts = _rules(tokenizer), tokenizer.eos_token, template_hash(tokenizer)
    digest.update(json.dumps([precision, _of_score(model.config.to_dict()), *texts], default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def joint_id(members: Sequence[str], combine: str, coef: float) -> str:
    """Return the SHA-256 of an ensemble: the ids of its members in order, and how their scores become one."""
    return _sha256(json.dumps([combine, coef, *members]))


def common_hash(values: Sequence[Any]) -> Any:
    """Return the value that all members have, or else a SHA-256 that stands for all of theirs and equals none."""
    return values[0] if all(value == values[0] for value in values) else _sha256(json.dumps(values))


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return how a tokenizer cuts texts, as JSON; its vocabulary where it is not a fast one."""
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else vocabulary_hash(tokenizer)


def _of_score(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _of_score(value) for name, value in sorted(config.items()) if name not in OF_NO_SCORE}
    return config


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
