"""Every embedded recipe loads into its stage, and says what the papers say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from shipped_recipes import SIZES, STAGES, TASKS, differing, loaded, stage_of

from drpo.config import load_recipe, save_resolved
from drpo.config_help import help_text, options
from drpo.run.folder import flatten
from drpo.trainers.online_recipe import OnlineRecipe, RewardConfig
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.sft import SFTRecipe
from launch.command_line import RECIPES
from launch.demo_inputs import STAGES as DEMO_STAGES
from launch.experiments.preference import PreferenceExperimentRecipe
from reward_models.train import RewardModelRecipe

NAMES = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_strictly(name):
    assert isinstance(loaded(name), STAGES[stage_of(name)])


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_recipe_is_the_recipe(name, tmp_path):
    save_resolved(loaded(name), tmp_path / "config.yaml")
    assert load_recipe(STAGES[stage_of(name)], tmp_path / "config.yaml", []) == loaded(name)


PREFERENCE_STAGES = {"tldr": ("dpo", "dr_dpo", "odpo", "curry_dpo"), "hh": ("dpo", "dr_dpo")}


@pytest.mark.parametrize("task", TASKS)
def test_every_size_has_every_stage(task):
    for size in SIZES:
        for stage in ("sft", "reward_model", "ppo", "drpo", *PREFERENCE_STAGES[task]):
            assert f"{task}/{stage}_{size}.yaml" in NAMES


def test_no_two_recipes_share_a_run_folder():
    folders = [loaded(name).run_dir for name in NAMES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", SIZES)
def test_each_stage_starts_from_what_the_one_before_leaves(task, size):
    sft, reward_model, ppo, drpo, *preference = (
        loaded(f"{task}/{stage}_{size}.yaml")
        for stage in ("sft", "reward_model", "ppo", "drpo", *PREFERENCE_STAGES[task])
    )
    assert sft.run_dir == f"runs/{task}/sft_{size}"
    assert sft.model.path == f"EleutherAI/pythia-{size}-deduped"
    assert reward_model.model.path == f"{sft.run_dir}/policy"
    for online in (ppo, drpo):
        assert online.model.path == f"{sft.run_dir}/policy"
        assert online.critic.path == online.reward.path == f"{reward_model.run_dir}/reward_model"
    for recipe in preference:
        assert recipe.model.path == f"{sft.run_dir}/policy"
        assert recipe.reference.path is None  # the same policy


PPO_AND_DRPO = sorted(
    (name, name.replace("ppo", "drpo"))
    for name in NAMES
    if re.search(r"/(smoke_|tldr_|hh_)?ppo(_[\d.]+b)?\.yaml", name)
)


@pytest.mark.parametrize("ppo_name, drpo_name", PPO_AND_DRPO)
def test_ppo_is_drpo_without_resets(ppo_name, drpo_name):
    different = differing(ppo_name, drpo_name)
    assert {key for key in different if not key.startswith("reset.")} == {"run_dir"}
    assert loaded(ppo_name).reset.proportion == 0 < loaded(drpo_name).reset.proportion


TRAINED_ON_GPUS = [
    name for name in NAMES if re.search(r"_[\d.]+b\.yaml$", name) and stage_of(name) != "compare"
]


@pytest.mark.parametrize("name", TRAINED_ON_GPUS)
def test_gpu_recipes_divide_over_eight_processes(name):
    recipe = loaded(name)
    if isinstance(recipe, OnlineRecipe):
        assert recipe.rollout.batch_size // recipe.ppo.num_minibatches % 8 == 0
    else:
        assert recipe.batch.size % 8 == 0


@pytest.mark.parametrize("name", ["tldr/compare_1b.yaml", "tldr/compare_2.8b.yaml", "hh/compare_1b.yaml"])
def test_what_is_compared_is_what_the_recipes_leave(name):
    recipe, (task, size) = loaded(name), re.fullmatch(r"(\w+)/compare_(.*)\.yaml", name).groups()
    made = {
        f"runs/{task}/{stage}_{size}/policy" for stage in ("sft", "ppo", "drpo", *PREFERENCE_STAGES[task])
    }
    assert {policy for system in recipe.systems for policy in system.policies} <= made
    assert recipe.kl_reference == f"runs/{task}/sft_{size}/policy"
    assert recipe.reward_model == f"{loaded(f'{task}/reward_model_{size}.yaml').run_dir}/reward_model"
    complete = loaded(f"{task}/complete.yaml")
    for key in ("max_response_length", "sampling", "dtype"):
        assert getattr(recipe.complete, key) == getattr(complete, key)


def test_the_demo_ends_with_what_the_demo_made():
    recipe = loaded("demo/compare.yaml")
    policies = [policy for system in recipe.systems for policy in system.policies]
    assert policies == [f"{loaded(f'demo/{stage}.yaml').run_dir}/policy" for stage in ("sft", "ppo", "drpo")]
    assert all(Path(path) in DEMO_STAGES for path in (*policies, recipe.kl_reference, recipe.reward_model))


def test_what_smollm2_is_compared_on_is_what_its_recipes_leave():
    for task in TASKS:
        compared = loaded(f"smollm/{task}_compare.yaml")
        stages = [
            name
            for name in NAMES
            if name.startswith(f"smollm/{task}_") and stage_of(name) not in ("compare", "reward_models")
        ]
        folders = {loaded(name).run_dir for name in stages}
        policies = {policy for system in compared.systems for policy in system.policies}
        assert policies == {f"{folder}/policy" for folder in folders if "reward_model" not in folder}
        assert compared.kl_reference == f"runs/smollm/{task}_sft/policy"
        assert compared.reward_model == f"runs/smollm/{task}_reward_model/reward_model"
        for name in stages:
            recipe = loaded(name)
            assert (
                recipe.data.chat_template
                and recipe.data.eval_fraction == compared.complete.data.eval_fraction
            )
            assert recipe.data.max_prompt_length == compared.complete.data.max_prompt_length
            assert recipe.model.path == ("smollm2" if "_sft" in name else f"runs/smollm/{task}_sft/policy")
            assert recipe.model.trainable_layers == 4, "below them all stages share SmolLM2's own layers"


SIZES_OF_A_DEMO = {
    "run_dir",
    "title",
    "num_steps",
    "num_prompts",
    "num_examples",
    "num_references",
    "every",
    "samples_every",
    "size",
    "batch_size",
    "max_prompt_length",
}


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo", "drpo", "dpo"])
def test_the_real_demo_is_the_recipes_of_smollm2_in_small(stage):
    different = differing(f"demo_real/{stage}.yaml", f"smollm/tldr_{stage}.yaml")
    paths = {"model.path", "critic.path", "reward.path"}
    assert {key for key in different - paths if key.rpartition(".")[2] not in SIZES_OF_A_DEMO} == set()
    assert loaded(f"demo_real/{stage}.yaml").run_dir == f"runs/demo_real/{stage}"


def test_the_real_demo_ends_with_what_it_made():
    recipe = loaded("demo_real/compare.yaml")
    policies = [policy for system in recipe.systems for policy in system.policies]
    assert policies == [f"runs/demo_real/{stage}/policy" for stage in ("sft", "dpo", "ppo", "drpo")]
    for stage in ("sft", "reward_model", "ppo", "drpo", "dpo"):
        data = loaded(f"demo_real/{stage}.yaml").data
        for key in ("path", "eval_fraction", "split_seed", "max_prompt_length", "chat_template"):
            assert getattr(data, key) == getattr(recipe.complete.data, key)


def test_the_real_demo_evaluates_its_reward_model_on_the_pairs_it_was_not_trained_on():
    recipe, trained = (
        loaded(f"demo_real/{stage}.yaml") for stage in ("evaluate_reward_model", "reward_model")
    )
    assert recipe.data == trained.data and recipe.split == "eval"
    assert [model.path for model in recipe.models] == [f"{trained.run_dir}/reward_model"]
    assert recipe.run_dir == "runs/demo_real/evaluate_reward_model"


# --- published settings ---------------------------------------------------------------------------------


def test_drpo_on_tldr_has_the_settings_of_the_paper():
    """arXiv 2404.08495, Table 5, with the released code's temperature, episodes and reward whitening."""
    recipe = loaded("tldr/drpo_2.8b.yaml")
    assert recipe.reset.proportion == 1.0
    assert (recipe.reset.source, recipe.reset.length, recipe.reset.min_length) == ("reference", "uniform", 0)
    assert recipe.reset.masking == "paper"
    assert recipe.rollout.batch_size == 512
    assert recipe.num_steps == 1_000_000 // 512
    assert (recipe.ppo.num_epochs, recipe.ppo.num_minibatches) == (4, 1)
    assert (recipe.ppo.clip_range, recipe.ppo.value_clip_range, recipe.ppo.value_coef) == (0.2, 0.2, 0.1)
    assert (recipe.ppo.entropy_coef, recipe.ppo.target_kl) == (0.0, None)
    assert (recipe.advantage.gamma, recipe.advantage.lam) == (1.0, 0.95)
    assert recipe.advantage.whiten and recipe.advantage.whiten_rewards
    assert (recipe.kl.coef, recipe.kl.target_per_token, recipe.kl.estimator) == (0.05, None, "k1")
    assert (recipe.optim.learning_rate, recipe.optim.schedule) == (3e-6, "linear")
    assert (recipe.optim.warmup_steps, recipe.optim.eps) == (0, 1e-5)
    assert (recipe.optim.betas, recipe.optim.weight_decay) == ([0.9, 0.999], 0.01)
    assert recipe.critic.learning_rate is None
    assert (recipe.model.lora.r, recipe.model.lora.alpha) == (1024, 2048)
    sampling = recipe.rollout.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 0, 1.0)
    assert recipe.rollout.max_response_length == recipe.data.max_response_length == 53
    assert recipe.data.max_prompt_length == 512
    assert recipe.data.prompt_truncation == "paragraph"
    shaping = recipe.reward.shaping
    assert (shaping.missing_stop, shaping.missing_stop_penalty) == ("replace", 1.0)
    assert (shaping.normalise, shaping.clip, shaping.length_penalty) == ("none", None, 0.0)
    assert recipe.eval.temperature == 0.01


