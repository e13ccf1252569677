"""Runs with advantage.estimator=vine: credit from shaped continuations, metrics, resume, refusals."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import torch
import yaml
from hand_rollouts import hand_trajectory
from online_runs import RECIPE, merged, run_online

from drpo.config import ConfigError, load_recipe
from drpo.rewards import RunningMoments
from drpo.rollout.trajectory import Continuations, Trajectory
from drpo.run.metrics import reproducible
from drpo.trainers.credit import AdvantageConfig, Credit, KLConfig, ShapingConfig, assign_credit
from drpo.trainers.online_metrics import online_metrics
from drpo.trainers.online_recipe import OnlineRecipe

VINE = {
    "num_steps": 2,
    "advantage": {"estimator": "vine"},
    "vine": {"every": 3, "num_rollouts": 2},
    "reward": {"shaping": {"missing_stop": "none"}},
}
RAW = AdvantageConfig(estimator="vine", whiten=False)


# --- credit -----------------------------------------------------------------------------------------------


@pytest.fixture
def trajectory() -> Trajectory:
    """One forced and three sampled tokens, states before the first and third of these; and two sampled ones."""
    rollouts = hand_trajectory(
        lengths=[4, 2],
        forced=[1, 0],
        width=5,
        scores=[3.0, 1.0],
        log_ratios=[[9.0, 1.0, 2.0, 3.0], [4.0, 5.0]],
    )
    continuations = Continuations(
        positions=torch.tensor([[1, 3], [0, -1]]),
        scores=torch.tensor([[[1.0, 5.0], [2.0, 4.0]], [[0.0, 3.0], [0.0, 0.0]]]),
        ended=torch.tensor([[[True, True], [True, False]], [[True, True], [False, False]]]),
        lengths=torch.tensor([[[3, 5], [4, 5]], [[2, 1], [0, 0]]]),
    )
    return dataclasses.replace(rollouts, continuations=continuations, values=None)


def credit_of(trajectory: Trajectory, kl_coef: float = 0.0, **shaping) -> Credit:
    config = ShapingConfig(**{"missing_stop": "none", **shaping})
    return assign_credit(trajectory, config, KLConfig(), kl_coef, RAW, "paper", RunningMoments())


def test_credit_by_hand(trajectory):
    # V = 3 and 3 in the first row, 1.5 in the second.
    credit = credit_of(trajectory)
    torch.testing.assert_close(credit.advantages, torch.tensor([[0, 0, 0, 0, 0], [-0.5, -0.5, 0, 0, 0]]))
    assert credit.returns is None
    # Penalties of 0.1 log pi/pi_ref, up to the end of the segment: 0.1 + 0.2, 0.2 | 0.3;  0.4 + 0.5, 0.5.
    expected = torch.tensor([[0, -0.3, -0.2, -0.3, 0], [-1.4, -1.0, 0, 0, 0]])
    torch.testing.assert_close(credit_of(trajectory, kl_coef=0.1).advantages, expected)


def test_continuations_are_shaped_as_rollouts_are(trajectory):
    # Missing stops: the 4 becomes -1, so V(s_1) = 0.5. Lengths cost 0.1: R = 2.6 and 0.8,
    # V = 3 - 0.4, 0.5 - 0.45, 1.5 - 0.15.
    settings = {"missing_stop": "replace", "missing_stop_penalty": 1.0, "length_penalty": 0.1}
    expected = torch.tensor([[0, -2.55, -2.55, 2.55, 0], [-0.55, -0.55, 0, 0, 0]])
    torch.testing.assert_close(credit_of(trajectory, **settings).advantages, expected)


@pytest.mark.parametrize("normalise", ["running", "batch"])
def test_continuations_are_normalised_by_the_moments_of_rollouts(trajectory, normalise):
    """The rollouts' scores, 3 and 1, have mean 2 and standard deviation 1; those of continuations change neither."""
    credit = credit_of(trajectory, normalise=normalise)
    torch.testing.assert_close(credit.scores, torch.tensor([1.0, -1.0]))
    expected = torch.tensor([[[-1.0, 3.0], [0.0, 2.0]], [[-2.0, 1.0], [-2.0, -2.0]]])
    torch.testing.assert_close(credit.continuation_scores, expected)


def test_metrics_by_hand(trajectory):
    metrics = online_metrics(trajectory, credit_of(trajectory), 0.1)
    assert metrics["vine/num_states"] == 3
    assert metrics["vine/sampled_tokens"] == (2 + 4) + (1 + 2) + (2 + 1)
    assert metrics["vine/value_mean"] == pytest.approx((3 + 3 + 1.5) / 3)
    # The standard error of a mean of two is half their distance.
    assert metrics["vine/value_std_error"] == pytest.approx((2 + 1 + 1.5) / 3)


