"""What launch/drpo.py and launch/ppo.py share: from a recipe to a trained policy."""

from __future__ import annotations

from pathlib import Path

from drpo.engine import Engine
from drpo.reward_functions import import_functions
from drpo.trainers.online import train
from drpo.trainers.online_recipe import OnlineRecipe
from launch.demo_inputs import make_demo_inputs
from reward_models.score import reward_from


def run(recipe: OnlineRecipe) -> Path:
    """Make what the demo needs and lacks, load the reward, train."""
    make_demo_inputs(recipe.model.path, recipe.reward.path, recipe.critic.path)
    engine = Engine(recipe.engine, Path(recipe.run_dir), recipe.seed, recipe.optim.max_grad_norm)
    reward_fn = reward_from(recipe.reward, engine, recipe.tokenizer_path, recipe.data.chat_template)
    eval_rewards = import_functions(recipe.eval.reward_functions, "eval.reward_functions")
    return train(recipe, engine, reward_fn, eval_rewards)