@pytest.mark.parametrize("size", SIZES)
def test_offline_stages_on_tldr_have_the_settings_of_n_plus(size):
    """Huang et al. 2024: lr 3e-6, cosine, one epoch; SFT 128 a batch on prompt and response, pairs 64 a batch."""
    sft, reward_model = loaded(f"tldr/sft_{size}.yaml"), loaded(f"tldr/reward_model_{size}.yaml")
    assert (sft.batch.size, sft.loss_on, sft.data.max_response_length) == (128, "all", 53)
    assert (reward_model.batch.size, reward_model.data.max_response_length) == (64, 169)
    assert reward_model.score.aggregation == "last" and reward_model.score.num_references > 0
    assert reward_model.references.path == sft.data.path  # the human summaries score 0
    for recipe in (sft, reward_model):
        assert (recipe.num_steps, recipe.batch.num_epochs) == (None, 1.0)
        assert (recipe.optim.learning_rate, recipe.optim.schedule, recipe.optim.eps) == (3e-6, "cosine", 1e-5)
        assert (recipe.optim.warmup_steps, recipe.optim.max_grad_norm) == (0, None)
        assert recipe.data.max_prompt_length == 512
        assert recipe.model.lora.r == 0


@pytest.mark.parametrize("size, optimizer_steps, rate", [("1b", 2500, 6e-6), ("6.9b", 6000, 8e-6)])
def test_online_stages_on_hh_have_the_settings_of_trlx(size, optimizer_steps, rate):
    recipe = loaded(f"hh/drpo_{size}.yaml")
    per_update = recipe.ppo.num_epochs * recipe.ppo.num_minibatches
    assert abs(recipe.num_steps * per_update - optimizer_steps) <= per_update
    assert recipe.rollout.batch_size == 8 * 64
    assert (recipe.optim.learning_rate, recipe.optim.schedule) == (rate, "constant")
    assert (recipe.optim.betas, recipe.optim.weight_decay) == ([0.9, 0.95], 1e-6)
    assert (recipe.kl.coef, recipe.kl.horizon) == (0.05, 10_000)
    assert recipe.kl.target_per_token == pytest.approx(6 / 128, abs=5e-4)  # 6 nats an episode of 128 tokens
    assert (recipe.ppo.value_coef, recipe.advantage.gamma, recipe.advantage.lam) == (1.0, 1.0, 0.95)
    assert (recipe.rollout.max_response_length, recipe.rollout.sampling.temperature) == (128, 1.0)
    assert (recipe.reward.shaping.normalise, recipe.reward.shaping.clip) == ("running", 10.0)


