"""The online loop when something goes wrong, and while the critic learns alone."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch
from online_runs import forget_precision, run_online
from safetensors.torch import load_file

from drpo.config import ConfigError
from drpo.run.checkpoints import read_trainer_state
from drpo.run.metrics import read_metrics, reproducible
from drpo.trainers.online_checks import check_identities


def test_a_kl_above_its_limit_stops_the_run_and_says_so(online_run, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"step 2: KL .* above kl\.max_per_token=0\.0001\. Last checkpoint: .*step_1\."
    ):
        online_run(kl={"max_per_token": 0.0001}, checkpoint={"every": 1})
    assert [row["step"] for row in read_metrics(tmp_path / "run1" / "metrics.jsonl")] == [1, 2]


def test_rolling_back_skips_the_update_and_counts(online_run):
    rows, _ = online_run(
        num_steps=2, kl={"max_per_token": 0.0001, "on_max": "rollback"}, checkpoint={"every": 1}
    )
    assert [row["safety/num_rollbacks"] for row in rows] == [0.0, 1.0]
    assert ["ppo/ratio" in row for row in rows] == [True, False]


def test_a_rollback_brings_the_kl_below_its_limit(online_run):
    rows, _ = online_run(
        num_steps=4, kl={"max_per_token": 0.0001, "on_max": "rollback"}, checkpoint={"every": 1}
    )
    assert rows[1]["safety/num_rollbacks"] == 1.0
    assert rows[2]["objective/kl_k3_per_token"] < 0.0001


def test_a_rollback_takes_back_the_moments_of_the_rewards_too(online_run):
    """Step 2 is not learned from, so what it scored is no part of what later scores are normalised by."""
    shaping = {
        "reward": {"function": "drpo.data.tasks.demo:true_rewards", "shaping": {"normalise": "running"}}
    }
    settings = {"num_steps": 2, "checkpoint": {"every": 1, "keep": 9}, **shaping}
    _, folder = online_run(kl={"max_per_token": 0.0001, "on_max": "rollback"}, **settings)
    states = [read_trainer_state(folder / "checkpoints" / f"step_{step}") for step in range(3)]
    assert states[1]["running"] != states[0]["running"] == states[2]["running"]


def test_the_kl_coefficient_waits_for_the_policy(online_run):
    """While the critic learns alone the KL is 0, which says nothing of the coefficient."""
    kl = {"target_per_token": 1.0, "horizon": 160}
    rows, _ = online_run(num_steps=4, kl=kl, critic={"pretrain_steps": 2})
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.05, 0.05, 0.05, 0.05 * 0.98])


def test_kl_limits_hold_for_a_token_not_an_episode(online_run):
    """With about 5 sampled tokens an episode, a limit of twice the KL per token lies below the KL per episode."""
    before, _ = online_run(num_steps=2)
    per_token, per_episode = (before[1][f"objective/kl_k3{unit}"] for unit in ("_per_token", ""))
    assert per_episode > 3 * per_token
    kl = {"estimator": "k3", "horizon": 160, "target_per_token": 2 * per_token}
    rows, _ = online_run(num_steps=3, kl={**kl, "max_per_token": 2 * per_token})
    # KL 0 in step 1, half the target or so in step 2, 16 episodes: twice down by 0.2 * 16 / 160 = 2%.
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.05, 0.05 * 0.98, 0.05 * 0.98**2])
    with pytest.raises(RuntimeError, match=r"step 2: .* nats per sampled token, above kl\.max_per_token"):
        online_run(kl={"max_per_token": per_token / 2})


@pytest.mark.parametrize(
    "weight_decay",
    [
        0.0,
        0.1,  # AdamW decays weights whose gradient is zero too
    ],
)
def test_the_policy_stands_still_while_the_critic_learns_alone(online_run, policy_folder, weight_decay):
    rows, folder = online_run(critic={"pretrain_steps": 3}, optim={"weight_decay": weight_decay})
    before = load_file(policy_folder / "model.safetensors")
    after = load_file(folder / "policy" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows[-1]["objective/kl_k3"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("pretrain_steps", [0, 1, 4])
def test_first_policy_update_after_critic_pretraining_has_the_size_of_the_learning_rate(
    online_run, policy_folder, pretrain_steps
):
    """Adam's first step is lr g / (|g| + eps). If 4 steps of gradient 0 counted, it would be
    (0.1 / (1 - 0.9^5)) / sqrt(0.05 / (1 - 0.95^5)) = 0.52 of that, and over 1 in later ones."""
    _, run = online_run(
        num_steps=pretrain_steps + 1,
        critic={"pretrain_steps": pretrain_steps},
        ppo={"num_epochs": 1, "num_minibatches": 1},
        optim={"eps": 1e-12, "betas": [0.9, 0.95]},
    )
    before = load_file(policy_folder / "model.safetensors")
    after = load_file(run / "policy" / "model.safetensors")
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).abs() / 1e-3
    assert moved.max() == pytest.approx(1.0, abs=1e-2)
    assert moved[moved > 0].median() == pytest.approx(1.0, abs=1e-2)


def test_learning_rate_schedule_of_the_policy_begins_after_critic_pretraining(online_run):
    """Linear with two steps of warm-up: 1/3, 2/3, then 1 - p with p = 0, 1/2; the critic's begins at once."""
    rows, _ = online_run(num_steps=6, critic={"pretrain_steps": 2}, optim={"warmup_steps": 2})
    policy = [row["optim/policy_learning_rate"] / 1e-3 for row in rows]
    critic = [row["optim/critic_learning_rate"] / 1e-3 for row in rows]
    assert policy == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1 / 2])
    assert critic == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4])


