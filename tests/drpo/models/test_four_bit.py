"""A base in 4 bits under LoRA: which layers, every family, the model that is written, one base in memory."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny_models import ARCHITECTURES, HYBRIDS, MORE, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from drpo.config import ConfigError, make_section
from drpo.models.adapters import add_lora, folded, merged_state_dict
from drpo.models.export import save_policy
from drpo.models.four_bit import check_run, choose_layers, quantise
from drpo.models.frozen_weights import is_half, round_frozen, share_frozen
from drpo.models.loading import LoraConfig, ModelConfig, fresh_critic, prepare_to_train
from drpo.models.nf4_linear import NF4Linear
from drpo.models.scalar_head import token_values
from drpo.models.scoring import response_logprobs
from drpo.models.tokenizer import train_tokenizer
from drpo.tensors import PaddedBatch, pad_batch
from drpo.trainers.preference.recipe import PreferenceRecipe

ADAPTED_BY_HAND = {"falcon_h1": ["q_proj", "v_proj"]}
IN_4BIT = ModelConfig(path="unused", lora=LoraConfig(r=2, alpha=4.0), load_in_4bit=True)
CPU = torch.device("cpu")


def batch() -> PaddedBatch:
    return pad_batch([[3, 4, 5, 6], [7, 8]], [[9, 10, 11], [12, 13]], 0)


def trained(model_type: str, **overrides) -> nn.Module:
    """A policy on a 4-bit base, its adapter no identity."""
    policy = add_lora(
        tiny_model(model_type, **overrides),
        r=2,
        alpha=4.0,
        target_modules=ADAPTED_BY_HAND.get(model_type),
        seed=0,
    )
    choose_layers(policy)
    quantise(policy, CPU)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if ".lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    return policy.eval()


def layers_in_4bit(policy: nn.Module) -> dict[str, NF4Linear]:
    layers = policy.get_base_model().named_modules()
    return {name.replace(".base_layer", ""): layer for name, layer in layers if isinstance(layer, NF4Linear)}


def by_hand(policy: nn.Module, model: nn.Module) -> nn.Module:
    """The plain model with each 4-bit layer's own numbers, and 2 B A added where there is an adapter."""
    parts = dict(policy.get_base_model().named_parameters())
    with torch.no_grad():
        for name, layer in layers_in_4bit(policy).items():
            plain = model.get_submodule(name)
            weight = layer.dense_weight()
            if f"{name}.lora_A.default.weight" in parts:
                down, up = (parts[f"{name}.lora_{part}.default.weight"] for part in "AB")
                update = 2 * up @ down
                weight = weight + (update.T if isinstance(plain, Conv1D) else update)
            plain.weight.copy_(weight)
    return model.eval()


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *MORE, *HYBRIDS])
def test_the_model_is_the_dense_one_with_the_rounded_weights(model_type):
    policy = trained(model_type)
    expected = by_hand(policy, tiny_model(model_type))
    with torch.no_grad():
        found = response_logprobs(policy, batch()).logprobs
        torch.testing.assert_close(found, response_logprobs(expected, batch()).logprobs, rtol=1e-4, atol=1e-4)
        kept = [weight.clone() for weight in policy.parameters()]
        with folded(policy):
            torch.testing.assert_close(
                response_logprobs(policy, batch()).logprobs, found, rtol=1e-4, atol=1e-4
            )
        assert torch.equal(response_logprobs(policy, batch()).logprobs, found)
    assert all(torch.equal(weight, old) for weight, old in zip(policy.parameters(), kept, strict=True))
    written, plain = merged_state_dict(policy), expected.state_dict()
    assert written.keys() == plain.keys()
    for name, weight in written.items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2_moe"])
def test_linear_layers_but_the_head_and_routers_are_in_4_bits_with_or_without_an_adapter(model_type):
    model = tiny_model(model_type)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head" and not name.endswith(".gate")
    }
    adapted = "c_attn" if model_type == "gpt2" else "q_proj"
    policy = add_lora(model, r=2, alpha=4.0, target_modules=[adapted], seed=0)
    choose_layers(policy)
    quantise(policy, CPU)
    assert layers_in_4bit(policy).keys() == linear
    floating = {weight.dtype for weight in policy.parameters() if weight.is_floating_point()}
    assert floating == {torch.float32} and not is_half(policy)


