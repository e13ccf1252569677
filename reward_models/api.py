"""Train a reward model from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from drpo.api import Model, Records
from drpo.engine import engine_of
from drpo.object_inputs import with_inputs
from drpo.run.folder import Callback
from reward_models.train import RewardModelRecipe, train


def train_reward_model(
    recipe: RewardModelRecipe,
    *,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    records: Records | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train a reward model on preference pairs, and return its folder.

    Arguments and errors are those of `drpo.train_online`.
    """
    with engine_of(recipe) as engine:
        return train(with_inputs(recipe, engine, model, tokenizer, records), engine, callbacks)
