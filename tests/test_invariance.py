"""Settings that must not change the result: micro-batches, processes, DeepSpeed stages, PPO as DR-PO without resets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    ONLINE,
    SFT,
    assert_close,
    ddp,
    deepspeed,
    metrics_of,
    plain,
    run,
    write_recipe,
)
from transformers import AutoModelForCausalLM

from drpo.models.loading import LoraConfig, ModelConfig, load_policy
from drpo.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with an SFT policy, a DR-PO recipe, and its run by one process with whole minibatches."""
    folder = tmp_path_factory.mktemp("invariance")
    write_recipe(folder / "sft.yaml", {**SFT, "run_dir": "sft"})
    write_recipe(folder / "drpo.yaml", {**ONLINE, "model": {"path": "sft/policy"}})
    run(plain("sft"), "sft.yaml", cwd=folder)
    run(plain("drpo"), "drpo.yaml", "run_dir=whole", cwd=folder)
    return folder


def assert_same_policy(left: Path, right: Path, tolerance: float) -> None:
    a, b = (load_file(path / "policy" / "model.safetensors") for path in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def test_the_run_learns_something_to_be_invariant_about(folder):
    before, after = (load_file(folder / run / "policy" / "model.safetensors") for run in ("sft", "whole"))
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 1e-3
    rows = metrics_of(folder / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(
        row["ppo/num_optimizer_steps"] == 4 for row in rows[1:]
    )  # 2 epochs x 2 minibatches, the last too
    assert any(row["reset/share"] > 0 for row in rows[1:])


def test_eight_accumulated_microbatches_equal_one(folder):
    run(plain("drpo"), "drpo.yaml", "run_dir=accumulated", "ppo.microbatch_size=1", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / "accumulated"), 2e-4)
    assert_same_policy(folder / "whole", folder / "accumulated", 2e-4)


def test_two_processes_equal_one(folder):
    run(ddp("drpo"), "drpo.yaml", "run_dir=two", "ppo.microbatch_size=4", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / "two"), 2e-4)
    assert_same_policy(folder / "whole", folder / "two", 2e-4)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_deepspeed_processes_equal_one(folder, stage):
    run(deepspeed("drpo", stage), "drpo.yaml", f"run_dir=zero{stage}", "ppo.microbatch_size=2", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / f"zero{stage}"), 2e-4)
    assert_same_policy(folder / "whole", folder / f"zero{stage}", 2e-4)


def test_ppo_is_drpo_without_resets_bit_for_bit(folder):
    run(plain("drpo"), "drpo.yaml", "run_dir=beta0", "reset.proportion=0", cwd=folder)
    run(plain("ppo"), "drpo.yaml", "run_dir=ppo", cwd=folder)
    beta_zero, ppo = metrics_of(folder / "beta0"), metrics_of(folder / "ppo")
    assert beta_zero == ppo
    assert all(row["reset/share"] == 0 for row in ppo[1:])
    assert_same_policy(folder / "beta0", folder / "ppo", 0.0)


def test_two_processes_train_the_same_sft_policy(folder):
    run(ddp("sft"), "sft.yaml", "run_dir=sft_two", "batch.microbatch_size=1", cwd=folder)
    assert_close(metrics_of(folder / "sft"), metrics_of(folder / "sft_two"), 1e-4)
    assert_same_policy(folder / "sft", folder / "sft_two", 1e-4)


@pytest.fixture(scope="module")
def lora_run(folder) -> Path:
    """The same run with adapters on the policy and the critic in place of all weights."""
    run(plain("drpo"), "drpo.yaml", "run_dir=lora", "model.lora.r=4", cwd=folder)
    return folder / "lora"


def test_two_processes_with_lora_equal_one(folder, lora_run):
    two = ["run_dir=lora_two", "model.lora.r=4", "ppo.microbatch_size=4"]
    run(ddp("drpo"), "drpo.yaml", *two, cwd=folder)
    assert_close(metrics_of(lora_run), metrics_of(folder / "lora_two"), 2e-4)
    assert_same_policy(lora_run, folder / "lora_two", 2e-4)


def test_under_lora_the_reference_is_the_policy_without_its_adapter(lora_run):
    """The KL is 0 as long as the adapter is, which is fresh in step 1, and no longer."""
    first, second = metrics_of(lora_run)[1:3]
    assert first["objective/kl_k1"] == first["objective/kl_k3"] == 0
    assert second["objective/kl_k3"] > 1e-5


def test_a_lora_run_leaves_a_plain_model_with_the_adapter_folded_in(folder, lora_run):
    assert not [file.name for file in (lora_run / "policy").iterdir() if "adapter" in file.name]
    names = load_file(folder / "sft" / "policy" / "model.safetensors").keys()
    assert load_file(lora_run / "policy" / "model.safetensors").keys() == names

    config = ModelConfig(path=str(folder / "sft" / "policy"), lora=LoraConfig(r=4))
    trained = load_policy(config, load_tokenizer(config.path)).eval()
    state = load_file(lora_run / "checkpoints" / "step_4" / "model.safetensors")
    ours = {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
    assert not trained.load_state_dict(ours, strict=False).unexpected_keys
    ids = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with_adapter = trained(ids).logits
        with trained.disable_adapter():
            without = trained(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(lora_run / "policy").eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(folder / "sft" / "policy").eval()(ids).logits
    torch.testing.assert_close(merged, with_adapter, atol=1e-4, rtol=0)
    assert torch.equal(without, base)  # training moved nothing but the adapter
    assert (merged - base).abs().max() > 1e-2
