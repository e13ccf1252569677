"""Monte-Carlo values in several processes, whose rollouts have unlike numbers of states."""

from __future__ import annotations

from pathlib import Path

import pytest
from offline_runs import run_reward_model, run_sft
from online_runs import merged
from tiny_runs import ONLINE, assert_close, ddp, metrics_of, partitioned, plain, run, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A recipe on a reward model, and its run by one process, `one`."""
    folder = tmp_path_factory.mktemp("vine")
    run_sft(folder / "sft", data={"demo": {"num_train": 24, "num_eval": 6}})
    run_reward_model(folder / "rm", policy=folder / "sft" / "policy")
    changes = {
        "num_steps": 2,
        "model": {"path": "sft/policy"},
        "reward": {"function": None, "path": "rm/reward_model", "batch_size": 4},
        "advantage": {"estimator": "vine"},
        "vine": {"every": 2, "num_rollouts": 3},
        "eval": {"every": 0},
        "ppo": {"microbatch_size": 4},
    }
    write_recipe(folder / "vine.yaml", merged(ONLINE, changes))
    run(plain("drpo"), "vine.yaml", "run_dir=one", cwd=folder)
    return folder


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes_equal_one(folder, launcher):
    """Under ZeRO-3 the reward model is cut in pieces: both processes must score equally many continuations."""
    command = partitioned("drpo", folder) if launcher == "zero3" else ddp("drpo")
    run(command, "vine.yaml", f"run_dir={launcher}", "rollout.generation_batch_size=5", cwd=folder)
    rows = metrics_of(folder / "one")
    assert len(rows) == 2 and all(row["vine/num_states"] > 16 for row in rows)
    assert_close(rows, metrics_of(folder / launcher), 2e-4)
