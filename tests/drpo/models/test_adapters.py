"""LoRA: which layers get an adapter, in which precision, and the sum that is written."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_models import MORE, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from drpo.config import ConfigError
from drpo.models.adapters import add_lora, folded, merged_state_dict, merged_weights
from drpo.models.export import save_policy
from drpo.models.scalar_head import ScalarModel
from drpo.models.tokenizer import train_tokenizer

EXPERTS = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "phimoe"]


def adapted(model, **changes):
    settings = {"r": 2, "alpha": 4.0, "target_modules": None, "seed": 0, **changes}
    return add_lora(model, **settings)


def layers_of(policy) -> set[str]:
    names = (name for name, _ in policy.get_base_model().named_parameters())
    return {name.split(".lora_")[0] for name in names if ".lora_" in name}


def perturb(policy) -> None:
    """Adapters that are no identity."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B" in name:
                nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("model_type", EXPERTS)
def test_of_a_mixture_of_experts_all_linear_layers_but_the_routers_are_adapted(model_type):
    model = tiny_model(model_type)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and not name.endswith((".router", ".gate"))
    }
    assert layers_of(adapted(model)) == linear
    assert model.config.model_type == model_type


def test_a_dense_first_layer_and_shared_experts_keep_their_adapters():
    dense = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert dense <= layers_of(adapted(tiny_model("qwen3_moe")))
    shared = {f"model.layers.1.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert shared <= layers_of(adapted(tiny_model("qwen2_moe")))
    only = adapted(tiny_model("qwen3_moe"), target_modules=["gate_proj"])
    assert layers_of(only) == {"model.layers.0.mlp.gate_proj"}


def test_layers_that_cannot_be_adapted_are_told_at_the_start():
    with pytest.raises(
        ConfigError, match="no linear layer is named gate_up_proj; .*fused experts get no adapter"
    ):
        adapted(tiny_model("qwen3_moe"), target_modules=["gate_up_proj"])
    with pytest.raises(ConfigError, match="model.lora.target_modules: PEFT cannot adapt .*'out_proj'"):
        adapted(tiny_model("falcon_h1"))


@pytest.mark.parametrize("misspelt", ["q_projj", "lm_head", "proj", "model.layers.9.mlp.up_proj", "head"])
def test_every_name_must_be_that_of_a_layer(misspelt):
    with pytest.raises(
        ConfigError, match=f"no linear layer is named {misspelt}; the names are down_proj, .*v_proj"
    ):
        adapted(tiny_model("llama"), target_modules=["up_proj", misspelt])
    both = adapted(tiny_model("llama"), target_modules=["up_proj", "layers.1.self_attn.q_proj"])
    expected = {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"}
    assert layers_of(both) == expected


def test_a_layer_below_the_cut_is_said_to_be_outside_the_trainable_layers():
    model = tiny_model("llama")
    with pytest.raises(
        ConfigError,
        match="among model.trainable_layers is named k_proj; the names are (?!.*k_proj).*down_proj",
    ):
        adapted(model, target_modules=["k_proj"], within=("model.layers.1.mlp.",))
    with pytest.raises(ConfigError, match="among model.trainable_layers is named layers.0.mlp.up_proj;"):
        adapted(model, target_modules=["up_proj", "layers.0.mlp.up_proj"], within=("model.layers.1.",))


def test_what_is_trained_is_float32_over_a_bfloat16_base():
    critic = ScalarModel.from_causal_lm(tiny_model("llama").bfloat16())
    policy = adapted(critic, trained_whole=("head",))
    by_training = {True: set(), False: set()}
    for name, parameter in policy.named_parameters():
        if ".original_module." not in name:
            by_training[parameter.requires_grad].add(parameter.dtype)
    assert by_training == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "qwen3_moe"])
