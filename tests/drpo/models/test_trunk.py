"""A frozen trunk that is computed once: the same losses and gradients as without, for every kind of model above it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn

from drpo.config import ConfigError
from drpo.models.actor_critic import ActorCritic
from drpo.models.loading import LoraConfig, ModelConfig, fresh_critic, load_critic, load_policy
from drpo.models.scalar_head import ScalarModel
from drpo.models.scoring import adapter_disabled, response_logprobs
from drpo.models.shared_prompt import continuation_logprobs, packed_states
from drpo.models.tokenizer import train_tokenizer
from drpo.models.trunk import (
    freeze_trunk,
    has_trunk,
    recorded_trunk,
    resumed_from,
    same_trunk,
    share_trunk,
    trunk_output,
)
from drpo.tensors import PaddedBatch, pad_batch

CUT = [name for name in ARCHITECTURES if name != "bloom"]


def batch() -> PaddedBatch:
    return pad_batch([[3, 4, 5, 6], [7, 8], [9]], [[10, 11, 12], [13], [14, 15]], 2)


def four_layers(name: str):
    key = "n_layer" if name == "gpt2" else "num_hidden_layers"
    return tiny_model(name, **{key: 4})


def layers_of(model: nn.Module) -> nn.ModuleList:
    (layers,) = (
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1
    )
    return layers


def gradients(model: nn.Module, context) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with context:
        logprobs = response_logprobs(model, batch()).logprobs[batch().response_mask]
    (logprobs * torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach(), found


@pytest.mark.parametrize("name", CUT)
def test_what_stands_on_the_trunk_has_the_gradients_of_the_whole_model(name):
    """In float64: of the model in which all is trained, of the frozen one, and of the one that resumes."""
    whole = four_layers(name).double()
    expected_logprobs, expected = gradients(whole, nullcontext())
    model = four_layers(name).double()
    freeze_trunk(model, 1)
    frozen_logprobs, frozen = gradients(model, nullcontext())
    logprobs, found = gradients(model, resumed_from(trunk_output(model, batch()), model))
    assert torch.equal(logprobs, frozen_logprobs) and torch.equal(logprobs, expected_logprobs)
    assert found.keys() == frozen.keys() < expected.keys()
    for parameter_name in found:
        assert torch.equal(found[parameter_name], frozen[parameter_name]), parameter_name
        torch.testing.assert_close(found[parameter_name], expected[parameter_name], rtol=1e-10, atol=1e-12)
    top = {
        f"{n}.{p}"
        for n, m in model.named_modules()
        if m is layers_of(model)[3]
        for p, _ in m.named_parameters()
    }
    assert top <= found.keys()
    assert not any(p.requires_grad for layer in layers_of(model)[:3] for p in layer.parameters())
    assert not model.get_input_embeddings().weight.requires_grad


def test_each_layer_runs_where_it_should():
    model = tiny_model("llama", num_hidden_layers=3)
    freeze_trunk(model, 1)
    runs: list[int] = []
    for index, layer in enumerate(layers_of(model)):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    trunk = trunk_output(model, batch())
    assert runs == [0, 1]
    with resumed_from(trunk, model):
        response_logprobs(model, batch())
    assert runs == [0, 1, 2]
    response_logprobs(model, batch())
    assert runs == [0, 1, 2, 0, 1, 2]
    with resumed_from(None, model):
        response_logprobs(model, batch())
    assert runs[-3:] == [0, 1, 2]


def test_the_trunk_is_the_hidden_state_that_transformers_reports():
    model = tiny_model("qwen3", num_hidden_layers=3)
    freeze_trunk(model, 2)
    rows = batch()
    positions = (rows.attention_mask.cumsum(1) - 1).clamp(min=0)
    states = model(
        rows.query_responses,
        attention_mask=rows.attention_mask,
        position_ids=positions,
        output_hidden_states=True,
    ).hidden_states
    mask = rows.attention_mask
    torch.testing.assert_close(trunk_output(model, rows)[mask], states[1][mask])


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # a plain head, and one with soft-capping
def test_the_trunk_is_recorded_by_the_way_and_serves_packed_rows(name):
    model, reference = tiny_model(name), tiny_model(name)
    freeze_trunk(model, 1)
    share_trunk(reference, model)
    with torch.no_grad():  # the policy has learnt something
        layers_of(model)[1].mlp.down_proj.weight.neg_()
    rows = pad_batch([[3, 4], [5, 6, 7]] * 2, [[8, 9], [10], [11], [12, 13]], 2)
    for score in (lambda m: response_logprobs(m, rows), lambda m: continuation_logprobs(m, rows, 2)):
        with recorded_trunk(model) as trunks:
            own = score(model).logprobs
        expected = score(tiny_model(name)).logprobs
        with resumed_from(trunks[-1], reference):
            found = score(reference).logprobs
        torch.testing.assert_close(
            found[rows.response_mask], expected[rows.response_mask], rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(found[rows.response_mask], own[rows.response_mask], atol=1e-2)
    with recorded_trunk(tiny_model(name)) as trunks:
        response_logprobs(tiny_model(name), rows)
    assert trunks == []


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama", "gemma2"])
def test_the_trunk_of_shared_prompts_is_that_of_separate_rows(name):
    model = four_layers(name).double()
    freeze_trunk(model, 1)
    rows = pad_batch([[3, 4], [5, 6, 7]] * 2, [[8, 9, 3], [10], [11], [12, 13]], 2)
    shapes: list[torch.Size] = []
    hook = layers_of(model)[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    shared = trunk_output(model, rows, 2)
    hook.remove()
    assert shapes == [(2, 6)]  # 2 + 3 + 1 and 3 + 1 + 2 tokens
    separate = trunk_output(model, rows)
    assert shared.shape == separate.shape
    torch.testing.assert_close(
        shared[rows.attention_mask], separate[rows.attention_mask], rtol=1e-9, atol=1e-9
    )
    assert not shared[rows.attention_mask.logical_not()].any()


def test_a_trunk_of_rows_serves_shared_rows_as_one_of_their_own():
    model = four_layers("llama").double()
    freeze_trunk(model, 1)
    rows = pad_batch([[3, 4], [5, 6, 7]] * 2, [[8, 9, 3], [10], [11], [12, 13]], 2)
    expected = continuation_logprobs(model, rows, 2).logprobs
    runs: list[int] = []
    for index, layer in enumerate(layers_of(model)):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    trunk = trunk_output(model, rows)
    with resumed_from(packed_states(trunk, rows, 2), model):
        found = continuation_logprobs(model, rows, 2).logprobs
    assert runs == [0, 1, 2, 3]
    torch.testing.assert_close(found[rows.response_mask], expected[rows.response_mask], rtol=1e-9, atol=1e-9)


# --- sharing ------------------------------------------------------------------------------------------------


def test_shared_layers_are_the_same_modules_and_change_no_output():
    policy, other = tiny_model("llama", num_hidden_layers=3), tiny_model("llama", num_hidden_layers=3)
    freeze_trunk(policy, 1)
    expected = response_logprobs(other, batch()).logprobs
    assert same_trunk(other, policy) and not has_trunk(other)
    share_trunk(other, policy)
    assert has_trunk(other)
    assert torch.equal(response_logprobs(other, batch()).logprobs, expected)
    both = {id(p): p.numel() for model in (policy, other) for p in model.parameters()}
    alone = sum(p.numel() for p in policy.parameters())
    trunk = sum(p.numel() for layer in layers_of(policy)[:2] for p in layer.parameters())
    embedding = policy.get_input_embeddings().weight.numel()
    assert sum(both.values()) == 2 * alone - trunk - embedding


def test_a_tied_head_stays_tied_to_the_shared_embedding():
    policy, other = tiny_model("gpt2"), tiny_model("gpt2", seed=1)
    freeze_trunk(policy, 1)
    share_trunk(other, policy)
    embedding = policy.get_input_embeddings().weight
    assert (
        other.get_input_embeddings().weight is embedding and other.get_output_embeddings().weight is embedding
    )


def test_what_no_weight_shows_makes_another_trunk():
    policy = tiny_model("llama", num_hidden_layers=3)
    freeze_trunk(policy, 1)
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
    for changes in (scaled, {"rms_norm_eps": 0.5}):
        assert not same_trunk(tiny_model("llama", num_hidden_layers=3, **changes), policy), changes


def test_one_changed_weight_makes_another_trunk():
    policy = tiny_model("llama", num_hidden_layers=3)
    freeze_trunk(policy, 1)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        other = tiny_model("llama", num_hidden_layers=3)
        with torch.no_grad():
            other.get_parameter(name)[3, 4] += 1e-6
        assert not same_trunk(other, policy), name
    above = tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        above.model.layers[2].mlp.up_proj.weight.add_(1)
    assert same_trunk(above, policy)
    assert not same_trunk(tiny_model("llama", num_hidden_layers=4), policy)
    assert not same_trunk(tiny_model("llama", num_hidden_layers=3).double(), policy)
    assert not same_trunk(tiny_model("mistral", num_hidden_layers=3), policy)


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text for the bytes"], 260)


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trunk") / "llama"
    tiny_model("llama", vocab_size=260, num_hidden_layers=3).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rank", [0, 2])
def test_policy_and_critic_stand_on_one_trunk(policy_path, tokenizer, rank):
    config = ModelConfig(path=policy_path, trainable_layers=1, lora=LoraConfig(r=rank))
    policy = load_policy(config, tokenizer)
    model = ActorCritic(policy, fresh_critic(policy, config))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".layers.2." in n or "head" in n or ".norm." in n for n in trained), trained
    if rank:
        assert all(".lora_" in name or ".modules_to_save." in name for name in trained)
    rows = batch()
    fields = (rows.queries, rows.query_mask, rows.responses, rows.response_mask)
    runs = []
    for layer in layers_of(policy)[:2]:
        layer.register_forward_hook(lambda *_: runs.append(1))
    expected = model(*fields)
    assert len(runs) == 4  # two layers, two models
    found = model(*fields, trunk=trunk_output(policy, rows))
    assert len(runs) == 6
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    if rank:
        with adapter_disabled(policy), resumed_from(trunk_output(policy, rows), policy):
            reference = response_logprobs(policy, rows).logprobs
        base = response_logprobs(tiny_model("llama", vocab_size=260, num_hidden_layers=3), rows).logprobs
        assert torch.equal(reference[rows.response_mask], base[rows.response_mask])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trunk_of_an_adapted_policy_keeps_no_graph(policy_path, tokenizer, checkpointing):
    config = ModelConfig(
        path=policy_path, trainable_layers=1, lora=LoraConfig(r=2), gradient_checkpointing=checkpointing
    )
    policy = load_policy(config, tokenizer)
    requires: list[bool] = []
    layers_of(policy)[2].register_forward_pre_hook(
        lambda module, args: requires.append(args[0].requires_grad)
    )
    logprobs = response_logprobs(policy, batch()).logprobs
    assert logprobs.requires_grad and requires[0] is False


def test_a_critic_must_have_the_policys_lower_layers(policy_path, tokenizer, tmp_path):
    config = ModelConfig(path=policy_path, trainable_layers=1)
    policy = load_policy(config, tokenizer)
    ScalarModel.from_causal_lm(policy).save_pretrained(tmp_path / "same")
    assert layers_of(load_critic(str(tmp_path / "same"), config, policy=policy))[0] is layers_of(policy)[0]
    other = tiny_model("llama", seed=1, vocab_size=260, num_hidden_layers=3)
    ScalarModel.from_causal_lm(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="critic.path: with model.trainable_layers policy and critic share"):
        load_critic(str(tmp_path / "other"), config, policy=policy)


@pytest.mark.parametrize("number", [3, 7])
def test_a_trunk_of_no_layers_is_refused(policy_path, tokenizer, number):
    with pytest.raises(ConfigError, match=f"model.trainable_layers is {number}, but the model has 3 layers"):
        load_policy(ModelConfig(path=policy_path, trainable_layers=number), tokenizer)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path": "somewhere", "trainable_layers": 0}, "must be >= 1"),
        ({"architecture": {"model_type": "llama"}, "vocab_size": 300, "trainable_layers": 1}, "from scratch"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^trainable_layers.*{message}"):
        ModelConfig(**settings)


def test_layers_that_cannot_be_cut_are_refused():
    with pytest.raises(ConfigError, match="BloomModel take or give back more than hidden states"):
        freeze_trunk(tiny_model("bloom"), 1)
