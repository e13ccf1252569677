"""The trained critic as a folder beside the policy, and a run that starts from it."""

from __future__ import annotations

import pytest
import torch
from reward_model_folders import save_reward_model
from safetensors.torch import load_file
from tiny_tokenizers import single_bytes
from transformers import AutoTokenizer

from drpo.config import ConfigError
from drpo.models.export import save_policy
from drpo.models.loading import ModelConfig, load_critic, load_scalar_model
from drpo.models.vocabulary import check_trained_alike
from reward_models.export import export_classifier
from reward_models.model import RewardModel

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


def test_zero_and_unit_of_a_reward_model_go_into_a_critic_once(tmp_path):
    tokenizer = single_bytes()
    model = save_reward_model(tmp_path / "rm", tokenizer)
    model.config.centre, model.config.scale = 0.5, 2.0
    with torch.no_grad():
        model.head.bias.fill_(0.75)
    model.save_pretrained(tmp_path / "rm")
    path = tmp_path / "rm"
    for folder in ("critic", "again"):
        critic = load_critic(str(path), ModelConfig())
        assert float(critic.head.bias.detach()) == 0.125  # (0.75 - 0.5) / 2
        assert torch.equal(critic.head.weight, model.head.weight / 2)
        path = tmp_path / folder
        save_policy(critic, tokenizer, path, "card")


def test_a_critic_of_an_exported_reward_model_does_not_claim_its_zero_and_unit(tmp_path):
    save_reward_model(tmp_path / "rm", single_bytes())
    export_classifier(str(tmp_path / "rm"), tmp_path / "plain")
    critic = load_critic(str(tmp_path / "plain"), ModelConfig())
    save_policy(critic, single_bytes(), tmp_path / "critic", "card")
    found = [
        load_scalar_model(str(tmp_path / name), ModelConfig(), RewardModel) for name in ("plain", "critic")
    ]
    assert [model.config.was_given("centre") for model in found] == [True, False]


@pytest.mark.parametrize("lora", [0, 2])
def test_a_critic_keeps_which_texts_it_was_trained_on(online_run, lora):
    _, run_dir = online_run(model={"lora": {"r": lora}}, num_steps=1)
    check_trained_alike(str(run_dir / "critic"), "critic.path", chat=False, arguments={})
    with pytest.raises(ConfigError, match="critic.path: .*chat_template=False, and the policy's .* True"):
        check_trained_alike(str(run_dir / "critic"), "critic.path", chat=True, arguments={})


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
