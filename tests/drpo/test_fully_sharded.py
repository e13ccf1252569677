"""FSDP2 in one process of gloo: what a gathered model is, what is cut, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_runs import CLEAN, ROOT
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from drpo.config import ConfigError
from drpo.fully_sharded import check_plugin, check_recipe, layer_classes
from drpo.models.loading import LoraConfig, ModelConfig
from drpo.trainers.credit import KLConfig
from drpo.trainers.online_recipe import OnlineRecipe, RewardConfig
from drpo.trainers.sft import SFTRecipe

TINY = LlamaConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=16,
    vocab_size=50,
    tie_word_embeddings=True,
)


def test_layers_are_found_inside_other_modules():
    policy = AutoModelForCausalLM.from_config(TINY)
    assert layer_classes(nn.ModuleDict({"policy": policy, "head": nn.Linear(2, 1)})) == ["LlamaDecoderLayer"]
    assert layer_classes(nn.Linear(2, 2)) == []


def plugin(**settings):
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        **{"fsdp_version": 2, "cpu_ram_efficient_loading": False, **settings}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading must be false"),
        ({"cpu_offload": True}, "fsdp_offload_params must be false; zero3.yaml can offload"),
        (
            {"activation_checkpointing": True},
            "fsdp_activation_checkpointing must be false; .*model.gradient_checkpointing",
        ),
    ],
)
def test_settings_of_accelerate_that_would_go_wrong_are_named(monkeypatch, settings, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it
    with pytest.raises(ConfigError, match=f"^the accelerate config .*: {message}"):
        check_plugin(plugin(**settings))
    check_plugin(plugin())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": ModelConfig(lora=LoraConfig(r=4))}, "model.lora.r"),
        ({"model": ModelConfig(trainable_layers=1)}, "model.trainable_layers"),
        ({"kl": KLConfig(offload_reference=True)}, "kl.offload_reference"),
        ({"reward": RewardConfig(path="x", offload=True)}, "reward.offload"),
    ],
)
def test_what_sharding_does_not_allow_is_refused_by_its_key(changes, key):
    with pytest.raises(ConfigError, match=f"^{key} does not work under FSDP.*or take multi_gpu.yaml"):
        check_recipe(OnlineRecipe(**changes))
    check_recipe(OnlineRecipe())
    check_recipe(SFTRecipe())


GATHERED = """
import copy, sys
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from test_fully_sharded import TINY
from transformers import AutoModelForCausalLM
from drpo.fully_sharded import gathered, shard_frozen
from drpo.models.adapters import merged_weights

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(TINY)
plain, frozen = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
ids = torch.arange(10)[None]
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)

def all_cut():
    return all(isinstance(weight, DTensor) for weight in model.parameters())

def same(a, b):
    return a.keys() == b.keys() and all(type(x) is type(b[name]) and torch.equal(x, b[name]) for name, x in a.items())

print("cut", all_cut())
print("synced", same(dict(merged_weights(model)), plain.state_dict()))
with gathered(model):
    print("plain", not any(isinstance(weight, DTensor) for weight in model.parameters()))
    print("tied", model.lm_head.weight is model.model.embed_tokens.weight)
    print("state", same(model.state_dict(), plain.state_dict()))
    with torch.no_grad():
        print("parts", torch.equal(model.model(ids)[0], plain.model(ids)[0]))
    assert torch.equal(model(ids).logits, plain(ids).logits)
print("cut", all_cut())
try:
    with gathered(model):
        raise KeyError
except KeyError:
    print("cut", all_cut())
for each in (model, plain):
    each(ids, labels=ids).loss.backward()
gradients = {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}
wanted = {name: weight.grad for name, weight in plain.named_parameters()}
print("gradients", all(torch.allclose(gradient, wanted[name], atol=1e-6) for name, gradient in gradients.items()))

shard_frozen(frozen)
cut = [isinstance(weight, DTensor) for name, weight in frozen.named_parameters() if ".layers." in name]
print("layers", all(cut) and len(cut) == 18)
with torch.no_grad():
    print("frozen", torch.equal(frozen.model(ids)[0], plain.model(ids)[0]))
print("again", all(isinstance(w, DTensor) for n, w in frozen.named_parameters() if ".layers." in n))
torch.distributed.destroy_process_group()
"""


def test_gathered_model_is_the_one_before_it_was_cut(tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    path = f"{ROOT}:{ROOT / 'tests' / 'support'}:{ROOT / 'tests' / 'drpo'}"
    done = subprocess.run(
        [sys.executable, "-c", GATHERED],
        env=CLEAN | environment | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    named = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [name for name, _ in named] == [
        *(
            "cut",
            "synced",
            "plain",
            "tied",
            "state",
            "parts",
            "cut",
            "cut",
            "gradients",
            "layers",
            "frozen",
            "again",
        )
    ]
    assert {value for _, value in named} == {"True"}, done.stdout
