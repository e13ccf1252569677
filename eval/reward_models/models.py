"""The models of an evaluation as reward functions, with the facts that identify them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from drpo.config import ConfigError, key, names_keys
from drpo.data.stop import with_stop_token
from drpo.engine import Engine
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.tokenizer import load_tokenizer
from drpo.models.vocabulary import check_same_vocabulary
from drpo.rewards import RewardFn
from eval.completions.sample import weights_sha256
from eval.reward_models.recipe import EvaluateRewardModelRecipe, ScoredModel
from reward_models.implicit import ImplicitReward
from reward_models.score import RewardModelScorer


@dataclass(frozen=True)
class LoadedModel:
    """A model that scores completions in tokens of `tokenizer`, or of the policy that it was loaded for."""

    label: str
    key: str
    "Its key in the recipe, for errors."
    score: RewardFn
    modules: tuple[nn.Module, ...]
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]


@names_keys
def load_scored_model(
    model: ScoredModel,
    recipe: EvaluateRewardModelRecipe,
    engine: Engine,
    policy_path: str | None = None,
) -> LoadedModel:
    """Load a reward model, or a policy and its reference.

    `policy_path` names the policy whose tokens it scores; None for those of its own tokenizer. Raises ConfigError,
    naming the key, for a model that cannot be read, or cannot read these tokens or conversations.
    """
    if model.reference is not None:
        return _implicit(model, recipe, engine, policy_path)
    scorer = RewardModelScorer.load(
        model.path, engine, recipe.batch_size, recipe.dtype, policy_path or model.path, key("path")
    )
    scorer.check_reads(recipe.data.chat_template)
    config = scorer.model.config
    facts = {
        "kind": "reward model",
        "path": model.path,
        "weights_sha256": weights_sha256(scorer.model),
        **{name: getattr(config, name) for name in ("aggregation", "centre", "scale")},
    }
    tokenizer = with_stop_token(scorer.tokenizer, recipe.data)
    return LoadedModel(model.label, key("path"), scorer, (scorer.model,), tokenizer, facts)


def _implicit(
    model: ScoredModel, recipe: EvaluateRewardModelRecipe, engine: Engine, policy_path: str | None
) -> LoadedModel:
    tokenizer = load_tokenizer(model.path, key("path"))
    check_same_vocabulary(tokenizer, model.reference, key("reference"))
    if policy_path is not None:
        check_same_vocabulary(tokenizer, policy_path, "best_of_n.policy")
    tokenizer = with_stop_token(tokenizer, recipe.data)
    modules = []
    for name, path in (("path", model.path), ("reference", model.reference)):
        loaded = load_policy(ModelConfig(path=path, dtype=recipe.dtype), tokenizer, key=key(name))
        modules.append(engine.place(loaded, as_trained=False))
    policy, reference = modules
    hashes = [weights_sha256(module) for module in modules]
    if hashes[0] == hashes[1]:
        raise ConfigError(
            f"{key('reference')}: it has the weights of {key('path')}, so that every implicit reward is 0; name the "
            "policy that training began from"
        )
    score = ImplicitReward(policy, reference, tokenizer, engine, recipe.batch_size, model.beta)
    facts = {
        "kind": "implicit rewards",
        "path": model.path,
        "weights_sha256": hashes[0],
        "reference": model.reference,
        "reference_sha256": hashes[1],
        "beta": model.beta,
    }
    return LoadedModel(model.label, key("path"), score, tuple(modules), tokenizer, facts)
