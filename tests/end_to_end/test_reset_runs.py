"""Resets that depend on the run: own rollouts, adaptive lengths, the initial policy. Real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from killed_runs import start, wait_for_step
from tiny_runs import ONLINE, SFT, assert_close, ddp, metrics_of, partitioned, plain, run, write_recipe

NUM_STEPS = 5
RESETS = {
    "own": {
        "proportion": 0.9,
        "proportion_schedule": "cosine",
        "source": "own",
        "own": {"size": 24},
        "per": "prompt",
        "length": "adaptive",
        "adaptive": {"margin": 0.1, "rate": 0.5},
        "min_length": 1,
    },
    "initial": {"source": "initial", "per": "prompt", "min_length": 1, "length_schedule": "linear"},
    "uft": {"length": "binomial", "length_schedule": "cosine", "min_length": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with an SFT policy, and a run of one process for every kind of resets."""
    folder = tmp_path_factory.mktemp("resets")
    write_recipe(folder / "sft.yaml", {**SFT, "run_dir": "sft"})
    run(plain("sft"), "sft.yaml", cwd=folder)
    for name, reset in RESETS.items():
        changes = {"num_steps": NUM_STEPS, "model": {"path": "sft/policy"}, "reset": reset}
        changes["rollout"] = {**ONLINE["rollout"], "rollouts_per_prompt": 2}
        changes["log"] = {"samples_every": 1, "num_samples": 16}
        write_recipe(folder / f"{name}.yaml", {**ONLINE, **changes})
        run(plain("drpo"), f"{name}.yaml", f"run_dir={name}", cwd=folder)
    return folder


def rollouts_of(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "rollout"]


@pytest.mark.parametrize("name", ["own", "initial"])
def test_the_rollouts_of_a_prompt_share_prompt_and_prefix(folder, name):
    rows = rollouts_of(folder / name)
    assert len(rows) == 16 * NUM_STEPS
    pairs = [(row["prompt"], row["prefix"]) for row in rows]
    assert pairs[::2] == pairs[1::2]
    assert any(prefix for _, prefix in pairs)


def test_own_prefixes_begin_rollouts_of_earlier_steps(folder):
    seen: list[str] = []
    for step in range(1, NUM_STEPS + 1):
        rows = [row for row in rollouts_of(folder / "own") if row["step"] == step]
        resets = [row["prompt"] + row["prefix"] for row in rows if row["prefix"]]
        assert all(any(text.startswith(begun) for text in seen) for begun in resets)
        assert bool(resets) == (1 < step < NUM_STEPS)  # the proportion is small in the end
        seen += [row["prompt"] + row["prefix"] + row["continuation"] for row in rows]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "initial")) for name in RESETS]
)
def test_a_killed_run_draws_on_as_an_uninterrupted_one(folder, name):
    killed = folder / f"killed_{name}"
    process = start(plain("drpo"), f"{name}.yaml", f"run_dir=killed_{name}", cwd=folder)
    wait_for_step(process, killed, 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "resuming" in run(plain("drpo"), f"{name}.yaml", f"run_dir=killed_{name}", cwd=folder)
    assert metrics_of(killed) == metrics_of(folder / name)
    assert rollouts_of(killed) == rollouts_of(folder / name)


def test_going_back_to_earlier_weights_takes_back_what_resets_remember(folder):
    guard = ["kl.max_per_token=1e-6", "kl.on_max=rollback", "num_steps=2", "checkpoint.keep=9"]
    run(plain("drpo"), "own.yaml", "run_dir=guarded", *guard, cwd=folder)
    assert "ppo/policy_loss" not in metrics_of(folder / "guarded")[2]  # step 2 went back to step 0
    states = [
        json.loads((folder / "guarded" / "checkpoints" / f"step_{step}" / "trainer.json").read_text())
        for step in range(3)
    ]
    assert states[1]["starts"] != states[0]["starts"] == states[2]["starts"]


@pytest.mark.parametrize("name", ["own", "initial"])
def test_two_processes_draw_what_one_does(folder, name):
    run(ddp("drpo"), f"{name}.yaml", f"run_dir=two_{name}", cwd=folder)
    assert_close(metrics_of(folder / name), metrics_of(folder / f"two_{name}"), 2e-4)


@pytest.mark.slow
def test_processes_that_share_every_weight_sample_from_the_initial_policy_if_only_one_resets(folder):
    changes = ["model.lora.r=4", "rollout.batch_size=4", "reset.proportion=0.3", "ppo.num_minibatches=1"]
    run(plain("drpo"), "initial.yaml", "run_dir=alone", *changes, cwd=folder)
    run(partitioned("drpo", folder), "initial.yaml", "run_dir=parts", *changes, cwd=folder)
    shares = [row["reset/share"] for row in metrics_of(folder / "alone")[1:]]
    assert 0 < max(shares) < 1  # of the two prompts of a step at most one is reset
    assert_close(metrics_of(folder / "alone"), metrics_of(folder / "parts"), 2e-4)


def test_the_user_is_told_that_a_baseline_compares_different_states(folder):
    changes = ["advantage.estimator=rloo", "num_steps=1", "run_dir=told"]
    assert "reset.per=prompt lets them share one" in run(plain("drpo"), "uft.yaml", *changes, cwd=folder)


def test_prefixes_of_the_initial_policy_do_not_depend_on_what_was_learned(folder):
    prefixes = [row["prefix"] for row in rollouts_of(folder / "initial")]
    assert any(prefixes)
    for name, changes in {"fast": ["optim.learning_rate=0.01"], "lora": ["model.lora.r=4"]}.items():
        run(plain("drpo"), "initial.yaml", f"run_dir={name}", *changes, cwd=folder)
        assert [row["prefix"] for row in rollouts_of(folder / name)] == prefixes
