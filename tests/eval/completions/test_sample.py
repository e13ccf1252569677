"""Completions of a policy against a plain sampling loop, in any batches, and what decides them as hashes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from online_runs import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.data.load import DataConfig, load_examples
from drpo.data.records import DataError
from drpo.data.tasks.demo import DemoConfig
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.sampler import SamplingConfig
from eval.completions.sample import (
    Policy,
    make_requests,
    requests_sha256,
    sha256_of,
    weights_sha256,
)

LENGTH = 9


@pytest.fixture(scope="module")
def policy(policy_folder) -> Policy:
    """A random policy that ends about half of its responses: its stop token has a bias."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    model = AutoModelForCausalLM.from_pretrained(policy_folder).eval()
    vocabulary = vocabulary_of(tokenizer, model.config.vocab_size)
    head = torch.nn.Linear(32, model.config.vocab_size)
    head.weight, head.bias.data[:] = model.get_output_embeddings().weight, 0.0
    head.bias.data[tokenizer.eos_token_id] = 3.5
    model.set_output_embeddings(head)
    sampling = SamplingConfig(temperature=1.3)
    return Policy("sft", Generator(model, tokenizer, vocabulary, sampling, LENGTH, batch_size=64))


@pytest.fixture(scope="module")
def examples(policy):
    return load_examples(DataConfig(demo=DemoConfig(**DEMO)), policy.generator.tokenizer, "prompts").train


@torch.no_grad()
def sampled_alone(policy: Policy, prompt: str, seed: int) -> list[int]:
    """A response token by token, without batch or cache, from numbers of the prompt's sha256 and the seed."""
    number = int(hashlib.sha256(prompt.encode()).hexdigest()[:16], 16)
    uniforms = np.random.default_rng([seed, 0x5A3, number]).random(LENGTH)
    ids, response = policy.generator.tokenizer(prompt).input_ids, []
    for uniform in uniforms:
        logits = policy.generator.policy(torch.tensor([ids + response])).logits[0, -1] / 1.3
        logits[policy.generator.tokenizer.pad_token_id] = -torch.inf
        cdf = torch.softmax(logits, dim=-1).double().cumsum(dim=-1)
        response.append(int((cdf <= uniform * cdf[-1]).sum()))
        if response[-1] == policy.generator.tokenizer.eos_token_id:
            break
    return response


def test_each_response_is_that_of_its_prompt_and_seed_alone(policy, examples):
    requests = make_requests(examples, 8, [0, 5])
    rows = policy.respond(requests)
    stop = policy.generator.tokenizer.eos_token_id
    for request, row in zip(requests, rows, strict=True):
        prompt = request.example.record.prompt
        expected = sampled_alone(policy, prompt, request.seed)
        assert row.response == policy.generator.tokenizer.decode(
            expected[:-1] if expected[-1] == stop else expected
        )
        assert (row.ended, row.num_tokens) == (expected[-1] == stop, len(expected))
        assert (row.system, row.prompt, row.seed) == ("sft", prompt, request.seed)
        assert row.reference == request.example.record.completion is not None
    assert {row.ended for row in rows} == {True, False}
    assert len({row.response for row in rows}) > 12

    for batch_size, chosen in ((1, requests), (3, requests[::-1]), (5, requests[4:7])):
        by_key = {row.key: row for row in rows}
        cut = replace(policy, generator=replace(policy.generator, batch_size=batch_size))
        assert all(row == by_key[row.key] for row in cut.respond(chosen))


def test_prompts_are_chosen_by_their_hashes(examples):
    everything = make_requests(examples, None, [0])
    ids = [hashlib.sha256(e.record.prompt.encode()).hexdigest()[:16] for e in examples]
    assert [request.prompt_id for request in everything] == ids
    five = make_requests(examples, 5, [3, 4])
    assert {r.prompt_id for r in five} == set(sorted(ids)[:5])
    assert [(r.prompt_id, r.seed) for r in five] == [
        (i, s) for i in ids if i in sorted(ids)[:5] for s in (3, 4)
    ]
    assert {r.prompt_id for r in make_requests(examples[::-1], 5, [0])} == {r.prompt_id for r in five}
    with pytest.raises(DataError, match="3 prompts, but only 2 different ones"):
        make_requests([*examples[:2], examples[0]], None, [0])


def test_the_hash_of_weights_is_that_of_their_values(policy_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    first = weights_sha256(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert weights_sha256(AutoModelForCausalLM.from_pretrained(tmp_path)) == first
    assert weights_sha256(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) != first
    model.gpt_neox.layers[1].mlp.dense_h_to_4h.bias.data[3] += 1e-6
    assert weights_sha256(model) != first


def test_the_hash_of_requests_is_that_of_all_that_they_ask(examples):
    requests = make_requests(examples, 4, [0])
    first = requests_sha256(requests)
    assert requests_sha256(make_requests(examples, 4, [0])) == first
    example = requests[2].example
    others = [
        replace(example, record=replace(example.record, prompt="another")),
        replace(example, record=replace(example.record, completion=" another")),
        replace(example, query_ids=[*example.query_ids, 5]),
    ]
    changed = [[*requests[:2], replace(requests[2], example=other), requests[3]] for other in others]
    changed += [[*requests[:2], replace(requests[2], seed=1), requests[3]], requests[:3], requests[::-1]]
    assert len({first, *map(requests_sha256, changed)}) == 1 + len(changed)
    assert sha256_of({"a": 1, "b": 2}) == sha256_of({"b": 2, "a": 1}) != sha256_of({"a": 1, "b": 3})
