"""Rules between the sections of an online recipe: what would do nothing, or could not work, is refused before a run."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
from online_runs import RECIPE, merged

from drpo.config import ConfigError
from drpo.data.encode import Example
from drpo.data.records import DataError, Record
from drpo.rollout.resets import ResetConfig, check_resets
from drpo.run.checkpoints import read_trainer_state
from drpo.trainers.online_checks import check_launcher
from drpo.trainers.online_recipe import OnlineRecipe


def recipe_of(**changes) -> OnlineRecipe:
    """A recipe of 4 steps whose responses have at most 8 tokens."""
    return OnlineRecipe(**merged(merged(RECIPE, {"num_steps": 4}), changes))


def assert_refused(message: str, **changes) -> None:
    """The recipe is refused by an error that begins with `message` and has each of its parts between ` ... `."""
    with pytest.raises(ConfigError) as caught:
        recipe_of(**changes)
    pattern = ".*".join(map(re.escape, message.split(" ... ")))
    assert re.match(pattern, str(caught.value)), caught.value


# --- own rollouts -----------------------------------------------------------------------------------------


def test_a_buffer_of_own_rollouts_has_an_upper_bound():
    reset = {"source": "own", "proportion": 0.5}
    message = "reset.own.size must be >= 1 and <= 2147483647, got 10000000000000000000"
    assert_refused(message, reset={**reset, "own": {"size": 10**19}})
    assert recipe_of(reset={**reset, "own": {"size": 10**9}}).reset.own.size == 10**9


def test_worst_of_all_own_rollouts_is_refused():
    reset = {"source": "own", "proportion": 0.5}
    message = "reset.own.which does nothing with reset.own.share=1"
    assert_refused(message, reset={**reset, "own": {"which": "worst", "share": 1.0}})
    recipe_of(reset={**reset, "own": {"which": "worst", "share": 0.99}})
    recipe_of(reset={**reset, "own": {"share": 1.0}})


# --- limits that no prefix meets --------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["own", "initial"])
@pytest.mark.parametrize(
    ("limits", "response", "neighbour", "longer"),
    [  # of 8 tokens a tenth is none, and 0.99 of them is all of them; of 10 it is one, of 100 all but the last
        ({"max_fraction": 0.1}, 8, {"max_fraction": 0.125}, 10),
        ({"min_fraction": 0.99}, 8, {"min_fraction": 0.875}, 100),
        ({"max_fraction": 0.45, "min_fraction": 0.4}, 4, {"max_fraction": 0.5, "min_fraction": 0.4}, 5),
        ({"length": "binomial", "max_fraction": 0.01}, 1, {"length": "binomial", "max_fraction": 0.01}, 2),
        ({}, 1, {"boundary": "turn"}, 2),
    ],
)
def test_limits_that_no_sampled_response_meets(source, limits, response, neighbour, longer):
    def taken(limits: dict, longest: int) -> dict:
        reset = {"source": source, "proportion": 0.5, **limits}
        return {"reset": reset, "rollout": {"max_response_length": longest}}

    message = f"reset.source ({source}) has responses of 1 to {response} tokens ... widen them, or set reset"
    assert_refused(message, **taken(limits, response))
    recipe_of(**taken(limits, longer))
    recipe_of(**taken(neighbour, max(response, 2)))
    recipe_of(**merged(taken(limits, response), {"reset": {"proportion": 0.0}}))


def test_limits_of_dataset_responses_wait_for_the_data():
    recipe_of(reset={"max_fraction": 0.1})


def test_fractions_are_no_limits_of_binomial_lengths():
    message = "within reset.min_length=0 and rollout.max_response_length=1, so nothing"
    binomial = {"length": "binomial", "max_fraction": 0.5}
    reset = {"source": "initial", "proportion": 0.5, **binomial}
    assert_refused(f"reset.source (initial) ... {message}", reset=reset, rollout={"max_response_length": 1})
    example = Example(Record(prompt="p"), query_ids=[3], completion_ids=[10, 11, 0])
    with pytest.raises(
        DataError, match=r"reset.boundary=token, reset.min_length=5 and rollout.max_response_length=8,"
    ):
        check_resets([example], ResetConfig(min_length=5, **binomial), 8, None)


def test_a_shortest_prefix_as_long_as_a_response_is_refused_with_what_to_do():
    message = (
        "reset.min_length (8) must be below rollout.max_response_length (8) ... lower it, raise that, or set"
    )
    assert_refused(message, reset={"min_length": 8})
    recipe_of(reset={"min_length": 7})


@pytest.mark.parametrize("length", ["adaptive", "curriculum"])
@pytest.mark.parametrize(
    ("limits", "neighbour"),
    [
        ({"min_length": 7}, {"min_length": 6}),
        ({"min_fraction": 0.5, "max_fraction": 0.5}, {"min_fraction": 0.5, "max_fraction": 0.9}),
        ({"min_fraction": 0.8, "source": "initial"}, {"min_fraction": 0.75, "source": "initial"}),
    ],
)
def test_lengths_that_are_chosen_need_two_that_are_allowed(length, limits, neighbour):
    message = (
        f"reset.length ({length}) chooses among lengths, and within reset.min_length= ... one at most; widen"
    )
    assert_refused(message, reset={"length": length, **limits})
    recipe_of(reset={"length": length, **neighbour})
    recipe_of(reset={"length": "uniform", **limits})
    recipe_of(reset={"length": length, **limits, "proportion": 0.0})


# --- schedules that end too early -------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["proportion_schedule", "length_schedule"])
def test_own_rollouts_need_a_second_step_with_resets(schedule):
    reset = {"source": "own", "proportion": 0.5, schedule: "linear"}
    message = (
        "reset.schedule_end (0.25) must be above 1 / num_steps = 0.25, ... reset.source=own has no rollouts"
    )
    assert_refused(message, reset={**reset, "schedule_end": 0.25})
    recipe_of(reset={**reset, "schedule_end": 0.26})
    recipe_of(reset={**reset, "schedule_end": 0.25, "source": "initial"})
    recipe_of(reset={**reset, "schedule_end": 0.25, "proportion": 0.0})


def test_own_rollouts_may_be_tried_for_one_step():
    recipe_of(
        reset={"source": "own", "proportion": 0.5, "schedule_end": 0.5, "proportion_schedule": "linear"},
        num_steps=1,
    )


def test_resets_outlast_the_steps_in_which_the_critic_alone_learns():
    reset = {"proportion_schedule": "linear", "schedule_end": 0.5}
    message = "reset.schedule_end (0.5) must be above 2 / num_steps = 0.5, ... critic.pretrain_steps"
    assert_refused(message, reset=reset, critic={"pretrain_steps": 2})
    recipe_of(reset={**reset, "schedule_end": 0.51}, critic={"pretrain_steps": 2})
    recipe_of(reset=reset, critic={"pretrain_steps": 1})
    recipe_of(reset=reset, critic={"pretrain_steps": 4})  # for the critic's sake


# --- who learns -------------------------------------------------------------------------------------------


def test_a_likelihood_for_a_policy_that_never_learns_is_refused():
    likelihood = {"reset": {"sft_coef": 0.1}}
    message = (
        "reset.sft_coef does nothing with critic.pretrain_steps=num_steps=4: the policy learns in no step"
    )
    assert_refused(message, **likelihood, critic={"pretrain_steps": 4})
    recipe_of(**likelihood, critic={"pretrain_steps": 3})
    recipe_of(critic={"pretrain_steps": 4}, reset={"sft_coef": 0.1, "proportion": 0.0})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"critic": {"pretrain_steps": 1}}, "critic.pretrain_steps"),
        ({"critic": {"learning_rate": 1e-4}}, "critic.learning_rate"),
        ({"critic": {"warmup_steps": 1}}, "critic.warmup_steps"),
        ({"ppo": {"value_clip_range": 0.1}}, "ppo.value_clip_range"),
        ({"advantage": {"value_lam": 1.0}}, "advantage.value_lam"),
    ],
)
def test_settings_of_a_critic_that_learns_nothing_are_refused(changes, name):
    message = f"{name} does not apply to ppo.value_coef=0: the critic learns nothing"
    assert_refused(message, **merged(changes, {"ppo": {"value_coef": 0.0}}))
    recipe_of(**merged(changes, {"ppo": {"value_coef": 0.01}}))
    recipe_of(ppo={"value_coef": 0.0}, critic={"path": "reward_model"})


def test_a_clip_range_leaves_the_ratio_above_zero():
    assert_refused("ppo.clip_range must be > 0 and < 1, got 20", ppo={"clip_range": 20.0})
    assert_refused("ppo.clip_range must be > 0 and < 1, got 1", ppo={"clip_range": 1.0})
    recipe_of(ppo={"clip_range": 0.99, "clip_range_high": 20.0})


# --- groups of rollouts -----------------------------------------------------------------------------------


def test_a_state_that_a_group_shares_is_refused_for_one_rollout():
    shared = {"reset": {"per": "prompt"}}
    assert_refused("reset.per does nothing with rollout.rollouts_per_prompt=1: a prompt has one", **shared)
    recipe_of(**shared, rollout={"rollouts_per_prompt": 2})
    recipe_of(reset={"per": "prompt", "proportion": 0.0})
    recipe_of(ppo={"share_prompts": False})


# --- without resets ---------------------------------------------------------------------------------------

VINE = {"advantage": {"estimator": "vine"}}
OFF_THE_LIMITS = {
    "own for each rollout": {"reset": {"source": "own"}, "rollout": {"rollouts_per_prompt": 2}},
    "release's masking": {"reset": {"masking": "release"}, **VINE},
    "long prefixes": {"reset": {"min_length": 8}},
}


@pytest.mark.parametrize("changes", OFF_THE_LIMITS.values(), ids=OFF_THE_LIMITS)
def test_settings_of_resets_may_stay_where_there_are_none(changes):
    with pytest.raises(ConfigError, match="^reset"):
        recipe_of(**merged(changes, {"reset": {"proportion": 0.5}}))
    recipe_of(**merged(changes, {"reset": {"proportion": 0.0}}))


@pytest.mark.parametrize("memory", [{"source": "own"}, {"length": "adaptive"}], ids=["own", "adaptive"])
def test_draws_depend_on_earlier_rollouts_where_there_are_resets(memory):
    assert recipe_of(reset=memory | {"proportion": 0.5, "proportion_schedule": "linear"}).reset.remembers
    assert not recipe_of(reset=memory | {"proportion": 0.0}).reset.remembers
    assert not recipe_of().reset.remembers


def test_a_run_without_resets_remembers_and_measures_none(online_run):
    without = {"proportion": 0.0, "source": "own", "length": "adaptive"}
    rows, run_dir = online_run(reset=without, checkpoint={"every": 1})
    assert read_trainer_state(run_dir / "checkpoints" / "step_3")["starts"] == {}
    assert "reset/position" not in rows[-1]


@pytest.mark.parametrize("proportion", [0.0, 0.5])
def test_a_launcher_that_cuts_models_can_train_without_resets(proportion):
    recipe = recipe_of(reset={"source": "initial", "proportion": proportion})
    refused = pytest.raises(ConfigError, match="reset.source=initial: this launcher cuts the copy")
    with refused if proportion else nullcontext():
        check_launcher(recipe, world_size=2, partitions_weights=True)
