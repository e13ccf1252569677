"""Train from Python: a recipe, with model, data and reward as objects where the recipe names none.

Objects are written to `<run_dir>_inputs`, and the recipe then names these files: so a run on objects can be resumed,
repeated on several processes and read by the evaluator like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.config import ConfigError
from drpo.engine import Engine, engine_of
from drpo.object_inputs import with_inputs
from drpo.reward_functions import import_functions
from drpo.rewards import RewardFn
from drpo.run.folder import Callback
from drpo.trainers import online, sft
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.preference import train as preference
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.sft import SFTRecipe

Model = PreTrainedModel | str | Path
Records = Iterable[Mapping[str, Any]] | str | Path


def train_online(
    recipe: OnlineRecipe,
    *,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    records: Records | None = None,
    reward: RewardFn | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train a policy by DR-PO or PPO, and return the folder of the result.

    Args:
        recipe: every setting; the inputs below are refused where it names them too.
        model: a causal language model, or its folder or hub id. An object is not changed.
        tokenizer: the tokenizer of `model`; needed where that is an object.
        records: rows in TRL's conventions (prompt, completion, chosen, rejected, messages), or the path of a file.
        reward: a function of a list of `Completion`s that returns one number each.
        callbacks: called with step and metrics after every step.

    Raises ConfigError, DataError, CheckpointError and the errors of `drpo.trainers.online.train`.
    """
    with engine_of(recipe) as engine:
        recipe = with_inputs(recipe, engine, model, tokenizer, records)
        if reward is None:
            reward = _reward_of(recipe, engine)
        elif recipe.reward.kind is not None:
            raise ConfigError(
                f"reward is given, and the recipe's reward.{recipe.reward.kind} too: leave one out"
            )
        eval_rewards = import_functions(recipe.eval.reward_functions, "eval.reward_functions")
        return online.train(recipe, engine, reward, eval_rewards, callbacks)


def _reward_of(recipe: OnlineRecipe, engine: Engine) -> RewardFn:
    """Return the recipe's reward; only this function imports reward_models, a package above this one."""
    reward_from = import_module("reward_models.sources").reward_from
    return reward_from(recipe.reward, engine, recipe.tokenizer_path, recipe.data.chat_template)


def train_preference(
    recipe: PreferenceRecipe,
    *,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    records: Records | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train a policy on preferences, by DPO or another loss of its family, and return the folder of the result.

    Arguments and errors are those of `train_online`.
    """
    return _train_offline(preference.train, recipe, model, tokenizer, records, callbacks)


def train_sft(
    recipe: SFTRecipe,
    *,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    records: Records | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Fine-tune a policy on demonstrations, and return the folder of the result.

    Arguments and errors are those of `train_online`.
    """
    return _train_offline(sft.train, recipe, model, tokenizer, records, callbacks)


def _train_offline(
    train: Callable[..., Path],
    recipe: SFTRecipe | PreferenceRecipe,
    model: Model | None,
    tokenizer: PreTrainedTokenizerBase | None,
    records: Records | None,
    callbacks: Sequence[Callback],
) -> Path:
    with engine_of(recipe) as engine:
        recipe = with_inputs(recipe, engine, model, tokenizer, records)
        rewards = import_functions(recipe.sample.reward_functions, "sample.reward_functions")
        return train(recipe, engine, rewards, callbacks)
