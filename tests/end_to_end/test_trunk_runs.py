"""Whole runs above a frozen trunk: the numbers of runs that compute it anew each time, in every stage and launcher."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from killed_runs import start, wait_for_step
from offline_runs import reproducible_rows, run_preference, run_reward_model, run_sft
from online_runs import RECIPE, merged, run_online
from safetensors.torch import load_file
from tiny_runs import (
    ONLINE,
    SFT,
    assert_close,
    ddp,
    deepspeed,
    metrics_of,
    partitioned,
    plain,
    run,
    write_recipe,
)

from drpo.data.encode import encode_query, encode_response
from drpo.data.records import Record
from drpo.engine import Engine, EngineConfig
from drpo.models import loading
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.tokenizer import load_tokenizer
from drpo.models.trunk import trunk_output
from drpo.rewards import Completion
from drpo.rollout import collect
from drpo.tensors import pad_batch
from drpo.trainers import reference
from reward_models.score import RewardModelScorer

KINDS = {"all weights": {}, "LoRA": {"lora": {"r": 4}}}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """SFT from scratch, then a reward model whose lower layer is that policy's."""
    folder = tmp_path_factory.mktemp("chain")
    run_sft(folder / "sft", data={"demo": {"num_train": 24, "num_eval": 6}})
    run_reward_model(folder / "rm", policy=folder / "sft" / "policy", model={"trainable_layers": 1})
    return folder


def online(folder: Path, run_dir: Path, **changes) -> list[dict[str, float]]:
    recipe = merged({"model": {"trainable_layers": 1}, "num_steps": 2}, changes)
    return reproducible_rows(run_online(folder / "sft" / "policy", run_dir, recipe))


@pytest.mark.parametrize("kind", KINDS)
def test_online_training_equals_training_without_the_cache(chain, tmp_path, kind, monkeypatch):
    with_cache = online(chain, tmp_path / "with", model=KINDS[kind])
    monkeypatch.setattr(collect, "has_trunk", lambda policy: False)
    without = online(chain, tmp_path / "without", model=KINDS[kind])
    assert_close(with_cache, without, 1e-5)
    paths = [chain / "sft", tmp_path / "with", tmp_path / "without"]
    before, after, other = (load_file(path / "policy" / "model.safetensors") for path in paths)
    for name in after:
        torch.testing.assert_close(after[name], other[name], rtol=0, atol=1e-5)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    above = ("gpt_neox.layers.1.", "gpt_neox.final_layer_norm", "embed_out", "lm_head")
    assert changed and all(name.startswith(above) for name in changed)


def test_the_first_ratio_is_one(chain, tmp_path):
    row = online(chain, tmp_path / "run", ppo={"num_epochs": 1, "num_minibatches": 1}, num_steps=1)[-1]
    assert row["ppo/ratio"] == 1.0 and row["ppo/approx_kl"] == 0.0


def test_a_reward_model_and_a_critic_share_the_trunk_they_were_trained_on(chain, tmp_path, monkeypatch):
    """The same scores and the same run as with a reward model that computes everything itself."""
    shared: list[bool] = []
    share = RewardModelScorer.share_weights
    model = {"path": str(chain / "sft" / "policy"), "trainable_layers": 1}
    recipe = merged(
        RECIPE, {"num_steps": 2, "model": model, "critic": {"path": str(chain / "rm" / "reward_model")}}
    )
    runs = []
    for name, wrapped in {"shared": share, "apart": lambda scorer, policy, critic: None}.items():
        monkeypatch.setattr(RewardModelScorer, "share_weights", wrapped)
        engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path / name, 0, 1.0)
        path = str(chain / "rm" / "reward_model")
        reward = RewardModelScorer.load(path, engine, 8, "float32", str(chain / "sft" / "policy"))
        runs.append(reproducible_rows(run_online(chain / "sft" / "policy", tmp_path / name, recipe, reward)))
        shared.append(reward.shares_trunk)
    assert shared == [True, False]
    assert_close(*runs, 1e-5)


def test_a_reward_model_with_another_stop_token_reads_its_own_tokens(chain, tmp_path):
    """The trunk was computed from other ids, so it is of no use, and must not be used."""
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, 1.0)
    path, policy_path = str(chain / "rm" / "reward_model"), str(chain / "sft" / "policy")
    config = ModelConfig(path=policy_path, trainable_layers=1)
    tokenizer = load_tokenizer(policy_path)
    scorer = RewardModelScorer.load(path, engine, 8, "float32", policy_path)
    policy = load_policy(config, tokenizer)
    scorer.share_weights(policy, None)
    assert scorer.shares_trunk
    record = Record("a b", completion=" c")
    ids = [*encode_response(tokenizer, " c")[:-1], 7]  # the policy stops with token 7
    completion = Completion("a b", " c", True, encode_query(tokenizer, "a b"), ids, record)
    part = pad_batch([completion.query_ids], [ids], 0)
    own_ids = [*ids[:-1], tokenizer.eos_token_id]
    alone = RewardModelScorer.load(path, engine, 8, "float32", policy_path)
    expected = alone([dataclasses.replace(completion, response_ids=own_ids)])
    found = scorer.score_from_trunk([completion], [part], [trunk_output(policy, part)])
    torch.testing.assert_close(found, expected)


