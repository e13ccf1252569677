"""Rules between the sections of an online recipe: what would do nothing, or could not work, is refused before a run."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from online_runs import RECIPE, merged

from drpo.config import ConfigError
from drpo.data.load import Splits
from drpo.run.checkpoints import read_trainer_state
from drpo.trainers.online import _check
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
    message = "reset.own.size must be >= 1 and <= 1e+09, got 10000000000000000000"
    assert_refused(message, reset={**reset, "own": {"size": 10**19}})
    assert recipe_of(reset={**reset, "own": {"size": 10**9}}).reset.own.size == 10**9


def test_worst_of_all_own_rollouts_is_refused():
    reset = {"source": "own", "proportion": 0.5}
    message = "reset.own.which does nothing with reset.own.share=1"
    assert_refused(message, reset={**reset, "own": {"which": "worst", "share": 1.0}})
    recipe_of(reset={**reset, "own": {"which": "worst", "share": 0.99}})
    recipe_of(reset={**reset, "own": {"share": 1.0}})


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        ({"own": {"size": 4}}, "reset.own.size applies to reset.source=own only; drop it"),
        ({"adaptive": {"rate": 1.0}}, "reset.adaptive.rate applies to reset.length=adaptive only; drop it"),
    ],
)
def test_settings_of_another_way_to_reset_are_named_in_full(reset, message):
    assert_refused(message, reset=reset)


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


def test_a_run_without_resets_keeps_no_rollouts(online_run):
    _, run_dir = online_run(reset={"proportion": 0.0, "source": "own"}, checkpoint={"every": 1})
    starts = read_trainer_state(run_dir / "checkpoints" / "step_3").get("starts", {})
    assert not starts.get("own", {}).get("rollouts")


@pytest.mark.parametrize("proportion", [0.0, 0.5])
def test_a_launcher_that_cuts_models_can_train_without_resets(proportion):
    launcher = SimpleNamespace(world_size=2, partitions_weights=True)
    recipe = recipe_of(reset={"source": "initial", "proportion": proportion})
    refused = pytest.raises(ConfigError, match="reset.source=initial: this launcher cuts the copy")
    with refused if proportion else nullcontext():
        _check(recipe, launcher, Splits([], [], ""), None)
