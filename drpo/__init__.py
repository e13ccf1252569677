"""DR-PO and its baselines: online RLHF on accelerate, with rollouts that may start in a dataset response.

    import drpo
    recipe = drpo.OnlineRecipe(run_dir="runs/mine", num_steps=200, rollout={"batch_size": 64})
    drpo.train_online(recipe, model=model, tokenizer=tokenizer, records=rows, reward=reward)

docs/python.md is a tour. Everything listed here is imported on first use.
"""

from drpo.contents import lazy

_CONTENTS = {
    # train
    "train_online": "drpo.api",
    "train_preference": "drpo.api",
    "train_sft": "drpo.api",
    "train_reward_model": "reward_models.api",
    "graceful_shutdown": "drpo.run.signals",
    # recipes
    "load_recipe": "drpo.config",
    "ConfigError": "drpo.config",
    "OnlineRecipe": "drpo.trainers.online_recipe",
    "PreferenceRecipe": "drpo.trainers.preference.recipe",
    "SFTRecipe": "drpo.trainers.sft",
    "RewardModelRecipe": "reward_models.train",
    # input of reward functions
    "Completion": "drpo.rewards",
    "RewardFn": "drpo.rewards",
    "Record": "drpo.data.records",
    # maths
    "gae": "drpo.advantages",
    "rloo": "drpo.advantages",
    "grpo": "drpo.advantages",
    "rewards_to_go": "drpo.advantages",
    "vine": "drpo.advantages",
    "kl_estimate": "drpo.kl",
    "ppo_policy_loss": "drpo.losses",
    "ppo_value_loss": "drpo.losses",
    "dpo_loss": "drpo.preference_losses",
    "dr_dpo_loss": "drpo.preference_losses",
    "kto_loss": "drpo.preference_losses",
}

__all__ = list(_CONTENTS)
__getattr__ = lazy("drpo", _CONTENTS)


def __dir__() -> list[str]:
    return __all__
