"""Whole runs with frozen models that are rounded, shared or cut over processes: the numbers of those that are not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from offline_runs import run_reward_model, run_sft
from online_runs import RECIPE, merged, run_online
from tiny_runs import (
    ONLINE,
    assert_close,
    deepspeed,
    metrics_of,
    partitioned,
    plain,
    run,
    write_recipe,
)

from drpo import engine as engine_module
from drpo.engine import Engine, EngineConfig
from drpo.run.metrics import reproducible
from drpo.trainers import online_models
from reward_models import score
from reward_models.score import RewardModelScorer

BF16 = {"mixed_precision": "bf16"}
LORA = {"lora": {"r": 2}}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """An SFT policy, and a reward model that started from it."""
    folder = tmp_path_factory.mktemp("chain")
    run_sft(folder / "sft", data={"demo": {"num_train": 24, "num_eval": 6}})
    run_reward_model(folder / "rm", policy=folder / "sft" / "policy")
    return folder


def reproducible_rows(rows: list[dict]) -> list[dict]:
    return [reproducible(row) for row in rows]


def with_reward_model(chain: Path, run_dir: Path, precision: str = "no", **changes) -> list[dict]:
    """A run with LoRA whose critic starts from the reward model."""
    reward_model = str(chain / "rm" / "reward_model")
    engine = Engine(EngineConfig(mixed_precision=precision, trackers=[]), run_dir, 0, 1.0)
    scorer = RewardModelScorer.load(reward_model, engine, 8, "float32", str(chain / "sft" / "policy"))
    recipe = merged(
        {
            "num_steps": 2,
            "model": LORA,
            "critic": {"path": reward_model},
            "engine": {"mixed_precision": precision},
        },
        changes,
    )
    recipe = merged(RECIPE, recipe)
    return reproducible_rows(run_online(chain / "sft" / "policy", run_dir, recipe, scorer))


def test_rounded_frozen_weights_change_no_number_of_a_run(chain, tmp_path, monkeypatch):
    rounded = with_reward_model(chain, tmp_path / "rounded", "bf16")
    monkeypatch.setattr(engine_module, "round_frozen", lambda module: None)
    assert rounded == with_reward_model(chain, tmp_path / "kept", "bf16")


def test_a_rounded_reference_changes_no_number_of_preference_training(preference_run, monkeypatch):
    rounded, _ = preference_run(engine=BF16)
    monkeypatch.setattr(engine_module, "round_frozen", lambda module: None)
    kept, _ = preference_run(engine=BF16)
    assert rounded == kept
    assert rounded[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-7)  # the log-ratios begin at 0


def test_weights_in_memory_once_change_no_number_of_a_run(chain, tmp_path, monkeypatch):
    shared = with_reward_model(chain, tmp_path / "shared")
    for module in (online_models, score):
        monkeypatch.setattr(module, "share_frozen", lambda model, source: None)
    assert shared == with_reward_model(chain, tmp_path / "apart")


def test_rollouts_of_a_folded_adapter_are_those_of_the_adapter(online_run):
    """In float32 the sum is rounded by too little to change a token of these rollouts."""
    log = {"samples_every": 1}
    plain_rows, plain_folder = online_run(model=LORA, log=log)
    folded_rows, folder = online_run(model=LORA, log=log, rollout={"fold_lora": True})
    samples = [(path / "samples.jsonl").read_text() for path in (plain_folder, folder)]
    assert samples[0] == samples[1]
    assert_close(*[reproducible_rows(rows) for rows in (plain_rows, folded_rows)], 1e-4)


def test_the_first_ratio_is_exactly_one_above_a_rounded_base(online_run):
    ppo = {"num_epochs": 1, "num_minibatches": 1}
    rows, _ = online_run(engine=BF16, model=LORA, ppo=ppo)
    for row in rows:
        assert row["ppo/ratio"] == pytest.approx(1.0, abs=1e-6) and row["ppo/approx_kl"] < 1e-10
    assert (
        rows[0]["objective/kl_k3"] == 0.0
    )  # the adapter is the identity, and the reference has the same base


@pytest.fixture(scope="module")
def folder(chain) -> Path:
    """Recipes for real processes, with the reward model; an odd number of held-out prompts."""
    recipe = merged(
        ONLINE,
        {
            "num_steps": 2,
            "model": {"path": "sft/policy"},
            "reward": {"function": None, "path": "rm/reward_model", "batch_size": 4},
            "eval": {"num_prompts": 5},
        },
    )
    write_recipe(chain / "full.yaml", recipe)
    write_recipe(chain / "lora.yaml", merged(recipe, {"model": LORA, "critic": {"path": "rm/reward_model"}}))
    write_recipe(
        chain / "offloaded.yaml",
        merged(recipe, {"kl": {"offload_reference": True}, "reward": {"offload": True}}),
    )
    for name in ("full", "lora", "offloaded"):
        run(plain("drpo"), f"{name}.yaml", f"run_dir={name}", cwd=chain)
    return chain


def test_models_that_wait_on_the_host_change_no_number(folder):
    assert metrics_of(folder / "offloaded") == metrics_of(folder / "full")


@pytest.mark.parametrize("launcher", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["full", "lora", "offloaded"])
def test_processes_with_a_reward_model_and_a_reference_equal_one(folder, kind, launcher):
    """Under ZeRO-3 both are cut in pieces, and an odd prompt leaves one process with less to evaluate."""
    command = partitioned("drpo", folder) if launcher == "zero3" else deepspeed("drpo", 2)
    run(command, f"{kind}.yaml", f"run_dir={kind}_{launcher}", "ppo.microbatch_size=4", cwd=folder)
    assert_close(metrics_of(folder / kind), metrics_of(folder / f"{kind}_{launcher}"), 2e-4)