def test_a_folded_model_gives_the_same_logits_and_comes_back(model_type):
    policy = adapted(tiny_model(model_type)).eval()
    perturb(policy)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = policy(ids).logits
        with folded(policy):
            torch.testing.assert_close(policy(ids).logits, expected, rtol=0, atol=1e-5)
            for _, layer in policy.named_modules():
                if hasattr(layer, "lora_A") and "default" in layer.lora_A:
                    layer.lora_A["default"].weight.mul_(2)  # the adapter itself is not used
            torch.testing.assert_close(policy(ids).logits, expected, rtol=0, atol=1e-5)
        policy.load_state_dict(before)
        assert torch.equal(policy(ids).logits, expected)
    with pytest.raises(KeyError), folded(policy):
        raise KeyError
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe"])
def test_over_a_bfloat16_base_the_written_sum_is_not_rounded(model_type, tmp_path):
    tokenizer = train_tokenizer(["a text"], 300)
    base = tiny_model(model_type, vocab_size=300).bfloat16()
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    policy = adapted(base, alpha=0.02)  # an update far below the rounding of the base
    perturb(policy)
    parameters = dict(policy.get_base_model().named_parameters())
    save_policy(policy, tokenizer, tmp_path / "policy", "")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert (
        loaded.dtype == torch.float32
        and AutoConfig.from_pretrained(tmp_path / "policy").dtype == torch.float32
    )
    written, layers = loaded.state_dict(), layers_of(policy)
    for name, tensor in start.items():
        expected, layer = tensor.float(), name.removesuffix(".weight")
        if layer in layers and name.endswith(".weight"):
            down, up = (parameters[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            update = 0.01 * (up @ down)
            expected = expected + (update.T if model_type == "gpt2" else update)
            assert not torch.equal(expected, expected.bfloat16().float())
        torch.testing.assert_close(written[name], expected, atol=0, rtol=1e-6)
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}, (
        "nothing in place"
    )


def test_tied_weights_stay_one_in_the_written_folder(tmp_path):
    tokenizer = train_tokenizer(["a text"], 300)
    policy = adapted(tiny_model("gpt2", vocab_size=300).bfloat16())
    save_policy(policy, tokenizer, tmp_path / "policy", "")
    size = (tmp_path / "policy" / "model.safetensors").stat().st_size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    count = sum(parameter.numel() for parameter in loaded.parameters())
    assert size < 4 * count + 20_000


def test_folding_goes_where_it_is_asked_to():
    policy = adapted(tiny_model("llama"))
    perturb(policy)
    here, there = merged_state_dict(policy), merged_state_dict(policy, device="meta")
    assert here.keys() == there.keys() and there["model.layers.0.mlp.up_proj.weight"].device.type == "meta"
    assert MORE.keys() >= set(EXPERTS)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_merged_weights_are_those_of_a_plain_model(model_type):
    plain = tiny_model(model_type)
    policy = adapted(tiny_model(model_type))
    perturb(policy)
    assert dict(merged_weights(plain)).keys() == plain.state_dict().keys()
    plain.load_state_dict(dict(merged_weights(policy)))
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad(), policy.disable_adapter():
        base = policy(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, policy(ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(plain(ids).logits, base, atol=1e-2)


def test_merged_weights_need_one_weight_and_its_adapter_at_a_time():
    """As under ZeRO-3, where values exist within the context alone."""
    policy = adapted(tiny_model("llama"))
    perturb(policy)
    names = {id(parameter): name for name, parameter in policy.get_base_model().named_parameters()}
    asked, inside = [], [0]

    @contextmanager
    def whole(parameters):
        asked.append([names[id(parameter)] for parameter in parameters])
        inside[0] += 1
        assert inside[0] == 1
        yield
        inside[0] -= 1

    for name, _ in merged_weights(policy, whole):
        assert inside[0] == 1
        layer = name.removesuffix(".weight")
        if layer in layers_of(policy):
            adapter = [f"{layer}.lora_{part}.default.weight" for part in "AB"]
            assert asked[-1] == [f"{layer}.base_layer.weight", *adapter]
        else:
            assert asked[-1] == [name]
    assert inside[0] == 0
