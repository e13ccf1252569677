"""An engine with weights of its own: what a Generator asks of it, and how its log-probs reach the rollouts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import move_weights, tiny_model
from twin_engine import TwinEngine

from drpo.data.encode import Example
from drpo.data.records import Record
from drpo.engine import Engine, EngineConfig
from drpo.models.adapters import add_lora
from drpo.models.scoring import response_logprobs
from drpo.models.tokenizer import train_tokenizer
from drpo.rollout.collect import collect
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.held_out import EvalConfig, evaluate
from drpo.rollout.sampler import SamplingConfig
from drpo.rollout.starts import Start
from drpo.run.metrics import Phases

TEMPERATURE = 0.8
LIMIT = 9


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three. four five!\n"], 270)


@pytest.fixture
def generator(tokenizer) -> Generator:
    policy = tiny_model("gpt_neox", vocab_size=len(tokenizer) + 8)
    vocabulary = vocabulary_of(tokenizer, policy.config.vocab_size)
    twin = TwinEngine(policy, vocabulary)
    lora = add_lora(policy, r=2, alpha=4.0, target_modules=None, seed=0)
    sampling = SamplingConfig(temperature=TEMPERATURE)
    return Generator(lora, tokenizer, vocabulary, sampling, LIMIT, 4, seed=3, vllm=twin)


@pytest.fixture
def engine(tmp_path) -> Engine:
    return Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)


@pytest.fixture
def starts(tokenizer) -> list[Start]:
    """Two with an empty prefix, two from a prefix of the response, one with a single token left."""
    text = tokenizer(" three four five! one").input_ids
    query = tokenizer("one two").input_ids
    example = Example(Record(prompt="one two", completion=" three four five! one"), query, text)
    return [Start(i, example, tuple(text[:h]), tuple(text)) for i, h in enumerate((0, 3, 0, 5, LIMIT - 1))]


def by_length(completions) -> list[float]:
    return [float(len(completion.response_ids)) for completion in completions]


def trainers_logprobs(generator: Generator, rollouts) -> torch.Tensor:
    settings = {"temperature": TEMPERATURE, "suppressed_ids": generator.vocabulary.suppressed_ids}
    with torch.no_grad():
        return response_logprobs(generator.policy, rollouts.batch, **settings).logprobs


def test_engine_logprobs_follow_the_policy_and_stand_at_sampled_tokens(generator, engine, starts):
    for seed in range(3):  # before any update, and after two
        rollouts, completions = collect(starts, generator, engine, by_length, 1, Phases())
        found, mask = rollouts.engine_logprobs, rollouts.action_mask
        assert found.shape == rollouts.responses.shape and found.dtype == torch.float32
        torch.testing.assert_close(
            found[mask], trainers_logprobs(generator, rollouts)[mask], atol=2e-5, rtol=0
        )
        assert torch.count_nonzero(found[mask.logical_not()]) == 0
        num_sampled = [len(c.engine_logprobs) for c in completions]
        assert num_sampled == mask.sum(dim=1).tolist()
        move_weights(generator.policy, seed)


def test_an_engine_with_old_weights_is_seen_in_its_logprobs(generator, engine, starts):
    with generator.synced():
        move_weights(generator.policy, 0)
        completions = generator.respond(starts)
    rollouts, _ = collect(starts, generator, engine, by_length, 1, Phases())
    new = collect(starts, generator, engine, by_length, 1, Phases())[0].engine_logprobs
    assert torch.equal(rollouts.engine_logprobs, new), "the same weights, starts and seeds"
    old = [value for c in completions for value in c.engine_logprobs]
    assert old != pytest.approx(new[rollouts.action_mask].tolist(), abs=0.01)


def test_rows_depend_on_seed_and_number_and_keep_their_order(generator):
    contexts, budgets = [[5, 6, 7], [8], [9, 10, 11]], [4, 0, 3]
    with generator.synced():
        whole = generator.generate(contexts, budgets, [(3, 1), (3, 2), (4, 1)])
        alone = generator.generate(contexts[2:], budgets[2:], [(4, 1)])
        other = generator.generate(contexts[:1], [50], [(3, 2)])
    assert [len(ids) for ids in whole.tokens][1] == 0 and whole.logprobs[1] == []
    assert alone.tokens[0] == whole.tokens[2]
    assert other.tokens[0][:4] != whole.tokens[0]


def test_held_out_prompts_are_sampled_by_the_engine(generator, engine, starts):
    def same(batch):
        settings = {"temperature": TEMPERATURE, "suppressed_ids": generator.vocabulary.suppressed_ids}
        return response_logprobs(generator.policy, batch, **settings).logprobs

    examples = [starts[0].example] * 3
    with generator.synced():
        config = EvalConfig(num_prompts=3, temperature=TEMPERATURE)
        metrics, samples = evaluate(config, engine, generator, examples, {"score": by_length}, same)
    assert metrics["eval/kl"] == pytest.approx(0.0, abs=1e-4) and len(samples) == 3
    with pytest.raises(AssertionError):  # outside of `synced` it does not sample
        evaluate(config, engine, generator, examples, {}, None)


def test_without_an_engine_nothing_is_synced_and_nothing_logged(generator, engine, starts):
    native = dataclasses.replace(generator, vllm=None)
    with native.synced():
        pass
    rollouts, completions = collect(starts, native, engine, by_length, 1, Phases())
    assert rollouts.engine_logprobs is None
    assert all(completion.engine_logprobs is None for completion in completions)