def test_a_reference_of_its_own_shares_nothing(chain, tmp_path):
    """The log-ratios are to the policy at reference.path, whose layers are others."""
    other = {"demo": {"num_train": 24, "num_eval": 6}}
    run_sft(tmp_path / "other", data=other, seed=1)
    data = {"task": "demo", "demo": {"num_train": 40, "num_eval": 11}}
    for name, model in {"frozen": {"trainable_layers": 1}, "all": {}}.items():
        _, rows = run_preference(
            chain / "sft" / "policy",
            tmp_path / name,
            data=data,
            model=model,
            reference={"path": str(tmp_path / "other" / "policy")},
            num_steps=1,
            eval={"every": 0},
        )
        if name == "frozen":
            loss = rows[0]["train/loss"]
    assert abs(loss - 0.6931) > 1e-3 and rows[0]["train/loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_first_use_of_a_model_that_could_not_be_probed_at_loading(chain, tmp_path, kind, monkeypatch):
    """As half precision, or a kernel that needs a GPU: the probe must see whole models, not what stands on a trunk."""
    monkeypatch.setattr(loading, "can_probe_now", lambda model: False)
    online(chain, tmp_path / "online", model=KINDS[kind], num_steps=1)
    for loss in ("dpo", "kto"):
        changes = {"model": {"trainable_layers": 1, **KINDS[kind]}, "loss": {"name": loss}, "num_steps": 1}
        run_preference(chain / "sft" / "policy", tmp_path / loss, **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_preference_training_equals_training_without_sharing(chain, tmp_path, kind, loss, monkeypatch):
    model = {"trainable_layers": 1, **KINDS[kind]}
    changes = {"model": model, "loss": {"name": loss}, "eval": {"num_examples": 8}}
    _, shared = run_preference(chain / "sft" / "policy", tmp_path / "shared", **changes)
    monkeypatch.setattr(reference, "recorded_trunk", lambda policy: no_record())
    _, apart = run_preference(chain / "sft" / "policy", tmp_path / "apart", **changes)
    assert_close(reproducible_rows(shared), reproducible_rows(apart), 1e-5)


class no_record:
    def __enter__(self) -> list:
        return []

    def __exit__(self, *error) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An SFT policy, a DR-PO recipe above its lower layer, and its run by one process."""
    folder = tmp_path_factory.mktemp("launched")
    write_recipe(folder / "sft.yaml", {**SFT, "run_dir": "sft"})
    run(plain("sft"), "sft.yaml", cwd=folder)
    write_recipe(folder / "drpo.yaml", {**ONLINE, "model": {"path": "sft/policy", "trainable_layers": 1}})
    run(plain("drpo"), "drpo.yaml", "run_dir=whole", cwd=folder)
    return folder


def test_two_processes_equal_one(folder):
    run(ddp("drpo"), "drpo.yaml", "run_dir=two", "ppo.microbatch_size=4", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / "two"), 2e-4)


def test_two_deepspeed_processes_equal_one(folder):
    run(deepspeed("drpo", 2), "drpo.yaml", "run_dir=zero2", "ppo.microbatch_size=2", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / "zero2"), 2e-4)


GROUPS = [
    "rollout.rollouts_per_prompt=4",
    "ppo.num_minibatches=1",
    "ppo.microbatch_size=4",
    "reset.per=prompt",
]


@pytest.mark.parametrize("launcher", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes_share_the_prompts_of_one_with_separate_rows(folder, launcher):
    run(plain("drpo"), "drpo.yaml", "run_dir=rows", *GROUPS, "ppo.share_prompts=false", cwd=folder)
    command = ddp("drpo") if launcher == "ddp" else partitioned("drpo", folder)
    run(command, "drpo.yaml", f"run_dir=shared_{launcher}", *GROUPS, cwd=folder)
    assert_close(metrics_of(folder / "rows"), metrics_of(folder / f"shared_{launcher}"), 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, policy", [("drpo", "sft"), ("drpo", "tied"), ("dpo", "sft"), ("dpo", "tied")]
)
def test_partitioned_weights_equal_whole_ones(folder, stage, policy):
    if policy == "tied":
        tied = merged(SFT, {"run_dir": "tied", "model": {"architecture": {"tie_word_embeddings": True}}})
        write_recipe(folder / "tied.yaml", tied)
        run(plain("sft"), "tied.yaml", cwd=folder)
    if stage == "dpo":
        model = {"path": f"{policy}/policy", "trainable_layers": 1}
        changes = {"run_dir": "dpo", "model": model, "num_steps": 3}
        kept = {k: SFT[k] for k in ("data", "batch", "optim", "sample", "log", "engine")}
        write_recipe(folder / "dpo.yaml", {**kept, "eval": {"every": 0}, **changes})
        run(plain("dpo"), "dpo.yaml", f"run_dir=dpo_{policy}", cwd=folder)
    path = f"model.path={policy}/policy"
    if (stage, policy) == ("drpo", "tied"):
        run(plain("drpo"), "drpo.yaml", "run_dir=drpo_tied", path, cwd=folder)
    run(partitioned(stage, folder), f"{stage}.yaml", f"run_dir=zero3_{stage}_{policy}", path, cwd=folder)
    expected = folder / ("whole" if (stage, policy) == ("drpo", "sft") else f"{stage}_{policy}")
    assert_close(metrics_of(expected), metrics_of(folder / f"zero3_{stage}_{policy}"), 2e-4)


def test_killed_and_resumed_equals_uninterrupted(folder):
    process = start(plain("drpo"), "drpo.yaml", "run_dir=killed", cwd=folder)
    wait_for_step(process, folder / "killed", 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(plain("drpo"), "drpo.yaml", "run_dir=killed", cwd=folder)
    assert metrics_of(folder / "killed") == metrics_of(folder / "whole")
    weights = [(folder / name / "policy" / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]
