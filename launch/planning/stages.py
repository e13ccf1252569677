"""The training commands and their recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.sft import SFTRecipe
from reward_models.train import RewardModelRecipe


class Stage(NamedTuple):
    """A training command: the class of its recipes, and overrides that it always takes."""

    recipe: type
    forced: Sequence[str] = ()


STAGES = {
    "sft": Stage(SFTRecipe),
    "reward-model": Stage(RewardModelRecipe),
    "drpo": Stage(OnlineRecipe),
    "ppo": Stage(OnlineRecipe, ("reset.proportion=0",)),
    "dpo": Stage(PreferenceRecipe),
}
