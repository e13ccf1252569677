"""Two FSDP2 processes on CPU against one process: every trainer, exact resume, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from online_runs import merged
from safetensors.torch import load_file
from tiny_runs import (
    ONLINE,
    PREFERENCE,
    SEVERAL,
    SFT,
    assert_close,
    finished,
    fsdp2,
    metrics_of,
    plain,
    run,
    write_recipe,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
REWARD_MODEL = {key: value for key, value in SFT.items() if key not in ("model", "sample")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy, a reward model, and an online run with it by one process; an odd number of held-out prompts."""
    folder = tmp_path_factory.mktemp("fsdp")
    write_recipe(folder / "sft.yaml", SFT)
    write_recipe(folder / "rm.yaml", {**REWARD_MODEL, "model": {"path": "sft/policy"}})
    reward = {"function": None, "path": "rm/reward_model", "batch_size": 4}
    online = merged(ONLINE, {"model": {"path": "sft/policy"}, "reward": reward, "eval": {"num_prompts": 5}})
    write_recipe(folder / "drpo.yaml", online)
    run(plain("sft"), "sft.yaml", "run_dir=sft", cwd=folder)
    run(plain("reward_model"), "rm.yaml", "run_dir=rm", cwd=folder)
    run(plain("drpo"), "drpo.yaml", "run_dir=alone", cwd=folder)
    return folder


def assert_same_run(left: Path, right: Path, model: str = "policy") -> None:
    assert_close(metrics_of(left), metrics_of(right), 2e-4)
    a, b = (load_file(path / model / "model.safetensors") for path in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def sharded(folder) -> Path:
    """The online run by two processes, each with half of every weight, gradient and moment."""
    run(fsdp2("drpo"), "drpo.yaml", "run_dir=sharded", "ppo.microbatch_size=2", cwd=folder)
    return folder / "sharded"


def test_two_sharded_processes_equal_one(folder, sharded):
    assert_same_run(folder / "alone", sharded)
    parts = (sharded / "checkpoints" / "step_4" / "pytorch_model_fsdp_0").glob("*.distcp")
    sizes = [part.stat().st_size for part in parts]
    assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes), "each process holds half of the weights"


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(folder, sharded):
    """From what a kill right after a checkpoint leaves."""
    resumed = folder / "resumed"
    shutil.copytree(sharded, resumed)
    shutil.rmtree(resumed / "policy")
    shutil.rmtree(resumed / "checkpoints" / "step_4")
    out = run(fsdp2("drpo"), "drpo.yaml", "run_dir=resumed", "ppo.microbatch_size=2", cwd=folder)
    assert "resuming resumed after step 3" in out
    assert metrics_of(resumed) == metrics_of(sharded)
    weights = [(path / "policy" / "model.safetensors").read_bytes() for path in (sharded, resumed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["stored", "recomputed"])
def test_tied_weights_and_recomputed_activations(folder, changes):
    recipe = {**SFT, "model": {**SFT["model"], "architecture": LLAMA}, "num_steps": 3}
    write_recipe(folder / "llama.yaml", recipe)
    settings = [f"model.{key}={str(value).lower()}" for key, value in changes.items()]
    name = "_".join(["llama", *changes])
    run(plain("sft"), "llama.yaml", f"run_dir={name}", cwd=folder)
    run(fsdp2("sft"), "llama.yaml", f"run_dir={name}_two", "batch.microbatch_size=2", *settings, cwd=folder)
    assert_same_run(folder / name, folder / f"{name}_two")


@pytest.mark.slow
def test_reward_model_of_two_sharded_processes_is_that_of_one(folder):
    run(fsdp2("reward_model"), "rm.yaml", "run_dir=rm_two", "batch.microbatch_size=2", cwd=folder)
    assert_same_run(folder / "rm", folder / "rm_two", "reward_model")


PREFERENCES = {
    "dr_dpo": {"loss": {"dr_dpo": {"beta_prime": 0.5}}},
    "follows": {"reference": {"sync_every": 2, "sync_mix": 0.5}},
    "cached": {"reference": {"cache_dir": "cache"}},
    "curry": {"num_steps": 2, "curriculum": {"num_stages": 2, "order": "reference_gap"}},
    "kto": {"loss": {"name": "kto"}},
}


@pytest.mark.slow
def test_two_sharded_processes_train_the_same_preferences(folder):
    for name, changes in PREFERENCES.items():
        write_recipe(folder / f"{name}.yaml", {**PREFERENCE, **changes})
    recipes = [f"{name}.yaml" for name in PREFERENCES]
    run([*plain(SEVERAL), "one"], *recipes, cwd=folder)
    shutil.rmtree(folder / "cache")
    run([*fsdp2(SEVERAL), "two"], *recipes, "batch.microbatch_size=2", cwd=folder)
    for name in PREFERENCES:
        assert_same_run(folder / f"one_{name}", folder / f"two_{name}")


@pytest.mark.slow
def test_bf16_is_that_of_one_process_and_the_first_ratio_is_one(folder):
    settings = ["num_steps=1", "engine.mixed_precision=bf16", "ppo.num_epochs=1", "ppo.num_minibatches=1"]
    run(plain("drpo"), "drpo.yaml", "run_dir=bf16_alone", *settings, cwd=folder)
    run(fsdp2("drpo"), "drpo.yaml", "run_dir=bf16", *settings, cwd=folder)
    alone, row = (metrics_of(folder / name)[1] for name in ("bf16_alone", "bf16"))
    # If all weights and outputs were rounded, the policy would differ from its own reference.
    assert row["objective/kl_k1"] == row["objective/kl_k3"] == 0
    assert row["ppo/entropy"] == pytest.approx(alone["ppo/entropy"], abs=1e-4)
    assert row["ppo/ratio"] == pytest.approx(1.0, abs=1e-6) and row["ppo/approx_kl"] < 1e-10
    weights = load_file(folder / "bf16" / "policy" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ((), ["model.lora.r=2"], "model.lora.r does not work under FSDP"),
        (("--fsdp_version", "1"), [], "fsdp_version must be 2"),
    ],
)
def test_what_cannot_be_sharded_is_refused_at_the_start(folder, options, settings, message):
    done = finished(fsdp2("drpo", *options), "drpo.yaml", "run_dir=refused", *settings, cwd=folder)
    assert done.returncode != 0 and message in done.stdout + done.stderr
    assert not (folder / "refused").exists()