# --- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(policy_folder, tmp_path_factory):
    """A folder, and the metrics of the run `run` in it."""
    folder = tmp_path_factory.mktemp("vine")
    return folder, run_online(policy_folder, folder / "run", {**VINE, "checkpoint": {"every": 1, "keep": 9}})


def test_a_run_reports_its_states_and_has_no_critic(whole):
    folder, rows = whole
    assert [row["step"] for row in rows] == [1, 2] and not (folder / "run" / "critic").exists()
    for row in rows:
        assert not [key for key in row if key.startswith("value/") or "critic" in key]
        # At most 8 sampled tokens: at most three states, and two continuations of at most 8, 5 and 2 tokens.
        assert 16 <= row["vine/num_states"] <= 48 and row["vine/num_states"] <= row["vine/sampled_tokens"]
        assert row["vine/sampled_tokens"] <= 16 * 2 * (8 + 5 + 2)
        assert (
            math.isfinite(row["vine/value_std_error"]) and row["ppo/grad_norm"] > 0 and row["time/vine"] > 0
        )


def test_a_run_resumed_in_between_is_the_same(whole, policy_folder):
    folder, rows = whole
    shutil.copytree(folder / "run", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step_2")
    changes = {**VINE, "checkpoint": {"every": 1, "keep": 9}}
    resumed = run_online(policy_folder, folder / "resumed", changes)
    assert [reproducible(row) for row in resumed] == [reproducible(row) for row in rows]


def test_how_rows_are_cut_changes_nothing(whole, policy_folder, tmp_path):
    changes = {"ppo": {"microbatch_size": 1}, "rollout": {"generation_batch_size": 3}}
    _, rows = whole
    others = run_online(policy_folder, tmp_path / "run", merged(VINE, changes))
    for row, other in zip(rows, others, strict=True):
        assert reproducible(other) == pytest.approx(reproducible(row), rel=2e-4, abs=2e-4)


def test_rollouts_of_a_prompt_and_one_continuation_will_do(policy_folder, tmp_path):
    changes = merged(
        VINE, {"rollout": {"rollouts_per_prompt": 4}, "vine": {"num_rollouts": 1, "every": 8}, "num_steps": 1}
    )
    (row,) = run_online(policy_folder, tmp_path / "run", changes)
    assert "vine/value_std_error" not in row and math.isfinite(row["vine/value_mean"])
    assert math.isfinite(row["ppo/policy_loss"]) and row["ppo/grad_norm"] > 0


def test_where_all_responses_score_alike_nothing_moves(policy_folder, tmp_path):
    changes = merged(VINE, {"num_steps": 1, "kl": {"coef": 0.0}, "reward": {"function": None}})
    (row,) = run_online(
        policy_folder, tmp_path / "run", changes, lambda completions: [1.0] * len(completions)
    )
    assert row["vine/value_mean"] == 1 and row["vine/value_std_error"] == 0
    assert row["ppo/grad_norm"] == pytest.approx(0.0, abs=1e-6)


def test_an_infinite_score_of_a_continuation_stops_the_run(policy_folder, tmp_path):
    calls = []

    def score(completions):  # the second call is for the continuations
        calls.append(len(completions))
        return [math.inf if len(calls) == 2 and i == 5 else 1.0 for i in range(len(completions))]

    changes = merged(VINE, {"reward": {"function": None}})
    with pytest.raises(FloatingPointError, match="step 1: the reward of a continuation is not finite in row"):
        run_online(policy_folder, tmp_path / "run", changes, score)


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"advantage": {"estimator": "gae"}},
            "vine.num_rollouts is for advantage.estimator=vine, and it is gae",
        ),
        ({"vine": {"num_rollouts": 0}}, "vine.num_rollouts must be >= 1"),
        ({"vine": {"every": 0}}, "vine.every must be >= 1"),
        ({"advantage": {"lam": 0.9}}, "advantage.lam does not apply to advantage.estimator=vine"),
        ({"advantage": {"gamma": 0.9}}, "advantage.gamma does not apply to advantage.estimator=vine"),
        ({"advantage": {"whiten_rewards": True}}, "advantage.whiten_rewards does not apply .*=vine"),
        ({"reset": {"masking": "release"}}, "reset.masking must be paper for advantage.estimator=vine"),
        ({"critic": {"pretrain_steps": 1}}, "critic.pretrain_steps does not apply .*there is no critic"),
    ],
)
def test_settings_that_do_not_apply_are_refused(tmp_path, changes, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged(merged(RECIPE, VINE), changes)))
    with pytest.raises(ConfigError, match=message):
        load_recipe(OnlineRecipe, path, [])