def test_a_router_that_is_a_linear_layer_stays_dense():
    policy = add_lora(tiny_model("llama"), r=2, alpha=4.0, target_modules=["q_proj"], seed=0)
    block = policy.get_base_model().model.layers[0].mlp
    block.gate = nn.Linear(32, 4).requires_grad_(False)
    choose_layers(policy)
    quantise(policy, CPU)
    assert type(block.gate) is nn.Linear and isinstance(block.gate_proj, NF4Linear)


def test_the_written_folder_is_the_trained_model(tmp_path):
    tokenizer = train_tokenizer(["a text"], 300)
    policy = trained("llama", vocab_size=300)
    with torch.no_grad():
        expected = response_logprobs(policy, batch()).logprobs
        save_policy(policy, tokenizer, tmp_path / "policy", "")
        assert torch.equal(response_logprobs(policy, batch()).logprobs, expected)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(
            response_logprobs(loaded, batch()).logprobs, expected, rtol=1e-5, atol=1e-5
        )


def gradients(policy: nn.Module) -> dict[str, Tensor]:
    response_logprobs(policy, batch()).logprobs.sum().backward()
    return {name: weight.grad for name, weight in policy.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_get_the_gradients_of_the_dense_model(checkpointing):
    policy = trained("llama").train()
    if checkpointing:
        policy.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        policy.get_base_model().disable_input_require_grads()
    dense = add_lora(tiny_model("llama"), r=2, alpha=4.0, target_modules=None, seed=0)
    with torch.no_grad():
        for name, layer in layers_in_4bit(policy).items():
            dense.get_base_model().get_submodule(f"{name}.base_layer").weight.copy_(layer.dense_weight())
        parameters = dict(dense.named_parameters())
        for name, weight in policy.named_parameters():
            if ".lora_" in name:
                parameters[name].copy_(weight)
    found, expected = gradients(policy), gradients(dense)
    assert found.keys() == expected.keys() and all(".lora_" in name for name in found)
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_policy_and_critic_have_one_base_in_4_bits(bf16):
    policy = prepare_to_train(tiny_model("gpt_neox"), IN_4BIT, seed=0)
    critic = fresh_critic(policy, IN_4BIT)
    for model in (policy, critic):
        if bf16:
            round_frozen(model)
        quantise(model, CPU)
    with torch.no_grad():
        critic.base_model.model.head.modules_to_save["default"].weight.fill_(0.1)
        expected = token_values(critic, batch())
        share_frozen(critic, policy)
        assert torch.equal(token_values(critic, batch()), expected)
    owned = {weight.data_ptr() for weight in policy.parameters()}
    own = {name for name, weight in critic.named_parameters() if weight.data_ptr() not in owned}
    assert own and all(".lora_" in name or ".head." in name for name in own)


def test_other_weights_have_another_base():
    policy, other = (prepare_to_train(tiny_model("llama", seed=seed), IN_4BIT, seed=0) for seed in (0, 1))
    for model in (policy, other):
        quantise(model, CPU)
    share_frozen(other, policy)
    layers = layers_in_4bit(other), layers_in_4bit(policy)
    assert all(layers[0][name].weight is not layers[1][name].weight for name in layers[0])


def test_4_bits_without_an_adapter_are_refused():
    with pytest.raises(ConfigError, match="model.load_in_4bit .*set model.lora.r"):
        make_section(ModelConfig, {"path": "somewhere", "load_in_4bit": True}, "model.")


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": {"sync_every": 2}},
        {"curriculum": {"num_stages": 2, "reference": "last"}},
    ],
)
def test_4_bits_with_a_reference_that_moves_are_refused(changes):
    model = {"path": "somewhere", "lora": {"r": 2}, "load_in_4bit": True}
    make_section(PreferenceRecipe, {"model": model})
    with pytest.raises(ConfigError, match="model.load_in_4bit does not go with a reference that moves"):
        make_section(PreferenceRecipe, {"model": model, **changes})


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model.load_in_4bit needs .*pip install -e '.\[bnb\]'"):
        check_run(partitions_weights=False)


def test_launchers_that_cut_weights_are_refused():
    check_run(partitions_weights=False)
    with pytest.raises(ConfigError, match="model.load_in_4bit does not work under ZeRO-3"):
        check_run(partitions_weights=True)
