"""An estimator that needs no critic: none is built, none is reported, and its settings are refused."""

from __future__ import annotations

import math

import pytest
import yaml
from online_runs import RECIPE, merged, run_online

from drpo.config import ConfigError, load_recipe
from drpo.run.metrics import reproducible
from drpo.trainers.online_recipe import OnlineRecipe

RLOO = {"advantage": {"estimator": "rloo"}, "rollout": {"rollouts_per_prompt": 4}, "checkpoint": {"every": 1}}


def test_a_run_has_no_critic_and_no_metric_of_one(policy_folder, tmp_path):
    rows = run_online(policy_folder, tmp_path / "run", {**RLOO, "num_steps": 2})
    assert len(rows) == 2
    for row in rows:
        assert not [key for key in row if key.startswith("value/") or "value" in key or "critic" in key]
        assert row["ppo/ratio"] == pytest.approx(1.0, abs=0.2) and math.isfinite(row["ppo/policy_loss"])
        assert row["optim/policy_learning_rate"] > 0
    resumed = run_online(policy_folder, tmp_path / "run", {**RLOO, "num_steps": 2})
    assert [reproducible(row) for row in resumed] == [reproducible(row) for row in rows]


def test_a_group_without_differences_moves_nothing(policy_folder, tmp_path):
    """All rollouts score alike and KL costs nothing: every advantage is 0, and so is the loss."""
    changes = {
        **RLOO,
        "num_steps": 1,
        "kl": {"coef": 0.0},
        "reward": {"function": None, "shaping": {"missing_stop": "none"}},
    }
    (row,) = run_online(
        policy_folder, tmp_path / "run", changes, lambda completions: [1.0] * len(completions)
    )
    assert row["ppo/policy_loss"] == pytest.approx(0.0, abs=1e-6) and row["ppo/grad_norm"] == pytest.approx(
        0.0, abs=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"rollouts_per_prompt": 1}},
            "rollouts_per_prompt must be >= 2 for .*rloo",
        ),
        ({"advantage": {"lam": 0.9}}, "lam does not apply to advantage.estimator=rloo"),
        ({"advantage": {"gamma": 0.9}}, "gamma does not apply to advantage.estimator=rloo"),
        ({"critic": {"pretrain_steps": 1}}, "critic.pretrain_steps does not apply .*there is no critic"),
        ({"critic": {"path": "rm"}}, "critic.path does not apply"),
        ({"ppo": {"value_coef": 0.5}}, "ppo.value_coef does not apply"),
    ],
)
def test_settings_of_a_critic_are_refused(tmp_path, changes, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged(merged(RECIPE, RLOO), changes)))
    with pytest.raises(ConfigError, match=message):
        load_recipe(OnlineRecipe, path, [])
