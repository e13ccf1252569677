"""The RewardFn of a recipe's `reward` section: one source of scores, an ensemble, or a weighted sum of parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from drpo.config import ConfigError, key, names_keys
from drpo.engine import Engine
from drpo.reward_functions import identities_of, import_function, with_located_errors
from drpo.rewards import RewardFn, WaitingRewardFn
from drpo.trainers.online_recipe import RewardConfig
from drpo.trainers.reward_parts import EnsembleConfig, RewardPart
from reward_models.joint import ensemble, weighted_sum
from reward_models.score import RewardModelScorer
from reward_models.serving.client import remote_reward
from reward_models.text_rewards import FormatReward, num_tokens, relative_length
from reward_models.units import check_units


def reward_from(
    config: RewardConfig, engine: Engine, tokenizer_path: str, chat_template: bool = False
) -> RewardFn:
    """Return the RewardFn that a recipe's `reward` section names.

    `tokenizer_path` is the policy's tokenizer; with `chat_template` the prompts are conversations, which a reward
    model must be able to read.
    """
    if config.url is not None:
        return remote_reward(config, engine, tokenizer_path, chat_template)
    return _source(config, _Loader(config, engine, tokenizer_path, chat_template))


@dataclass(frozen=True)
class _Loader:
    """How the reward models of a section are loaded."""

    config: RewardConfig
    engine: Engine
    tokenizer_path: str
    chat_template: bool

    def __call__(self, path: str, place: str) -> RewardModelScorer:
        config = self.config
        settings = (self.engine, config.batch_size, config.dtype, self.tokenizer_path, place, config.offload)
        scorer = RewardModelScorer.load(path, *settings)
        scorer.check_reads(self.chat_template)
        return scorer


@names_keys
def _source(config: RewardConfig | RewardPart, load: _Loader) -> RewardFn:
    match config.kind:
        case "path":
            return load(config.path, key("path"))
        case "ensemble":
            return _ensemble(config.ensemble, load)
        case "function":
            return _function(config, load.engine)
        case "parts":
            parts = {part.name: _source(part, load) for part in config.parts}
            return weighted_sum(parts, {part.name: part.weight for part in config.parts})
        case "length":
            return num_tokens if config.length == "tokens" else relative_length
        case "format":
            return FormatReward(config.format)
    raise ConfigError(
        "nothing scores the rollouts: give reward.path (a reward model), reward.ensemble (several of them), "
        "reward.parts (a weighted sum), reward.url (a server) or reward.function"
    )


def _function(config: RewardConfig | RewardPart, engine: Engine) -> RewardFn:
    function = import_function(config.function, key("function"))
    where = f"{key('function')}={config.function!r}"
    if isinstance(config, RewardConfig):
        identities_of(function, where)  # that it can be read
        return function
    if config.recipe is not None:
        try:
            function = function(config.recipe)
        except TypeError as error:
            raise ConfigError(f"{where} cannot be called with {key('recipe')} alone: {error}") from error
        if not callable(function):
            raise ConfigError(f"{where} returned {function!r} for {key('recipe')}, which scores nothing")
    identities_of(function, where)
    if isinstance(function, WaitingRewardFn):
        engine.check_wait(function.wait_minutes, key("recipe"))
    return with_located_errors(function, where, _settings_identity(config.recipe))


def _settings_identity(path: str | None) -> str | None:
    """Return what identifies the settings file of a function that has no identity of its own; None without a file."""
    if path is None or not Path(path).is_file():
        return None
    return (
        f"a function with the settings {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]} in {path}"
    )


@names_keys
def _ensemble(config: EnsembleConfig, load: _Loader) -> RewardFn:
    scorers = [load(path, f"{key('paths')}[{index}]") for index, path in enumerate(config.paths)]
    configs = [scorer.model.config for scorer in scorers]
    check_units(configs, config.paths, config.combine, key("paths"))
    return ensemble(scorers, config)
