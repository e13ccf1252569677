"""The online loop when something goes wrong, and while the critic learns alone."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from drpo.metrics import read_metrics


def test_a_kl_above_its_limit_stops_the_run_and_says_so(online_run, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"step 2: KL .* above kl\.max=0\.001\. Last checkpoint: .*step_1\."
    ):
        online_run(kl={"max": 0.001}, checkpoint={"every": 1})
    assert [row["step"] for row in read_metrics(tmp_path / "run1" / "metrics.jsonl")] == [1, 2]


def test_rolling_back_skips_the_update_and_counts(online_run):
    rows, _ = online_run(num_steps=2, kl={"max": 0.001, "on_max": "rollback"}, checkpoint={"every": 1})
    assert [row["safety/num_rollbacks"] for row in rows] == [0.0, 1.0]
    assert ["ppo/ratio" in row for row in rows] == [True, False]


def test_a_rollback_brings_the_kl_below_its_limit(online_run):
    rows, _ = online_run(num_steps=4, kl={"max": 0.001, "on_max": "rollback"}, checkpoint={"every": 1})
    assert rows[1]["safety/num_rollbacks"] == 1.0
    assert rows[2]["objective/kl_k3"] < 0.001


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
