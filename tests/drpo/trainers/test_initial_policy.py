"""Prefixes of the initial policy (reset.source=initial) are what that policy writes, not the one in training."""

from __future__ import annotations

import torch
from tiny_models import tiny_model

from drpo.data.encode import Example
from drpo.data.records import Record
from drpo.engine import Engine, EngineConfig
from drpo.models.actor_critic import ActorCritic
from drpo.models.tokenizer import train_tokenizer
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.sampler import SamplingConfig
from drpo.rollout.starts import Start
from drpo.trainers.online_models import OnlineModels

LIMIT = 6


@torch.no_grad()
def most_likely(model, ids: list[int], stop_ids, suppressed_ids) -> list[int]:
    """The response that takes the most likely token each time, by whole forwards over a single row."""
    response = []
    while len(response) < LIMIT and not (response and response[-1] in stop_ids):
        logits = model(torch.tensor([[*ids, *response]])).logits[0, -1]
        logits[list(suppressed_ids)] = -torch.inf
        response.append(int(logits.argmax()))
    return response


def test_a_cold_sample_is_the_most_likely_response_of_the_reference(tmp_path):
    tokenizer = train_tokenizer(["one two three. four five!\n"], 270)
    policy, reference = (tiny_model("gpt_neox", seed=seed, vocab_size=len(tokenizer)) for seed in (0, 1))
    vocabulary = vocabulary_of(tokenizer, len(tokenizer))
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    cold = SamplingConfig(temperature=1e-4)
    generator = Generator(policy, tokenizer, vocabulary, cold, LIMIT, batch_size=3, seed=3)
    actor_critic = ActorCritic(policy, None, temperature=1e-4, suppressed_ids=vocabulary.suppressed_ids)
    models = OnlineModels(
        engine, actor_critic, actor_critic, generator, None, notes=[], reference_copy=reference
    )
    examples = [
        Example(Record(prompt=f"post{i}", origin=f"posts.jsonl:{i}"), tokenizer(f"post{i}").input_ids)
        for i in range(7)
    ]
    sampled = models.sample_initial([Start(episode, example) for episode, example in enumerate(examples)])
    expected, of_policy = (
        [most_likely(model, e.query_ids, vocabulary.stop_ids, vocabulary.suppressed_ids) for e in examples]
        for model in (reference, policy)
    )
    assert sampled == expected != of_policy