# --- the classes behind them ----------------------------------------------------------------------------

CLASSES = sorted(set(STAGES.values()), key=lambda recipe_class: recipe_class.__name__)
COMPLETE = [each for each in CLASSES if each is not PreferenceExperimentRecipe]  # it has no tables by itself


@pytest.mark.parametrize("recipe_class", CLASSES)
def test_every_key_has_a_help_text(recipe_class):
    assert [option.key for option in options(recipe_class) if not option.help] == []


@pytest.mark.parametrize("recipe_class", COMPLETE)
def test_help_lists_every_key_with_the_default_that_holds(recipe_class):
    text = help_text(recipe_class, "usage")
    held = flatten(load_recipe(recipe_class, None, []))
    shown = {option.key: option.default for option in options(recipe_class)}
    assert shown == held
    for key in held:
        assert re.search(rf"^  {re.escape(key)}  \(", text, flags=re.MULTILINE)


@pytest.mark.parametrize("recipe_class", [SFTRecipe, RewardModelRecipe, OnlineRecipe, PreferenceRecipe])
def test_training_recipes_share_the_keys_of_the_run_folder_contract(recipe_class):
    keys = {option.key for option in options(recipe_class)}
    assert {"run_dir", "seed", "num_steps", "resume", "checkpoint.every", "log.every"} <= keys


