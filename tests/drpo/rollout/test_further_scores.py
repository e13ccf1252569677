"""Scores beside the rollouts: which responses the reward function gets, and what becomes of uneven numbers of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from drpo.data.encode import Example
from drpo.data.records import Record
from drpo.engine import Engine, EngineConfig
from drpo.models.tokenizer import train_tokenizer
from drpo.rewards import Completion
from drpo.rollout.further_scores import score_evenly, score_sources
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.sampler import SamplingConfig
from drpo.rollout.starts import Start
from drpo.run.metrics import Phases

LIMIT = 6
SPARE = Completion(
    prompt="", response="spare", ended=True, query_ids=[], response_ids=[1], record=Record(prompt="")
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three. four five!\n"], 270)


@pytest.fixture
def engine(tmp_path) -> Engine:
    return Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)


@pytest.fixture
def generator(tokenizer) -> Generator:
    policy = tiny_model("gpt_neox", vocab_size=len(tokenizer))
    return Generator(policy, tokenizer, vocabulary_of(tokenizer, len(tokenizer)), SamplingConfig(), LIMIT, 4)


class Scorer:
    """Scores by length, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[Completion] = []

    def __call__(self, completions) -> list[float]:
        self.given += completions
        return [float(len(completion.response_ids)) for completion in completions]


def test_each_response_is_scored_once_as_a_completion_of_its_prompt(generator, engine, tokenizer):
    short, long = (
        [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        for text in (" one", " two three. four five! one two")
    )
    assert len(short) < LIMIT < len(long)
    examples = [
        Example(Record(prompt=name), query_ids=tokenizer(name).input_ids) for name in ("post0", "post1")
    ]
    starts = [
        Start(0, examples[0], tuple(short[:1]), tuple(short)),
        Start(1, examples[0], (), tuple(short)),
        Start(2, examples[1]),
        Start(3, examples[1], tuple(short[:1]), tuple(short)),
        Start(4, examples[0], tuple(long[:2]), tuple(long)),
    ]
    scorer = Scorer()
    scores = score_sources(starts, generator, engine, scorer, SPARE, Phases())
    assert scores.tolist() == [len(short), len(short), 0.0, len(short), LIMIT]
    assert [(c.record.prompt, c.prompt, c.response_ids, c.ended) for c in scorer.given] == [
        ("post0", "post0", short, True),
        ("post1", "post1", short, True),
        ("post0", "post0", long[:LIMIT], False),
    ]
    assert scorer.given[0].query_ids == examples[0].query_ids
    assert scorer.given[0].response == " one"


def test_without_a_reset_nothing_is_scored(generator, engine):
    scorer = Scorer()
    starts = [Start(0, Example(Record(prompt="p"), query_ids=[1]))] * 2
    assert score_sources(starts, generator, engine, scorer, SPARE, Phases()).tolist() == [0.0, 0.0]
    assert scorer.given == []


@pytest.mark.parametrize("own, most", [(0, 3), (1, 3), (3, 3)])
def test_where_weights_are_cut_over_processes_all_score_equally_many(own, most):
    class Cut:
        """Two processes of which the other one has three completions."""

        partitions_weights = True

        def max(self, count: int) -> float:
            return float(max(count, most))

    completions = [replace(SPARE, response=str(i), response_ids=[1] * (i + 2)) for i in range(own)]
    scorer = Scorer()
    scores = score_evenly(completions, SPARE, Cut(), scorer)
    assert torch.equal(scores, torch.arange(own) + 2.0)
    assert len(scorer.given) == most and scorer.given[own:] == [SPARE] * (most - own)
