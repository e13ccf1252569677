"""Settings that must not change the result: micro-batches, processes, DeepSpeed stages, PPO as DR-PO without resets."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    ONLINE,
    PREFERENCE,
    SEVERAL,
    SFT,
    assert_close,
    assert_same_policy,
    ddp,
    deepspeed,
    metrics_of,
    partitioned,
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
    assert (folder / "two/resets.jsonl").read_bytes() == (folder / "whole/resets.jsonl").read_bytes()


@pytest.mark.parametrize("stage", [2, *(pytest.param(s, marks=pytest.mark.slow) for s in (3, "3_offload"))])
def test_two_deepspeed_processes_equal_one(folder, stage):
    run(deepspeed("drpo", stage), "drpo.yaml", f"run_dir=zero{stage}", "ppo.microbatch_size=2", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / f"zero{stage}"), 2e-4)
    assert_same_policy(folder / "whole", folder / f"zero{stage}", 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_deepspeed_processes_leave_critic_pretraining_as_one_does(folder, stage):
    pretraining = ["critic.pretrain_steps=2", "kl.target_per_token=null", "kl.horizon=10000"]
    run(plain("drpo"), "drpo.yaml", f"run_dir=alone{stage}", *pretraining, cwd=folder)
    name = f"alone_zero{stage}"
    run(
        deepspeed("drpo", stage),
        "drpo.yaml",
        f"run_dir={name}",
        "ppo.microbatch_size=2",
        *pretraining,
        cwd=folder,
    )
    assert_close(metrics_of(folder / f"alone{stage}"), metrics_of(folder / name), 2e-4)
    assert_same_policy(folder / f"alone{stage}", folder / name, 2e-4)


GROUP = ["rollout.rollouts_per_prompt=4", "reset.per=prompt", "kl.target_per_token=null", "kl.horizon=10000"]
ESTIMATORS = {
    "grpo": [
        "advantage.estimator=grpo",
        "advantage.whiten=false",
        "ppo.loss_normalisation=sequence",
        "ppo.clip_range_high=0.28",
        "ppo.dual_clip=3",
        "reset.sft_coef=0.1",
    ],
    "dr_grpo": [
        "advantage.estimator=grpo",
        "advantage.group_std=false",
        "advantage.whiten=false",
        "ppo.loss_normalisation=constant",
    ],
    "rloo": ["advantage.estimator=rloo", "ppo.loss_normalisation=constant"],
    "reinforce_pp": ["advantage.estimator=reinforce_pp", "ppo.entropy_coef=0.01", "reset.sft_coef=0.1"],
    "vapo": ["advantage.value_lam=1", "advantage.length_adaptive_alpha=0.5", "ppo.clip_range_high=0.28"],
}


@pytest.mark.parametrize(
    "name", ["grpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ESTIMATORS if n != "grpo")]
)
def test_two_processes_equal_one_with_every_estimator(folder, name):
    """And micro-batches of 2 rows equal whole minibatches."""
    settings = [*GROUP, *ESTIMATORS[name]]
    run(plain("drpo"), "drpo.yaml", f"run_dir={name}", *settings, cwd=folder)
    run(ddp("drpo"), "drpo.yaml", f"run_dir={name}_two", "ppo.microbatch_size=2", *settings, cwd=folder)
    assert_close(metrics_of(folder / name), metrics_of(folder / f"{name}_two"), 2e-4)
    assert_same_policy(folder / name, folder / f"{name}_two", 2e-4)


SHARED = ["rollout.rollouts_per_prompt=4", "rollout.max_response_length=6", "ppo.microbatch_size=4"]


@pytest.fixture(scope="module")
def separate_rows(folder) -> Path:
    """A run with four rollouts to a prompt, each a row of its own, in minibatches that hold whole prompts."""
    run(plain("drpo"), "drpo.yaml", "run_dir=separate", "ppo.num_minibatches=1", *SHARED, "ppo.share_prompts=false",
        cwd=folder)  # fmt: skip
    return folder / "separate"


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes_with_shared_prompts_equal_one(folder, separate_rows, launcher):
    command = ddp("drpo") if launcher == "ddp" else partitioned("drpo", folder)
    run_dir = f"run_dir=shared_{launcher}"
    run(command, "drpo.yaml", run_dir, "ppo.num_minibatches=1", *SHARED, cwd=folder)
    assert_close(metrics_of(separate_rows), metrics_of(folder / f"shared_{launcher}"), 2e-4)
    assert_same_policy(separate_rows, folder / f"shared_{launcher}", 2e-4)


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_processes_with_microbatches_of_tokens_equal_one(folder, launcher):
    command = ddp("drpo") if launcher == "ddp" else deepspeed("drpo", 2)
    run(command, "drpo.yaml", f"run_dir=tokens_{launcher}", "ppo.microbatch_tokens=120", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / f"tokens_{launcher}"), 2e-4)
    assert_same_policy(folder / "whole", folder / f"tokens_{launcher}", 2e-4)


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


# --- preference training ----------------------------------------------------------------------------------

PREFERENCES = {
    "cached": {"reference": {"cache_dir": "cache"}},
    "dr_dpo": {"loss": {"dr_dpo": {"beta_prime": 0.5}}},
    "kto": {"loss": {"name": "kto"}},
    "curry": {"num_steps": 2, "curriculum": {"num_stages": 2, "order": "reference_gap"}},
    "tr_dpo": {
        "model": {"path": "sft/policy", "lora": {"r": 4}},
        "reference": {"sync_every": 2, "sync_mix": 0.5},
    },
}


@pytest.fixture(scope="module")
def preferences(folder) -> Path:
    """The folder with preference recipes and their runs by one process with whole batches."""
    for name, changes in PREFERENCES.items():
        write_recipe(folder / f"{name}.yaml", {**PREFERENCE, **changes})
    start_preferences(plain(SEVERAL), folder, "one")
    return folder


def start_preferences(
    command: list[str], folder: Path, prefix: str, *overrides: str, names=PREFERENCES
) -> None:
    run([*command, prefix], *(f"{name}.yaml" for name in names), *overrides, cwd=folder)
    if "cached" in names:
        shutil.move(folder / "cache", folder / f"{prefix}_cache")


def assert_same_preferences(folder: Path, prefix: str, names=PREFERENCES) -> None:
    for name in names:
        one, other = folder / f"one_{name}", folder / f"{prefix}_{name}"
        assert_close(metrics_of(one), metrics_of(other), 2e-4)
        assert_same_policy(one, other, 2e-4)
        rows = metrics_of(one)
        assert len(rows) == 4 and "eval/loss" in rows[-1] and "eval/length" in rows[-1]
        texts = [(folder / f"{p}_{name}" / "samples.jsonl").read_text().splitlines() for p in ("one", prefix)]
        left, right = ([json.loads(line) for line in lines] for lines in texts)
        assert [row["continuation"] for row in left] == [row["continuation"] for row in right]
        assert len(left) == 10  # 5 prompts at 2 evaluations


def test_two_processes_train_the_same_preferences(preferences):
    start_preferences(ddp(SEVERAL), preferences, "two", "batch.microbatch_size=3")
    assert_same_preferences(preferences, "two")
    one, two = (np.load(preferences / f"{prefix}_cache" / "logprobs.npy") for prefix in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    assert len(one) > 1000


def test_two_deepspeed_processes_train_the_same_preferences(preferences):
    names = ["dr_dpo", "curry"]
    start_preferences(deepspeed(SEVERAL, 2), preferences, "zero2", "batch.microbatch_size=2", names=names)
    assert_same_preferences(preferences, "zero2", names)


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["size=2", "tokens=200"])
def test_two_processes_that_share_every_weight_train_the_same_preferences(preferences, cut):
    prefix = f"zero3_{cut}"
    start_preferences(partitioned(SEVERAL, preferences), preferences, prefix, f"batch.microbatch_{cut}")
    assert_same_preferences(preferences, prefix)


@pytest.mark.slow
@pytest.mark.parametrize("share_prompts", ["true", "false"])
def test_processes_that_share_every_weight_may_have_responses_of_any_length(preferences, share_prompts):
    """The head takes 1024 positions at a time: one process may have fewer than that while the other has more."""
    words, chance = "we have belt tire rope key but need bin radio jar soap".split(), random.Random(0)
    rows = []
    for i in range(128):
        longest = 30 if i % 12 else 120  # 16 responses to a micro-batch: 64 tokens are the border
        texts = [
            " " + " ".join(chance.choices(words, k=length)) for length in (longest, chance.randint(1, 30))
        ]
        rows.append({"prompt": f"POST: {i} TL;DR:", "chosen": texts[0], "rejected": texts[1] + " x"})
    (preferences / "ragged.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"task": "own", "path": "ragged.jsonl", "eval_fraction": 0.2}
    model = {**SFT["model"], "architecture": {**SFT["model"]["architecture"], "max_position_embeddings": 512}}
    ragged = {**PREFERENCE, "data": data, "model": model, "batch": {"size": 32, "microbatch_size": 16}}
    write_recipe(preferences / "ragged.yaml", {**ragged, "sample": {"num_prompts": 0}})
    for command, prefix in ((plain(SEVERAL), "one"), (partitioned(SEVERAL, preferences), "zero3")):
        settings = [f"share_prompts={share_prompts}", "batch.microbatch_size=8", "resume=restart"]
        run([*command, prefix], "ragged.yaml", *settings, cwd=preferences)
    assert_close(metrics_of(preferences / "one_ragged"), metrics_of(preferences / "zero3_ragged"), 2e-4)
    assert_same_policy(preferences / "one_ragged", preferences / "zero3_ragged", 2e-4)
