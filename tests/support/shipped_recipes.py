"""The shipped recipes by name: their stage, loaded, compared."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from drpo.config import load_recipe
from drpo.run.folder import flatten
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.sft import SFTRecipe
from launch.agreement import AgreementRecipe
from launch.command_line import find_recipe
from launch.compare import CompareRecipe
from launch.complete import CompleteRecipe
from launch.evaluate_reward_model import EvaluateRewardModelRecipe
from launch.experiments.gpu_check import GpuCheckRecipe
from launch.experiments.memory_plan import MemoryPlanRecipe
from launch.experiments.overoptimisation import OverOptimisationRecipe
from launch.experiments.preference import PreferenceExperimentRecipe
from launch.experiments.resets import ResetsRecipe
from launch.experiments.reward_models import RewardModelsRecipe
from launch.experiments.rollout_speed import RolloutSpeedRecipe
from launch.experiments.smollm import SmolLMExperimentRecipe
from launch.experiments.speed import SpeedRecipe
from launch.experiments.trunk_speed import TrunkSpeedRecipe
from launch.import_labels import ImportLabelsRecipe
from launch.judge import JudgeRecipe
from launch.label import LabelRecipe
from launch.neuron_shift import NeuronShiftRecipe
from reward_models.train import RewardModelRecipe

STAGES: dict[str, type] = {
    "sft": SFTRecipe,
    "reward_model": RewardModelRecipe,
    "ppo": OnlineRecipe,
    "drpo": OnlineRecipe,
    **dict.fromkeys(("dpo", "cdpo", "odpo", "ipo", "simpo", "orpo", "kto"), PreferenceRecipe),
    **dict.fromkeys(
        ("rloo", "grpo", "reinforce_pp", "ppo_pp", "vineppo", "vapo", "bread", "uft", "rrpo"),
        OnlineRecipe,
    ),
    **dict.fromkeys(("prefix_rft", "prefix_rl"), OnlineRecipe),
    "reset_experiment": ResetsRecipe,
    "reset_methods": ResetsRecipe,
    "overoptimisation": OverOptimisationRecipe,
    "reward_models": RewardModelsRecipe,
    "preference_experiment": PreferenceExperimentRecipe,
    "neuron_shift": NeuronShiftRecipe,
    "judge": JudgeRecipe,
    "complete": CompleteRecipe,
    "compare": CompareRecipe,
    "label": LabelRecipe,
    "import_labels": ImportLabelsRecipe,
    "evaluate_reward_model": EvaluateRewardModelRecipe,
    "agreement": AgreementRecipe,
    "benchmark": SpeedRecipe,
    "trunk_speed": TrunkSpeedRecipe,
    "rollout_speed": RolloutSpeedRecipe,
    "memory_plan": MemoryPlanRecipe,
    "gpu_check": GpuCheckRecipe,
    "seeds": SmolLMExperimentRecipe,
}

SIZES = ("1b", "2.8b", "6.9b")

TASKS = ("tldr", "hh")


def stage_of(name: str) -> str:
    """The stage in the file name of a recipe: tldr/drpo_2.8b.yaml is a drpo recipe, tldr/dr_dpo_2.8b.yaml a dpo one.

    Of stages that lie in each other it is the longest: evaluate_reward_model, not reward_model. drpo_rloo holds two of
    one kind.
    """
    found = [stage for stage in STAGES if re.search(rf"(^|_){stage}(_|$)", Path(name).stem)]
    longest = max(found, key=len, default="")
    is_one = bool(found) and all(stage in longest or STAGES[stage] is STAGES[longest] for stage in found)
    assert is_one, f"the name of {name} must hold one stage of {', '.join(STAGES)}"
    return longest


@functools.cache
def loaded(name: str, *overrides: str) -> Any:
    return load_recipe(STAGES[stage_of(name)], find_recipe(name), overrides)


def differing(name: str, other: str) -> set[str]:
    """The keys in which two recipes differ; those of a section that only one has among them."""
    one, two = flatten(loaded(name)), flatten(loaded(other))
    return {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
