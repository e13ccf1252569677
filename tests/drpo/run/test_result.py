"""The model of a run as folders: at the end, and on its way where the recipe asks for it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.run.folder import CheckpointConfig


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def check_steps(run_dir, last):
    """Steps 2 and 4 are there and no others, whole and different; the last of them is the result."""
    assert sorted(path.name for path in run_dir.glob("policy_step_*")) == [
        "policy_step_2",
        f"policy_step_{last}",
    ]
    early, late = weights(run_dir / "policy_step_2"), weights(run_dir / f"policy_step_{last}")
    assert not same(early, late) and same(late, weights(run_dir / "policy"))
    assert AutoTokenizer.from_pretrained(run_dir / "policy_step_2").eos_token_id is not None
    assert (run_dir / "policy_step_2" / "README.md").is_file()


def test_an_online_run_leaves_its_policies_on_the_way_and_trains_as_without_them(online_run):
    plain, _ = online_run(num_steps=4)
    rows, run_dir = online_run(num_steps=4, checkpoint={"every": 0, "model_every": 2})
    check_steps(run_dir, 4)
    losses = [[row["ppo/policy_loss"] for row in each if "ppo/policy_loss" in row] for each in (plain, rows)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_so_does_a_preference_run(preference_run):
    _, run_dir = preference_run(num_steps=4, checkpoint={"every": 0, "model_every": 2})
    check_steps(run_dir, 4)


def test_a_number_of_steps_below_zero_is_refused():
    with pytest.raises(ValueError, match="^model_every must be >= 0, got -1"):
        CheckpointConfig(model_every=-1)