@pytest.mark.parametrize("recipe_class", COMPLETE)
def test_recipes_are_frozen_all_the_way_down(recipe_class):
    def classes(config: Any):
        yield type(config)
        for field in dataclasses.fields(config):
            if dataclasses.is_dataclass(value := getattr(config, field.name)):
                yield from classes(value)

    assert all(each.__dataclass_params__.frozen for each in classes(recipe_class()))


@pytest.mark.parametrize(
    "name, override, key",
    [
        ("tldr/drpo_2.8b.yaml", "ppo.num_minibatches=7", "ppo.num_minibatches"),
        ("tldr/drpo_2.8b.yaml", "reward.function=a:b", "reward.function"),
        ("tldr/drpo_2.8b.yaml", "rollout.sampling.temperature=0", "rollout.sampling.temperature"),
        ("tldr/drpo_2.8b.yaml", "reset.curriculum_end=0.3", "reset.curriculum_end"),
        ("tldr/drpo_2.8b.yaml", "data.columns.prompt=q", "data.columns"),
        ("hh/drpo_1b.yaml", "kl.coef=0", "kl.coef"),
        ("tldr/drpo_1b.yaml", "kl.horizon=5000", "kl.horizon does nothing without kl.target_per_token"),
        (
            "tldr/drpo_1b.yaml",
            "kl.on_max=rollback",
            "kl.on_max does nothing without kl.max_per_token",
        ),
        (
            "hh/drpo_1b.yaml",
            "reward.shaping.missing_stop_penalty=2",
            "does nothing with reward.shaping.missing_stop=none",
        ),
        ("tldr/drpo_1b.yaml", "rollout.sampling.top_p=0.9", "rollout.sampling.top_p must be 1, got 0.9"),
        ("tldr/drpo_1b.yaml", "reset.min_length=53", "reset.min_length (53) must be below"),
        ("demo/sft.yaml", "batch.num_epochs=2", "batch.num_epochs and num_steps=600 both"),
        ("demo/dpo.yaml", "log.samples_every=5", "log.samples_every is for online runs"),
        ("hh/drpo_1b.yaml", "kl.target=6", "kl.target was a KL per episode"),
        ("hh/drpo_1b.yaml", "kl.max=20", "write kl.max_per_token ="),
        ("hh/drpo_1b.yaml", "data.truncation=paragraph", "data.truncation"),
        ("tldr/reward_model_1b.yaml", "loss.label_smoothing=0.5", "loss.label_smoothing"),
        ("demo/sft.yaml", "model.path=gpt2", "model.path"),
        ("demo/simpo.yaml", "reference.sync_every=10", "reference"),
        ("demo/kto.yaml", "loss.dr_dpo={}", "loss.dr_dpo"),
        ("demo/curry_dpo.yaml", "reference.cache_dir=runs/cache", "reference.cache_dir"),
        ("hh/dpo_1b.yaml", "loss.label_smoothing=0.1", "loss.label_smoothing"),
    ],
)
def test_an_impossible_combination_is_refused_naming_the_key(name, override, key):
    with pytest.raises(ValueError, match=re.escape(key)):
        loaded(name, override)


@pytest.mark.parametrize("key", ["batch_size=8", "dtype=bfloat16"])
def test_key_of_reward_models_is_refused_beside_a_reward_function(key):
    name, _, value = key.partition("=")
    value = int(value) if value.isdigit() else value
    with pytest.raises(ValueError, match=rf"^{name} is for a reward model \(path\), .* drop it"):
        RewardConfig(function="a:b", **{name: value})
    RewardConfig(path="runs/reward_model", **{name: value})


def test_recipe_with_resets_that_is_run_as_ppo_may_keep_its_reset_section():
    loaded("tldr/drpo_1b.yaml", "reset.proportion=0", "reset.min_length=53")


def test_the_help_shows_the_choices_behind_an_alias():
    types = {option.key: option.type for option in options(RewardModelRecipe)}
    assert types["resume"] == "Literal['auto', 'restart']"
    assert types["score.aggregation"] == "Literal['last', 'sum']"
    assert types["num_steps"] == "int | None"
