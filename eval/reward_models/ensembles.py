"""All models of an evaluation as one: what ensembles score, and what they gain over their members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from drpo.data.encode import Example
from drpo.models.model_folder import read_config
from drpo.trainers.reward_parts import CombineConfig
from eval.reward_models.measure import measure_pairs, plain
from eval.reward_models.pairs import ScoredPairs
from eval.reward_models.recipe import EvaluateRewardModelRecipe, ensemble_label
from eval.statistics.score_summary import accuracy_gain
from reward_models.ensembles import combine
from reward_models.model import RewardModelConfig
from reward_models.units import check_units


def check_ensembles(recipe: EvaluateRewardModelRecipe) -> None:
    """Raise ConfigError for ensembles of reward models whose scores cannot be compared."""
    if not recipe.ensembles or recipe.models[0].reference is not None:
        return
    configs, paths = [], [model.path for model in recipe.models]
    for index, path in enumerate(paths):
        saved = read_config(path, f"models[{index}].path")
        names = ("centre", "scale", "score_normalised")
        configs.append(RewardModelConfig(**{name: saved[name] for name in names if name in saved}))
    for ensemble in recipe.ensembles:
        check_units(configs, paths, ensemble.combine, "models")


def measure_ensembles(
    recipe: EvaluateRewardModelRecipe, examples: Sequence[Example], scored: Mapping[str, ScoredPairs]
) -> list[dict[str, Any]]:
    """Measure every ensemble of the recipe as `measure_pairs` does a model, with its gain over the members' mean."""
    members = {label: pairs.margins for label, pairs in scored.items()}
    results = []
    for ensemble in recipe.ensembles:
        pairs = combined_pairs(list(scored.values()), ensemble)
        gain = accuracy_gain(pairs.margins, members, pairs.prompt_ids, recipe.confidence)
        measured = measure_pairs(recipe, examples, pairs)
        results.append({"name": ensemble_label(ensemble), "gain": plain(gain), **measured})
    return results


def combined_pairs(members: Sequence[ScoredPairs], ensemble: CombineConfig) -> ScoredPairs:
    """Combine the members' scores of both responses of each pair; lengths are in the first member's tokens."""

    def combined(name: str) -> np.ndarray:
        scores = torch.from_numpy(np.stack([getattr(pairs, name) for pairs in members]))
        return combine(scores, ensemble.combine, ensemble.coef).double().numpy()

    return replace(members[0], chosen=combined("chosen"), rejected=combined("rejected"))
