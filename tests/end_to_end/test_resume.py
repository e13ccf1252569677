"""A run that is killed and resumed writes the same metrics as one that is not. Real processes, real signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from killed_runs import start, wait_for_step
from tiny_runs import (
    ONLINE,
    PREFERENCE,
    SEVERAL,
    SFT,
    ddp,
    deepspeed,
    finished,
    metrics_of,
    partitioned,
    plain,
    run,
    write_recipe,
)

NUM_STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_recipe(folder / "sft.yaml", {**SFT, "run_dir": "sft"})
    recipe = {**ONLINE, "num_steps": NUM_STEPS, "model": {"path": "sft/policy"}}
    recipe["reward"] = {**ONLINE["reward"], "shaping": {"missing_stop": "subtract", "normalise": "running"}}
    write_recipe(folder / "drpo.yaml", recipe)
    run(plain("sft"), "sft.yaml", cwd=folder)
    return folder


@pytest.mark.parametrize("launcher", [plain, ddp], ids=["one process", "two processes"])
def test_killed_and_resumed_equals_uninterrupted(folder, launcher):
    name = launcher.__name__
    run(launcher("drpo"), "drpo.yaml", f"run_dir=whole_{name}", cwd=folder)
    killed = folder / f"killed_{name}"
    for step in (2, 4):  # twice: a resumed run can be killed as well
        process = start(launcher("drpo"), "drpo.yaml", f"run_dir=killed_{name}", cwd=folder)
        wait_for_step(process, killed, step)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(launcher("drpo"), "drpo.yaml", f"run_dir=killed_{name}", cwd=folder)
    whole = metrics_of(folder / f"whole_{name}")
    assert [row["step"] for row in whole] == list(range(NUM_STEPS + 1))
    assert metrics_of(killed) == whole
    assert completions(killed) == completions(folder / f"whole_{name}")
    resets = [(path / "resets.jsonl").read_bytes() for path in (killed, folder / f"whole_{name}")]
    assert resets[0] == resets[1] and resets[0].count(b"\n") == NUM_STEPS
    weights = [
        (run_dir / "policy" / "model.safetensors").read_bytes()
        for run_dir in (killed, folder / f"whole_{name}")
    ]
    assert weights[0] == weights[1]


def completions(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def test_sigterm_saves_says_so_and_the_run_goes_on(folder):
    process = start(plain("drpo"), "drpo.yaml", "run_dir=terminated", "checkpoint.every=0", cwd=folder)
    wait_for_step(process, folder / "terminated", 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "SIGTERM: saved terminated/checkpoints/step_" in (folder / "log.txt").read_text()
    out = run(plain("drpo"), "drpo.yaml", "run_dir=terminated", "checkpoint.every=0", cwd=folder)
    assert "resuming terminated after step" in out
    assert [row["step"] for row in metrics_of(folder / "terminated")] == list(range(NUM_STEPS + 1))


def test_a_finished_run_is_not_run_again(folder):
    run(plain("sft"), "sft.yaml", "run_dir=finished", cwd=folder)
    before = (folder / "finished" / "metrics.jsonl").read_bytes()
    run(plain("sft"), "sft.yaml", "run_dir=finished", cwd=folder)
    assert (folder / "finished" / "metrics.jsonl").read_bytes() == before


def test_other_settings_are_refused_by_name(folder):
    run(plain("sft"), "sft.yaml", "run_dir=refused", cwd=folder)
    done = finished(plain("sft"), "sft.yaml", "run_dir=refused", "seed=5", cwd=folder)
    assert done.returncode != 0
    assert "seed: 0 -> 5" in done.stderr and "resume=restart" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("on_max", ["stop", "rollback"])
def test_a_kl_above_the_guard_stops_or_rolls_back(folder, on_max):
    arguments = ["drpo.yaml", f"run_dir=guard_{on_max}", "kl.max_per_token=1e-6", f"kl.on_max={on_max}"]
    if on_max == "stop":
        done = finished(plain("drpo"), *arguments, cwd=folder)
        assert done.returncode != 0
        assert "kl.max_per_token=1e-06" in done.stderr and "guard_stop/checkpoints/step_1" in done.stderr
    else:
        run(plain("drpo"), *arguments, cwd=folder)
        rows = metrics_of(folder / "guard_rollback")[1:]
        assert "ppo/policy_loss" in rows[0] and "ppo/policy_loss" not in rows[1]
        assert rows[-1]["safety/num_rollbacks"] >= 1


# --- preference training: a reference that moves is a second model to resume --------------------------------

PREFERENCES = {
    "curry": ({"num_steps": 3, "curriculum": {"num_stages": 2}}, (3, 4)),  # between stages, and inside one
    "tr_dpo": (
        {
            "num_steps": 6,
            "model": {"path": "sft/policy", "lora": {"r": 4}},
            "reference": {"sync_every": 2, "sync_mix": 0.5},
        },
        (3, 4),
    ),
}


@pytest.fixture(scope="module")
def preferences(folder) -> Path:
    for name, (changes, _) in PREFERENCES.items():
        write_recipe(folder / f"{name}.yaml", {**PREFERENCE, **changes})
    return folder


def test_a_killed_curriculum_equals_an_uninterrupted_one(preferences):
    run(plain("dpo"), "curry.yaml", "run_dir=curry_whole", cwd=preferences)
    process = start(plain("dpo"), "curry.yaml", "run_dir=curry_killed", cwd=preferences)
    wait_for_step(process, preferences / "curry_killed", 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    out = run(plain("dpo"), "curry.yaml", "run_dir=curry_killed", cwd=preferences)
    assert "resuming curry_killed after step" in out
    assert_same_run(preferences / "curry_whole", preferences / "curry_killed")


def assert_same_run(whole: Path, resumed: Path) -> None:
    rows = metrics_of(whole)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert metrics_of(resumed) == rows
    assert completions(resumed) == completions(whole)
    weights = [(folder / "policy" / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_two_processes_resume_a_reference_that_moves(preferences, launcher):
    """From what a kill right after a checkpoint leaves."""
    command = {
        "ddp": lambda: ddp(SEVERAL),
        "zero2": lambda: deepspeed(SEVERAL, 2),
        "zero3": lambda: partitioned(SEVERAL, preferences),
    }[launcher]()
    recipes = [f"{name}.yaml" for name in PREFERENCES]
    run([*command, launcher], *recipes, "batch.microbatch_size=2", cwd=preferences)
    for i in (0, 1):
        for name, (_, steps) in PREFERENCES.items():
            whole, resumed = preferences / f"{launcher}_{name}", preferences / f"{launcher}{i}_{name}"
            shutil.copytree(whole, resumed)
            shutil.rmtree(resumed / "policy")
            for step in range(steps[i] + 1, 7):
                shutil.rmtree(resumed / "checkpoints" / f"step_{step}")
        run([*command, f"{launcher}{i}"], *recipes, "batch.microbatch_size=2", cwd=preferences)
        for name in PREFERENCES:
            assert_same_run(preferences / f"{launcher}_{name}", preferences / f"{launcher}{i}_{name}")
