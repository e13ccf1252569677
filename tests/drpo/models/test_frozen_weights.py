"""Frozen weights: matrices in bf16 change no number under autocast, and equal ones are in memory once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import ARCHITECTURES, MORE, tiny_model
from torch import Tensor, nn

from drpo.models.adapters import add_lora
from drpo.models.frozen_weights import round_frozen, share_frozen
from drpo.models.loading import LoraConfig, ModelConfig, fresh_critic
from drpo.models.scalar_head import ScalarModel, token_values
from drpo.models.scoring import response_logprobs
from drpo.tensors import PaddedBatch, pad_batch

FAMILIES = [*ARCHITECTURES, *MORE]


@contextmanager
def in_bf16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def batch() -> PaddedBatch:
    return pad_batch([[3, 4, 5, 6], [7, 8]], [[9, 10, 11], [12, 13]], 0)


def with_adapter(model: nn.Module) -> nn.Module:
    policy = add_lora(model, r=2, alpha=4.0, target_modules=None, seed=0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if ".lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    return policy


def gradients(policy: nn.Module) -> list[Tensor]:
    with in_bf16():
        logprobs = response_logprobs(policy, batch()).logprobs
    logprobs.sum().backward()
    return [logprobs.detach(), *(weight.grad for weight in policy.parameters() if weight.requires_grad)]


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_outputs_and_gradients_stay_bit_for_bit(family):
    plain, rounded = (with_adapter(tiny_model(family)) for _ in range(2))
    round_frozen(rounded)
    halves = [weight for weight in rounded.parameters() if weight.dtype == torch.bfloat16]
    assert len(halves) > 5 and not any(weight.requires_grad for weight in halves)
    for expected, found in zip(gradients(plain), gradients(rounded), strict=True):
        assert torch.equal(expected, found)


def test_embeddings_norms_tied_heads_and_trained_weights_stay_in_float32():
    model = tiny_model("llama", tie_word_embeddings=True).requires_grad_(False)
    trained = model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    round_frozen(model)
    kept = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert kept == norms | {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight and trained.requires_grad


def test_a_scalar_head_stays_in_float32():
    critic = ScalarModel.from_causal_lm(tiny_model("gpt_neox")).requires_grad_(False)
    with in_bf16(), torch.no_grad():
        expected = token_values(critic, batch())
        round_frozen(critic)
        assert critic.head.weight.dtype == torch.float32
        assert torch.equal(token_values(critic, batch()), expected)


def test_policy_and_critic_have_one_base_under_lora():
    config = ModelConfig(path="unused", lora=LoraConfig(r=2))
    policy = with_adapter(tiny_model("gpt_neox"))
    critic = fresh_critic(with_identity(policy), config)
    expected = token_values(critic, batch())
    share_frozen(critic, policy)
    owned = {id(weight) for weight in policy.parameters()}
    own = {name for name, weight in critic.named_parameters() if id(weight) not in owned}
    assert own and all(".lora_" in name or ".head." in name for name in own)
    assert torch.equal(token_values(critic, batch()), expected)


def with_identity(policy: nn.Module) -> nn.Module:
    """The policy with its adapter set back, so that the critic made of it has the base's numbers."""
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if ".lora_B" in name:
                weight.zero_()
    return policy


def test_weights_that_differ_are_not_shared():
    first, second = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        second.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    trained = second.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    share_frozen(second, first)
    own = {
        name
        for name, weight in second.named_parameters()
        if weight is not dict(first.named_parameters())[name]
    }
    backbone = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    assert own - {"lm_head.weight"} == backbone and second.model.layers[1].mlp.up_proj.weight is trained
