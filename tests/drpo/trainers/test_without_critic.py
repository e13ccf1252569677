"""An estimator that needs no critic: none is built, none is reported, and its settings are refused."""

from __future__ import annotations

import math
import shutil

import pytest
import yaml
from online_runs import RECIPE, merged, run_online

from drpo.config import ConfigError, load_recipe
from drpo.models.actor_critic import ActorCritic
from drpo.run.metrics import reproducible
from drpo.trainers.online_recipe import OnlineRecipe

GROUPS = {"rollout": {"rollouts_per_prompt": 4}, "checkpoint": {"every": 1}}
RLOO = {"advantage": {"estimator": "rloo"}, **GROUPS}


@pytest.fixture
def critics(monkeypatch) -> list[object]:
    """The critic of every actor-critic that is made."""
    made = []
    init = ActorCritic.__init__

    def watched(self, policy, critic, *args, **kwargs):
        made.append(critic)
        init(self, policy, critic, *args, **kwargs)

    monkeypatch.setattr(ActorCritic, "__init__", watched)
    return made


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce_pp"])
def test_a_run_has_no_critic_and_no_metric_of_one(policy_folder, tmp_path, critics, estimator):
    changes = {**GROUPS, "advantage": {"estimator": estimator}, "num_steps": 2}
    changes |= {"checkpoint": {"every": 1, "keep": 9}}
    rows = run_online(policy_folder, tmp_path / "run", changes)
    assert critics == [None]
    assert len(rows) == 2
    for row in rows:
        assert not [key for key in row if key.startswith("value/") or "value" in key or "critic" in key]
        assert row["ppo/ratio"] == pytest.approx(1.0, abs=0.2) and math.isfinite(row["ppo/policy_loss"])
        assert row["optim/policy_learning_rate"] > 0
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_2")
    resumed = run_online(policy_folder, tmp_path / "resumed", changes)
    assert [reproducible(row) for row in resumed] == [reproducible(row) for row in rows]


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce_pp"])
def test_a_group_without_differences_moves_nothing(policy_folder, tmp_path, estimator):
    """All rollouts score alike and KL costs nothing: every advantage is 0, and so is the loss."""
    changes = {
        **GROUPS,
        "advantage": {"estimator": estimator},
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


LAM = "advantage.lam does not apply to advantage.estimator"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"rollouts_per_prompt": 1}},
            "rollout.rollouts_per_prompt must be >= 2 for .*rloo",
        ),
        (
            {"rollout": {"rollouts_per_prompt": 1}, "advantage": {"estimator": "grpo"}},
            "rollout.rollouts_per_prompt must be >= 2 for .*grpo",
        ),
        ({"advantage": {"lam": 0.9}}, f"{LAM}=rloo"),
        ({"advantage": {"lam": 0.9, "estimator": "grpo"}}, f"{LAM}=grpo"),
        ({"advantage": {"lam": 0.9, "estimator": "reinforce_pp"}}, f"{LAM}=reinforce_pp"),
        ({"advantage": {"value_lam": 1.0}}, "advantage.value_lam does not apply to advantage.estimator=rloo"),
        (
            {"advantage": {"length_adaptive_alpha": 0.1, "estimator": "reinforce_pp"}},
            "advantage.length_adaptive_alpha does not apply to advantage.estimator=reinforce_pp",
        ),
        ({"advantage": {"gamma": 0.9}}, "advantage.gamma does not apply to advantage.estimator=rloo"),
        (
            {"advantage": {"gamma": 0.9, "estimator": "grpo"}},
            "advantage.gamma does not apply to advantage.estimator=grpo",
        ),
        ({"advantage": {"group_std": False}}, "advantage.group_std does not apply to .*=rloo"),
        (
            {"advantage": {"group_std": False, "estimator": "gae"}},
            "advantage.group_std does not apply to .*=gae",
        ),
        *(
            (
                {"advantage": {"whiten_rewards": True, "estimator": estimator}},
                f"advantage.whiten_rewards does not apply to .*={estimator}; drop it: without a critic",
            )
            for estimator in ("rloo", "grpo", "reinforce_pp")
        ),
        (
            {"advantage": {"whiten": False, "estimator": "reinforce_pp"}},
            "advantage.whiten must be true for advantage.estimator=reinforce_pp",
        ),
        (
            {
                "advantage": {
                    "estimator": "gae",
                    "lam": 0.9,
                    "value_lam": 1.0,
                    "length_adaptive_alpha": 0.05,
                }
            },
            "advantage.lam does nothing beside advantage.length_adaptive_alpha and advantage.value_lam",
        ),
        *(
            (
                {"advantage": {"estimator": "gae", "gamma": 0.0, name: 0.9}},
                f"advantage.{name} does nothing with advantage.gamma=0: advantages are of one step",
            )
            for name in ("lam", "value_lam", "length_adaptive_alpha")
        ),
        ({"critic": {"pretrain_steps": 1}}, "critic.pretrain_steps does not apply .*there is no critic"),
        ({"critic": {"path": "rm"}}, "critic.path does not apply"),
        ({"ppo": {"value_coef": 0.5}}, "ppo.value_coef does not apply"),
    ],
)
def test_settings_of_other_estimators_are_refused(tmp_path, changes, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged(merged(RECIPE, RLOO), changes)))
    with pytest.raises(ConfigError, match=message):
        load_recipe(OnlineRecipe, path, [])


def test_lambda_is_the_critics_where_lengths_give_the_policys(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(merged(RECIPE, {"advantage": {"lam": 1.0, "length_adaptive_alpha": 0.05}}))
    )
    assert load_recipe(OnlineRecipe, path, []).advantage.lam == 1.0