@pytest.mark.parametrize("last", [1, 2, 3])
def test_run_resumed_around_the_end_of_critic_pretraining_is_the_same(policy_folder, tmp_path, last):
    changes = {"num_steps": 4, "critic": {"pretrain_steps": 2}, "checkpoint": {"every": 1, "keep": 9}}
    run = tmp_path / "run"
    whole = list(map(reproducible, run_online(policy_folder, run, changes)))
    weights = load_file(run / "policy" / "model.safetensors")
    for later in range(last + 1, 5):
        shutil.rmtree(run / "checkpoints" / f"step_{later}")
    assert list(map(reproducible, run_online(policy_folder, run, changes))) == whole
    forget_precision()
    again = load_file(run / "policy" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_reward_that_is_not_finite_names_step_row_and_origin(online_run):
    calls = 0

    def broken(completions):
        nonlocal calls
        calls += 1
        return [math.nan if calls == 2 and row == 5 else 1.0 for row in range(len(completions))]

    with pytest.raises(
        FloatingPointError, match=r"step 2: the reward is not finite in row\(s\) 5 \(demo"
    ) as error:
        online_run(reward_fn=broken, checkpoint={"every": 1})
    assert "step_1" in str(error.value)


@pytest.mark.parametrize("earlier", [{"reward.url": "a"}, "a", None])
def test_a_run_goes_on_with_the_model_that_its_checkpoint_names_in_any_form(earlier):
    check_identities(earlier, {"reward.url": "a"})


@pytest.mark.parametrize(
    "earlier, now, message",
    [
        ("a", {"reward.url": "b"}, "reward.url: this run was trained on the scores of a, and b is there now"),
        ({"reward.url": "a"}, {"reward.url": "b"}, "reward.url: .* scores of a, and b is there now"),
        ({"reward.parts/j": "a"}, {}, "reward.parts/j: .* scores of a, and None is there now"),
        ({}, {"reward.parts/j": "a"}, "reward.parts/j: .* scores of None, and a is there now"),
    ],
)
def test_a_run_does_not_go_on_with_another_model(earlier, now, message):
    with pytest.raises(ConfigError, match=message):
        check_identities(earlier, now)


# --- an adaptive length without targets -------------------------------------------------------------------


def test_an_adaptive_length_needs_a_response_that_ends_within_the_limit(online_run, capsys):
    adaptive = {"reset": {"length": "adaptive"}, "num_steps": 1}
    message = (
        r"reset\.length=adaptive: 24 of 24 responses do not end within rollout\.max_response_length=8 tokens"
    )
    with pytest.raises(ConfigError, match=message):  # the demo's have 21 and more
        online_run(**adaptive)
    online_run(**adaptive, rollout={"max_response_length": 26})
    told = re.search(r"reset\.length=adaptive: (\d+) of 24 responses do not end", capsys.readouterr().out)
    assert 0 < int(told[1]) < 24
    by_score = {"length": "adaptive", "adaptive": {"target": "score"}}
    online_run(num_steps=1, reset=by_score)
    assert "responses do not end" not in capsys.readouterr().out


@pytest.mark.parametrize("missing_stop", ["none", "replace"])
def test_a_rollout_that_was_cut_off_succeeds_only_where_its_score_counts(online_run, missing_stop):
    """Every score reaches the target; each prompt is new, so the position falls by rate * (mean success - success)."""
    target = {"target": "score", "score": -1e9, "start": 0.5, "success": 0.25}
    rows, _ = online_run(
        num_steps=2,
        reset={"proportion": 1.0, "length": "adaptive", "adaptive": target},
        reward={"shaping": {"missing_stop": missing_stop}},
        rollout={"max_response_length": 60},
    )
    assert 0 < rows[0]["objective/ended"] < 1
    success = 1.0 if missing_stop == "none" else rows[0]["objective/ended"]
    assert rows[1]["reset/position"] == pytest.approx(0.5 - 0.5 * (success - 0.25))
