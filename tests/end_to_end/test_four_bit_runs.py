"""Whole runs over a base in 4 bits: SFT, preference and online training, launchers, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from offline_runs import SFT as OFFLINE_SFT
from offline_runs import reproducible_rows, run_offline, run_preference, run_reward_model
from online_runs import run_online, save_tiny_policy, true_rewards
from safetensors.torch import load_file
from tiny_runs import (
    ONLINE,
    SFT,
    assert_close,
    assert_same_policy,
    ddp,
    deepspeed,
    finished,
    metrics_of,
    partitioned,
    plain,
    run,
    write_recipe,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.config import ConfigError
from drpo.engine import Engine, EngineConfig
from drpo.models.nf4_linear import NF4Linear
from drpo.trainers import sft
from reward_models.score import RewardModelScorer

LORA = {"lora": {"r": 2}}
IN_4BIT = {**LORA, "load_in_4bit": True}
MATRICES = ("attention", "mlp")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "policy"
    save_tiny_policy(folder)
    return folder


@pytest.fixture(scope="module")
def rounded(policy, tmp_path_factory) -> Path:
    """The dense policy with the numbers that its linear layers have in 4 bits."""
    folder = tmp_path_factory.mktemp("rounded") / "policy"
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        for name, layer in model.gpt_neox.layers.named_modules():
            if isinstance(layer, torch.nn.Linear):
                packed = NF4Linear.of(layer.weight, None, False, torch.device("cpu"))
                assert any(part in name for part in MATRICES)
                layer.weight.copy_(packed.dense_weight())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return folder


def saved(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "policy" / "model.safetensors")


@pytest.fixture(params=["sft", "dpo", "drpo", "drpo above a frozen trunk"])
def trained(request, tmp_path):
    """A function that runs a stage from a policy with changes of its model, and returns metrics and folder."""

    def start(name: str, path: Path, **model) -> tuple[list[dict], Path]:
        run_dir = tmp_path / name
        if request.param == "sft":
            changes = {**OFFLINE_SFT, "model": {"path": str(path), **model}}
            _, rows = run_offline(sft.SFTRecipe, lambda r, e: sft.train(r, e, {}), run_dir, changes)
        elif request.param == "dpo":
            _, rows = run_preference(path, run_dir, model=model)
        else:
            trunk = {"trainable_layers": 1} if "trunk" in request.param else {}
            rows = run_online(path, run_dir, {"model": {**model, **trunk}})
        return reproducible_rows(rows), run_dir

    return start


def test_a_run_in_4_bits_is_the_run_from_the_dense_policy_with_its_numbers(policy, rounded, trained):
    rows, run_dir = trained("packed", policy, **IN_4BIT)
    expected, dense = trained("dense", rounded, **LORA)
    assert_close(rows, expected, 2e-4)
    assert_same_policy(run_dir, dense)
    changed = {
        name
        for name, weight in saved(run_dir).items()
        if not torch.equal(weight, load_file(rounded / "model.safetensors")[name])
    }
    assert changed and all(any(part in name for part in MATRICES) for name in changed)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_first_ratio_is_exactly_one(policy, tmp_path, precision):
    once = {"num_epochs": 1, "num_minibatches": 1}
    changes = {"model": IN_4BIT, "ppo": once, "engine": {"mixed_precision": precision}}
    for row in run_online(policy, tmp_path / "run", changes):
        assert row["ppo/ratio"] == pytest.approx(1.0, abs=1e-6) and row["ppo/clip_fraction"] == 0.0
        assert row["ppo/approx_kl"] < 1e-10
    assert row["objective/kl_k3"] > 1e-4  # and the policy did move


def test_checkpointing_and_a_folded_adapter_change_no_result(policy, tmp_path):
    changes = {"checkpointed": {"gradient_checkpointing": True}, "folded": {}}
    expected = run_online(policy, tmp_path / "plain", {"model": IN_4BIT})
    for name, model in changes.items():
        rollout = {"fold_lora": name == "folded"}
        rows = run_online(policy, tmp_path / name, {"model": {**IN_4BIT, **model}, "rollout": rollout})
        assert_close(reproducible_rows(rows), reproducible_rows(expected), 2e-4)
        assert_same_policy(tmp_path / name, tmp_path / "plain")


def test_a_dense_reward_model_beside_a_critic_that_started_from_it(policy, tmp_path):
    run_reward_model(tmp_path / "rm", policy=policy)
    path = str(tmp_path / "rm" / "reward_model")
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, 1.0)
    scorer = RewardModelScorer.load(path, engine, 8, "float32", str(policy))
    rows = run_online(policy, tmp_path / "run", {"model": IN_4BIT, "critic": {"path": path}}, scorer)
    assert not any(isinstance(layer, NF4Linear) for layer in scorer.model.modules())
    assert rows[-1]["ppo/value_loss"] > 0


def test_reference_log_probs_of_another_precision_of_the_base_are_refused(policy, tmp_path):
    cache = {"reference": {"cache_dir": str(tmp_path / "cache")}}
    uncached = run_preference(policy, tmp_path / "uncached", model=IN_4BIT)[1]
    cached = run_preference(policy, tmp_path / "cached", model=IN_4BIT, **cache)[1]
    assert_close(reproducible_rows(cached), reproducible_rows(uncached), 1e-5)
    with pytest.raises(ConfigError, match="dtype: float32, linear layers in 4 bits -> float32"):
        run_preference(policy, tmp_path / "dense", model=LORA, **cache)


def test_a_run_that_failed_and_is_resumed_equals_one_that_did_not(policy, tmp_path):
    changes = {"model": IN_4BIT, "checkpoint": {"every": 1}, "num_steps": 4}
    expected = run_online(policy, tmp_path / "whole", changes)
    num_calls = 0

    def fails_in_the_third_step(completions) -> list[float]:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 2:
            raise ZeroDivisionError
        return true_rewards(completions)

    with pytest.raises(ZeroDivisionError):
        run_online(policy, tmp_path / "failed", changes, fails_in_the_third_step)
    assert metrics_of(tmp_path / "failed")[-1]["step"] == 2
    rows = run_online(policy, tmp_path / "failed", changes)
    assert reproducible_rows(rows) == reproducible_rows(expected)
    assert_same_policy(tmp_path / "failed", tmp_path / "whole", 0)


# --- real processes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four_bit")
    write_recipe(folder / "sft.yaml", {**SFT, "run_dir": "sft"})
    recipe = {**ONLINE, "model": {"path": "sft/policy", "lora": {"r": 4}, "load_in_4bit": True}}
    write_recipe(folder / "drpo.yaml", recipe)
    run(plain("sft"), "sft.yaml", cwd=folder)
    run(plain("drpo"), "drpo.yaml", "run_dir=whole", cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ddp, lambda script: deepspeed(script, 2)], ids=["ddp", "zero2"])
def test_two_processes_equal_one(folder, launcher, request):
    name = request.node.callspec.id
    run(launcher("drpo"), "drpo.yaml", f"run_dir={name}", "ppo.microbatch_size=4", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / name), 2e-4)
    assert_same_policy(folder / "whole", folder / name)


@pytest.mark.slow
def test_deepspeed_in_bf16_trains_over_the_base_of_one_process(folder):
    settings = [
        "model.dtype=bfloat16",
        "engine.mixed_precision=bf16",
        "ppo.num_epochs=1",
        "ppo.num_minibatches=1",
    ]
    run(plain("drpo"), "drpo.yaml", "run_dir=half", *settings, cwd=folder)
    command = ["bf16" if part == "no" else part for part in deepspeed("drpo", 2)]
    run(command, "drpo.yaml", "run_dir=half_zero2", *settings, cwd=folder)
    for row in metrics_of(folder / "half_zero2")[1:]:
        assert row["ppo/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert_same_policy(folder / "half", folder / "half_zero2")


@pytest.mark.slow
def test_weights_that_would_be_cut_are_refused_at_the_start(folder):
    done = finished(partitioned("drpo", folder), "drpo.yaml", "run_dir=refused", cwd=folder)
    assert done.returncode != 0
    assert "model.load_in_4bit does not work under ZeRO-3" in done.stderr + done.stdout
