"""The embedded recipes of preference training: one difference each, and what the papers and their code say."""

from __future__ import annotations

from pathlib import Path

import pytest
from shipped_recipes import SIZES, TASKS, differing, loaded, stage_of

from drpo.trainers.preference.recipe import LossConfig, PreferenceRecipe
from launch.demo_inputs import STAGES as DEMO_STAGES

ON_THE_DEMO = [
    f"demo/{loss}.yaml"
    for loss in ("dpo", "odpo", "dr_dpo", "cdpo", "robust_dpo", "ipo", "simpo", "orpo", "kto", "curry_dpo")
]

# --- the demo -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_THE_DEMO)
def test_preference_training_on_the_demo_starts_where_summaries_are_often_complete(name):
    recipe, sft = loaded(name), loaded("demo/sft_often.yaml")
    assert recipe.model.path == f"{sft.run_dir}/policy"
    assert Path(recipe.model.path) in DEMO_STAGES  # made when it is missing
    assert recipe.data.demo == sft.data.demo
    assert recipe.sample.kl_reference in (None, recipe.model.path)
    is_in_memory_and_still = recipe.loss.needs_reference and not recipe.reference_moves
    assert (recipe.sample.kl_reference is None) == is_in_memory_and_still  # every one of them reports a KL


def test_the_often_complete_demonstrations_are_all_that_differs():
    assert differing("demo/sft_often.yaml", "demo/sft.yaml") == {"run_dir", "data.demo.completion_rate"}


def test_the_neurons_are_those_of_the_policy_before_and_after_dpo():
    recipe, dpo = loaded("demo/neuron_shift.yaml"), loaded("demo/dpo.yaml")
    assert (recipe.before, recipe.after) == (dpo.model.path, f"{dpo.run_dir}/policy")


def test_the_inputs_of_the_demo_are_made_by_recipes_that_leave_them_there():
    for folder, (script, name) in DEMO_STAGES.items():
        assert loaded(name).run_dir == str(folder.parent)
        assert script == f"{stage_of(name)}.py"


# --- one difference each --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["demo/dr_dpo.yaml", *(f"{task}/dr_dpo_{size}.yaml" for task in TASKS for size in SIZES)]
)
def test_dr_dpo_is_dpo_with_weighted_pairs(name):
    different = differing(name, name.replace("dr_dpo", "dpo"))
    assert {key for key in different if not key.startswith("loss.dr_dpo.")} == {"run_dir"}
    weights = loaded(name).loss.dr_dpo
    assert (weights.beta_prime, weights.over) == (1.0, "step")


@pytest.mark.parametrize("task", TASKS)
def test_smoke_dpo_starts_and_holds_out_as_the_reward_model(task):
    dpo, reward_model = f"{task}/smoke_dpo.yaml", f"{task}/smoke_reward_model.yaml"
    assert loaded(dpo).model == loaded(reward_model).model
    of_the_data = {key for key in differing(dpo, reward_model) if key.startswith("data.")}
    assert of_the_data <= {"data.max_response_length"}


@pytest.mark.parametrize("name", ["cdpo", "robust_dpo", "ipo", "simpo", "orpo", "odpo"])
def test_the_losses_of_the_demo_differ_from_dpo_in_nothing_else(name):
    different = differing(f"demo/{name}.yaml", "demo/dpo.yaml")
    assert {key for key in different if not key.startswith("loss.")} <= {"run_dir", "sample.kl_reference"}


# --- published settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_dpo_on_tldr_has_the_settings_of_the_drpo_paper(size):
    """arXiv 2404.08495, Table 5, with the schedule and optimizer of its code; data as the reward model's."""
    recipe = loaded(f"tldr/dpo_{size}.yaml")
    assert recipe.loss == LossConfig(name="dpo", beta=0.05)
    assert (recipe.batch.size, recipe.batch.num_epochs, recipe.num_steps) == (64, 1.0, None)
    assert (recipe.optim.learning_rate, recipe.optim.schedule, recipe.optim.eps) == (3e-6, "cosine", 1e-5)
    assert (recipe.optim.betas, recipe.optim.weight_decay) == ([0.9, 0.999], 0.01)
    assert (recipe.optim.warmup_steps, recipe.optim.max_grad_norm) == (0, None)
    assert (recipe.model.lora.r, recipe.model.lora.alpha) == (1024, 2048)
    assert recipe.data == loaded(f"tldr/reward_model_{size}.yaml").data
    assert (recipe.sample.temperature, recipe.sample.max_response_length) == (0.01, 53)


@pytest.mark.parametrize("size", SIZES)
def test_odpo_on_tldr_has_the_settings_of_its_release(size):
    """rycolab/odpo: beta 0.5, alpha 1, log of the gap, 5,000 pairs of the axis data, 16 a batch."""
    recipe = loaded(f"tldr/odpo_{size}.yaml")
    assert (recipe.loss.name, recipe.loss.beta) == ("dpo", 0.5)
    assert (recipe.loss.offset.alpha, recipe.loss.offset.scale) == (1.0, "log")
    assert (recipe.batch.size, recipe.num_steps) == (16, 5000 // 16)
    assert (recipe.data.subset, recipe.data.train_split, recipe.data.eval_split) == (
        "axis",
        "validation",
        "test",
    )
    assert recipe.data.max_prompt_length == 512
    assert recipe.data.max_prompt_length + recipe.data.max_response_length == 1024
    assert_optimizer_of_the_dpo_release(recipe)


@pytest.mark.parametrize("size", SIZES)
def test_dpo_on_hh_has_the_settings_of_the_releases_of_dpo_and_dr_dpo(size):
    recipe = loaded(f"hh/dpo_{size}.yaml")
    assert recipe.loss == LossConfig(name="dpo", beta=0.1)
    assert (recipe.batch.size, recipe.batch.num_epochs, recipe.num_steps) == (64, 1.0, None)
    assert recipe.data == loaded(f"hh/reward_model_{size}.yaml").data
    assert_optimizer_of_the_dpo_release(recipe)


def assert_optimizer_of_the_dpo_release(recipe: PreferenceRecipe) -> None:
    """RMSprop (Adam without a first moment, decay 0.99), lr 5e-7 constant after 150 steps, all weights."""
    optim = recipe.optim
    assert (optim.learning_rate, optim.schedule, optim.warmup_steps) == (5e-7, "constant", 150)
    assert (optim.betas, optim.eps, optim.weight_decay) == ([0.0, 0.99], 1e-8, 0.0)
    assert optim.max_grad_norm == 10.0
    assert recipe.model.lora.r == 0


@pytest.mark.parametrize("size", SIZES)
def test_curry_dpo_on_tldr_differs_from_dpo_by_ranked_data_and_batch(size):
    """Pattnaik et al. 2024: the best response with each other one, easy to hard, the reference follows."""
    name = f"tldr/curry_dpo_{size}.yaml"
    different = differing(name, f"tldr/dpo_{size}.yaml")
    sections = {key.partition(".")[0] for key in different}
    assert sections == {"run_dir", "curriculum", "data", "batch"}
    curriculum = loaded(name).curriculum
    assert (curriculum.num_stages, curriculum.pairs) == (3, "best_vs_rest")
    assert (curriculum.order, curriculum.reference) == ("score_gap", "last")
    assert loaded(name).data.subset == "axis"  # the part with rankings
