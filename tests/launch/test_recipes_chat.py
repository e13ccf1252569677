"""The recipes of chat models: they fit each other, and the GPUs that they are for."""

from __future__ import annotations

import pytest
from shipped_recipes import differing, loaded

from launch.cli import accelerate_config
from launch.command_line import RECIPES
from launch.planning.architectures import architecture_of
from launch.planning.gpus import parse_gpus
from launch.planning.launchers import read_launcher
from launch.planning.plan import Planner

NODE = ("qwen3_8b", "llama3.1_8b", "olmo3_7b", "olmo2_7b")
ONE_GPU = ("qwen3_1.7b", "qwen3_4b", "llama3.2_1b")
IN_4BIT = ("qwen3_8b_4bit",)  # one GPU too, for stages that do not fit it otherwise
NAMES = sorted(f"chat/{path.name}" for path in (RECIPES / "chat").glob("*.yaml"))


def test_every_model_has_every_stage_that_it_needs():
    expected = {f"chat/{stage}_{name}.yaml" for name in (*NODE, *ONE_GPU) for stage in ("dpo", "drpo", "ppo")}
    expected |= {f"chat/reward_model_{name}.yaml" for name in (*NODE, *ONE_GPU) if name != "qwen3_4b"}
    expected |= {f"chat/{stage}_{name}.yaml" for name in IN_4BIT for stage in ("drpo", "ppo")}
    assert set(NAMES) == expected


@pytest.mark.parametrize("name", [*NODE, *ONE_GPU, *IN_4BIT])
def test_ppo_is_drpo_without_resets(name):
    different = differing(f"chat/ppo_{name}.yaml", f"chat/drpo_{name}.yaml")
    assert {key for key in different if not key.startswith("reset.")} == {"run_dir"}
    assert loaded(f"chat/ppo_{name}.yaml").reset.proportion == 0


@pytest.mark.parametrize("name", [*NODE, *ONE_GPU, *IN_4BIT])
def test_online_stages_take_the_reward_model_of_a_recipe_with_their_tokens(name):
    recipe = loaded(f"chat/drpo_{name}.yaml")
    (maker,) = [other for other in NAMES if recipe.reward.path == f"{loaded(other).run_dir}/reward_model"]
    assert loaded(maker).data.chat_template_kwargs == recipe.data.chat_template_kwargs
    vocabularies = {
        architecture_of(each.model.path, "model.path").vocab_size for each in (loaded(maker), recipe)
    }
    assert len(vocabularies) == 1


@pytest.mark.parametrize("name", NAMES)
def test_chat_recipes_read_the_same_conversations(name):
    data, other = loaded(name).data, loaded("chat/dpo_qwen3_8b.yaml").data
    assert data.chat_template and data.path == other.path
    assert (data.train_split, data.eval_split) == ("train_prefs", "test_prefs")
    assert ("enable_thinking" in data.chat_template_kwargs) == ("qwen3" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recipe_fits_the_gpus_that_it_names(name):
    on_node = name.removesuffix(".yaml").endswith(NODE)
    config = ("zero3" if "reward_model" in name else "multi_gpu") if on_node else "single_gpu"
    assert f"accelerate config {config}" in (RECIPES / name).read_text()
    gpus = parse_gpus("8x80" if on_node else "24")
    assert Planner(loaded(name), gpus).plan(read_launcher(accelerate_config(config), gpus.count)).fits


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_4BIT)
def test_recipe_in_4_bits_would_not_fit_otherwise(name):
    config = read_launcher(accelerate_config("single_gpu"), 1)
    dense = loaded(f"chat/drpo_{name}.yaml", "model.load_in_4bit=false")
    assert not Planner(dense, parse_gpus("24")).plan(config).fits
