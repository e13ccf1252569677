"""Scores beside those of the rollouts in several processes, which have unlike numbers of them, by a reward model."""

from __future__ import annotations

from pathlib import Path

import pytest
from offline_runs import run_reward_model, run_sft
from online_runs import merged
from tiny_runs import (
    ONLINE,
    assert_close,
    assert_same_policy,
    ddp,
    metrics_of,
    partitioned,
    plain,
    run,
    write_recipe,
)

RUNS = {
    "vine": {"advantage": {"estimator": "vine"}, "vine": {"every": 2, "num_rollouts": 3}},
    "adaptive": {
        "reset": {"proportion": 0.4, "length": "adaptive", "adaptive": {"start": 0.5}},
        "rollout": {"max_response_length": 40},  # as long as the responses that are reset to
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Recipes on a reward model, and for each its run by one process, `<name>_one`."""
    folder = tmp_path_factory.mktemp("further_scores")
    run_sft(folder / "sft", data={"demo": {"num_train": 24, "num_eval": 6}})
    run_reward_model(folder / "rm", policy=folder / "sft" / "policy")
    common = {
        "num_steps": 2,
        "model": {"path": "sft/policy"},
        "reward": {"function": None, "path": "rm/reward_model", "batch_size": 4},
        "eval": {"every": 0},
        "ppo": {"microbatch_size": 4},
    }
    for name, changes in RUNS.items():
        write_recipe(folder / f"{name}.yaml", merged(merged(ONLINE, common), changes))
        run(plain("drpo"), f"{name}.yaml", f"run_dir={name}_one", cwd=folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes_equal_one(folder, name, launcher):
    """Under ZeRO-3 the reward model is cut in pieces: both processes must score equally many responses."""
    command = partitioned("drpo", folder) if launcher == "zero3" else ddp("drpo")
    run(command, f"{name}.yaml", f"run_dir={name}_{launcher}", "rollout.generation_batch_size=5", cwd=folder)
    rows = metrics_of(folder / f"{name}_one")
    assert_close(rows, metrics_of(folder / f"{name}_{launcher}"), 2e-4)
    assert_same_policy(folder / f"{name}_one", folder / f"{name}_{launcher}")
    assert len(rows) == 2
    if name == "vine":
        assert all(row["vine/num_states"] > 16 for row in rows)
    else:
        assert all(0 < row["reset/share"] < 1 and "reset/source_score" in row for row in rows)
        assert len({row["reset/position"] for row in rows}) == 2
