from __future__ import annotations

import pytest
import torch
from sampled import generate
from tiny_models import tiny_model
from torch import nn

from drpo.models.actor_critic import ActorCritic
from drpo.models.loading import LoraConfig, ModelConfig, fresh_critic, load_policy, load_scalar_model
from drpo.models.scalar_head import ScalarModel, token_values
from drpo.models.scoring import adapter_disabled, response_logprobs
from drpo.models.tokenizer import train_tokenizer
from drpo.rollout.sampler import SamplingConfig, draw_uniforms
from drpo.tensors import PaddedBatch, pad_batch

QUERIES = [[3, 4, 5], [7] * 11, [9, 8, 7, 6, 5, 4, 3], [10]] * 2
RESPONSES = [[11, 12, 1], [13], [14, 15, 16, 17, 1], [20, 21, 22, 23]] * 2
FAMILIES = ["gpt_neox", "llama", "gpt2", "opt", "gemma2"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["cats and dogs"], 260)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved policy and a saved critic of every family."""
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        tiny_model(name, vocab_size=260).save_pretrained(root / name)
        ScalarModel.from_causal_lm(tiny_model(name, seed=1, vocab_size=260)).save_pretrained(
            root / f"{name}_critic"
        )
    return root


def actor_critic(folders, tokenizer, name="llama", entropy_gradient=True, **settings) -> ActorCritic:
    config = ModelConfig(path=str(folders / name), **settings)
    critic = load_scalar_model(folders / f"{name}_critic", config)
    return ActorCritic(
        load_policy(config, tokenizer),
        critic,
        temperature=0.7,
        suppressed_ids=[1],
        entropy_gradient=entropy_gradient,
    )


def batch(**lengths) -> PaddedBatch:
    return pad_batch(QUERIES, RESPONSES, 1, **lengths)


def fields(b: PaddedBatch) -> dict[str, torch.Tensor]:
    return {
        "queries": b.queries,
        "query_mask": b.query_mask,
        "responses": b.responses,
        "response_mask": b.response_mask,
    }


def change_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_forward_gives_the_scores_of_its_parts(folders, tokenizer):
    model = actor_critic(folders, tokenizer)
    logprobs, entropy, values = model(**fields(batch()))
    expected = response_logprobs(model.policy, batch(), temperature=0.7, suppressed_ids=[1], entropy=True)
    assert torch.equal(logprobs, expected.logprobs) and torch.equal(entropy, expected.entropy)
    assert torch.equal(values, token_values(model.critic, batch()))
    assert entropy.requires_grad
    assert model.config is model.policy.config


def test_an_entropy_without_a_bonus_has_the_same_value_and_no_graph(folders, tokenizer):
    wanted, only_shown = (
        actor_critic(folders, tokenizer, entropy_gradient=wanted) for wanted in (True, False)
    )
    logprobs, entropy, _ = only_shown(**fields(batch()))
    assert torch.equal(entropy, wanted(**fields(batch()))[1])
    assert logprobs.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_ratio_is_one_before_the_first_step_under_bf16(folders, tokenizer, name, rank, checkpointing):
    model = actor_critic(
        folders, tokenizer, name, lora=LoraConfig(r=rank), gradient_checkpointing=checkpointing
    )
    if rank:
        change_adapter(model)
    whole = batch(query_length=12, response_length=6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        old_logprobs, _, old_values = model.eval()(**fields(whole))
    model.train()
    for rows in (slice(None), [2, 7, 1], [4]):
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, _, values = model(**fields(whole.select(rows)))
        assert logprobs.requires_grad and values.requires_grad
        mask = whole.response_mask[rows]
        assert torch.equal(torch.exp(logprobs - old_logprobs[rows])[mask], torch.ones(int(mask.sum())))
        assert torch.equal(values[mask], old_values[rows][mask])


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_recomputes_policy_and_critic(folders, tokenizer, rank):
    calls = {}
    for checkpointing in (False, True):
        model = actor_critic(
            folders, tokenizer, gradient_checkpointing=checkpointing, lora=LoraConfig(r=rank)
        )
        model(**fields(batch()))  # the first call also probes the head
        seen = {"policy": 0, "critic": 0}
        for part, module in (("policy", model.policy), ("critic", model.critic)):
            for name, mlp in module.named_modules():
                if name.endswith(".mlp"):

                    def count(module, args, part=part, seen=seen):
                        seen[part] += 1

                    mlp.register_forward_pre_hook(count)
        logprobs, _, values = model(**fields(batch()))
        (logprobs.sum() + values.sum()).backward()
        calls[checkpointing] = seen
    assert calls == {False: {"policy": 2, "critic": 2}, True: {"policy": 4, "critic": 4}}


@pytest.mark.parametrize("name", FAMILIES)
def test_with_the_adapter_off_the_policy_is_its_base_model(folders, tokenizer, name):
    base = load_policy(ModelConfig(path=str(folders / name)), tokenizer)
    policy = load_policy(ModelConfig(path=str(folders / name), lora=LoraConfig(r=2)), tokenizer)
    expected = response_logprobs(base, batch()).logprobs
    assert torch.equal(response_logprobs(policy, batch()).logprobs, expected), (
        "a fresh adapter is the identity"
    )
    change_adapter(policy)
    changed = response_logprobs(policy, batch()).logprobs
    assert not torch.allclose(changed, expected, atol=1e-2)
    trained = [p.requires_grad for p in policy.parameters()]
    with adapter_disabled(policy):
        assert torch.equal(response_logprobs(policy, batch()).logprobs, expected)
    assert torch.equal(response_logprobs(policy, batch()).logprobs, changed)
    assert [p.requires_grad for p in policy.parameters()] == trained


def test_without_an_adapter_there_is_nothing_to_switch_off(folders, tokenizer):
    with pytest.raises(TypeError, match="no adapter"), adapter_disabled(tiny_model("llama")):
        pass


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_lora_only_adapters_and_the_value_head_learn(folders, tokenizer, name):
    model = actor_critic(folders, tokenizer, name, lora=LoraConfig(r=2))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B starts at zero, so A moves from the second step on
        logprobs, _, values = model(**fields(batch()))
        (logprobs[batch().response_mask].mean() + values.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in key or "critic" in key and "head.modules_to_save" in key for key in moved)
    assert any(key.startswith("critic") and ".lora_" in key for key in moved)


def test_a_fresh_critic_starts_from_the_policy_as_it_is(folders, tokenizer):
    config = ModelConfig(path=str(folders / "llama"), lora=LoraConfig(r=2), gradient_checkpointing=True)
    policy = load_policy(config, tokenizer)
    change_adapter(policy)
    critic = fresh_critic(policy, config, seed=3)
    assert critic.get_base_model().is_gradient_checkpointing and critic.training
    assert not token_values(critic, batch()).any()  # V = 0 until it has learnt something
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():  # a head of our own shows what is below it: the policy, adapter included
        for name, parameter in critic.named_parameters():
            if "head" in name and name.endswith("weight"):
                parameter.copy_(weight)
    merged = policy.merge_and_unload()
    hidden = merged.model(torch.tensor([QUERIES[0] + RESPONSES[0]])).last_hidden_state[0, 2:5]
    torch.testing.assert_close(
        token_values(critic, batch())[0, :3], (hidden @ weight.T)[:, 0], atol=1e-4, rtol=1e-4
    )


def test_a_lora_policy_samples_with_its_adapter(folders, tokenizer):
    policy = load_policy(ModelConfig(path=str(folders / "llama"), lora=LoraConfig(r=2)), tokenizer)

    def sample(model: nn.Module) -> list[list[int]]:
        return generate(
            model,
            QUERIES,
            [8] * 8,
            draw_uniforms(0, range(8), 8),
            sampling=SamplingConfig(),
            stop_ids=[],
            batch_size=3,
        )

    base = sample(load_policy(ModelConfig(path=str(folders / "llama")), tokenizer))
    assert sample(policy) == base
    change_adapter(policy)
    changed = sample(policy)
    assert changed != base
    with adapter_disabled(policy):
        assert sample(policy) == base
    assert sample(policy.merge_and_unload()) == changed
