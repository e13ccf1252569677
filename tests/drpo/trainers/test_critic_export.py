"""The trained critic as a folder beside the policy, and a run that starts from it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from drpo.models.loading import ModelConfig, load_critic

CHECKPOINT = {"checkpoint": {"every": 3}}


def test_the_critic_is_the_one_that_was_trained_and_another_run_takes_it(online_run):
    _, run_dir = online_run(**CHECKPOINT)
    saved = load_file(run_dir / "critic" / "model.safetensors")
    trained = load_file(run_dir / "checkpoints" / "step_3" / "model.safetensors")
    trained = {name.removeprefix("critic."): w for name, w in trained.items() if name.startswith("critic.")}
    assert saved.keys() == trained.keys() and saved["head.weight"].any()
    assert all(torch.equal(weight, trained[name]) for name, weight in saved.items())
    assert AutoTokenizer.from_pretrained(run_dir / "critic").get_vocab()
    rows, _ = online_run(critic={"path": str(run_dir / "critic")}, num_steps=1)
    fresh, _ = online_run(num_steps=1)
    assert fresh[0]["value/mean"] == pytest.approx(0, abs=1e-6), "a fresh critic says 0"
    assert abs(rows[0]["value/mean"]) > 0.01


def test_the_adapter_of_a_critic_is_folded_in(online_run):
    _, run_dir = online_run(model={"lora": {"r": 2, "alpha": 4.0}}, optim={"learning_rate": 0.01})
    critic = load_critic(str(run_dir / "critic"), ModelConfig())
    policy = load_file(run_dir / "policy" / "model.safetensors")
    name = "layers.0.attention.query_key_value.weight"
    assert critic.head.weight.any()
    assert not torch.equal(dict(critic.backbone.named_parameters())[name], policy[f"gpt_neox.{name}"])


def test_a_run_without_a_critic_leaves_none(online_run):
    rloo = {"advantage": {"estimator": "rloo"}, "rollout": {"rollouts_per_prompt": 2}}
    _, run_dir = online_run(**rloo, num_steps=1)
    assert (run_dir / "policy").is_dir() and not (run_dir / "critic").exists()
