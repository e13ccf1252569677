"""Continuations from states within rollouts: where the states are, and what is sampled and scored there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from drpo.data.encode import Example
from drpo.data.records import Record
from drpo.engine import Engine, EngineConfig
from drpo.models.tokenizer import train_tokenizer
from drpo.rewards import Completion
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.sampler import SamplingConfig
from drpo.rollout.starts import Start
from drpo.rollout.trajectory import Continuations
from drpo.rollout.vine import VineConfig, continue_states, draw_number, state_positions
from drpo.run.metrics import Phases

LIMIT = 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three. four five!\n"], 270)


@pytest.fixture(scope="module")
def policy(tokenizer):
    return tiny_model("gpt_neox", vocab_size=len(tokenizer))


@pytest.fixture
def engine(tmp_path) -> Engine:
    return Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)


@pytest.fixture
def generator(policy, tokenizer) -> Generator:
    vocabulary = vocabulary_of(tokenizer, policy.config.vocab_size)
    return Generator(policy, tokenizer, vocabulary, SamplingConfig(), LIMIT, batch_size=5, seed=3)


@pytest.fixture(scope="module")
def starts(tokenizer) -> list[Start]:
    """Episodes 4, 5, ..., each after a prefix of another length."""
    prefix = tuple(tokenizer(" two three. four").input_ids)
    result = []
    for row in range(6):
        example = Example(Record(prompt=f"post{row % 3}"), query_ids=tokenizer(f"post{row % 3}").input_ids)
        result.append(Start(4 + row, example, prefix[: row % 4], prefix))
    return result


@pytest.fixture
def continued(generator, engine, starts) -> Callable[..., Continuations]:
    def continue_rollouts(rows=slice(None), generator=generator, reward_fn=None, **settings) -> Continuations:
        completions = generator.respond(starts[rows])
        config = VineConfig(**{"every": 2, "num_rollouts": 3, **settings})
        scores = reward_fn or by_tokens
        return continue_states(starts[rows], completions, generator, engine, scores, config, Phases())

    return continue_rollouts


def by_tokens(completions: Sequence[Completion]) -> list[float]:
    """Another score for almost any other response."""
    return [float(sum((i + 1) * t for i, t in enumerate(c.response_ids)) % 1009) for c in completions]


# --- states -----------------------------------------------------------------------------------------------


def test_states_are_before_the_first_sampled_token_and_every_few_after(tokenizer):
    ids = list(range(20, 30))
    assert state_positions(ids, 0, VineConfig(every=4), tokenizer) == [0, 4, 8]
    assert state_positions(ids, 3, VineConfig(every=3), tokenizer) == [3, 6, 9]
    assert state_positions(ids, 3, VineConfig(every=7), tokenizer) == [3]  # none after the last token
    assert state_positions(ids, 9, VineConfig(every=1), tokenizer) == [9]


def test_states_may_be_ends_of_sentences_far_enough_apart(tokenizer):
    sentences = [" two three.", " four!", " one two three four.", " five"]
    ids = tokenizer("".join(sentences)).input_ids
    texts = [tokenizer.decode(ids[:length]).rstrip(" ") for length in range(len(ids))]
    ends = ["".join(sentences[:number]) for number in (1, 2, 3)]
    # The last place where no more than the sentence is there: a token may be a space alone.
    first, second, third = (max(i for i, text in enumerate(texts) if text == end) for end in ends)

    def positions(prefix: int, every: int) -> list[int]:
        config = VineConfig(boundary="sentence", every=every)
        return state_positions([*ids, tokenizer.eos_token_id], prefix, config, tokenizer)

    assert positions(0, 1) == [0, first, second, third]
    assert positions(1, 1) == [1, first, second, third]
    assert positions(first, 1) == [first, second, third]
    assert positions(0, first + 1) == [0, second, third]
    assert positions(0, second + 1) == [0, third]
    assert positions(0, 50) == [0]


def test_no_two_continuations_have_the_same_random_numbers():
    numbers = {draw_number(e, p, k) for e in (0, 1, 2**20) for p in (0, 1, 4095) for k in (0, 1, 65535)}
    assert len(numbers) == 27


# --- continuations ----------------------------------------------------------------------------------------


def test_every_state_of_every_rollout_is_continued(generator, starts, continued):
    seen: list[Completion] = []

    def score(completions: Sequence[Completion]) -> list[float]:
        seen.extend(completions)
        return by_tokens(completions)

    result = continued(reward_fn=score)
    rollouts = generator.respond(starts)
    expected = []
    for row, (start, rollout) in enumerate(zip(starts, rollouts, strict=True)):
        positions = list(range(len(start.prefix), len(rollout.response_ids), 2))
        assert result.positions[row].tolist() == positions + [-1] * (
            result.positions.shape[1] - len(positions)
        )
        expected += [(row, i, position, k) for i, position in enumerate(positions) for k in range(3)]
    assert len(seen) == len(expected) == 3 * int(result.mask.sum())
    scores = by_tokens(seen)
    for completion, score, (row, i, position, k) in zip(seen, scores, expected, strict=True):
        assert completion.record is starts[row].example.record
        assert completion.query_ids == starts[row].example.query_ids
        assert completion.response_ids[:position] == rollouts[row].response_ids[:position]
        length = len(completion.response_ids)
        assert position < length <= LIMIT and (completion.ended or length == LIMIT)
        assert (result.scores[row, i, k], result.lengths[row, i, k]) == (score, length)
        assert bool(result.ended[row, i, k]) == completion.ended
        assert int(result.num_sampled[row, i, k]) == length - position
    empty = result.mask.logical_not()
    assert bool(empty.any()) and not result.scores[empty].any() and not result.num_sampled[empty].any()
    assert len(set(scores)) > len(scores) / 2  # they are not the rollouts over again, nor each other


def test_continuations_depend_on_their_state_alone(generator, continued):
    """Other neighbours, other batches: the same scores. This is what makes the number of processes irrelevant."""
    whole = continued()
    for part in (slice(0, 2), slice(2, 6)):
        other = continued(part, replace(generator, batch_size=2))
        width = other.positions.shape[1]
        assert torch.equal(other.positions, whole.positions[part, :width])
        assert torch.equal(other.scores, whole.scores[part, :width])
        assert not whole.mask[part, width:].any()
    sparse = continued(
        every=4, num_rollouts=2
    )  # the states that both have, and the first of their continuations
    assert torch.equal(sparse.scores[0, 0], whole.scores[0, 0, :2])
    assert torch.equal(sparse.scores[0, 1], whole.scores[0, 2, :2])


def test_another_seed_continues_otherwise(generator, starts, continued, engine):
    few = starts[:2]
    rollouts = generator.respond(few)

    def scores(generator: Generator) -> torch.Tensor:
        config = VineConfig(every=3, num_rollouts=2)
        return continue_states(few, rollouts, generator, engine, by_tokens, config, Phases()).scores

    assert torch.equal(scores(generator), scores(generator))
    assert not torch.equal(scores(generator), scores(replace(generator, seed=4)))


def test_values_of_a_deterministic_policy_are_the_scores_of_its_rollouts(generator, continued, starts):
    greedy = replace(generator, sampling=SamplingConfig(temperature=0.0))
    result = continued(generator=greedy)
    scores = torch.tensor(by_tokens(greedy.respond(starts)))
    assert torch.equal(
        result.scores[result.mask], scores[:, None, None].expand_as(result.scores)[result.mask]
    )


def test_values_of_one_step_are_expectations_over_the_next_token(
    generator, policy, starts, engine, tokenizer
):
    """With one token to go, V is the probability of the tokens that score, which the logits give exactly."""
    generator = replace(generator, max_response_length=2, batch_size=1500)
    (rollout,) = generator.respond(starts[:1])

    def score(completions: Sequence[Completion]) -> list[float]:
        return [float(c.response_ids[-1] % 3 == 0) for c in completions]

    config = VineConfig(every=1, num_rollouts=1500)
    result = continue_states(starts[:1], [rollout], generator, engine, score, config, Phases())
    assert result.positions.tolist() == [[0, 1]]
    with torch.no_grad():
        logits = policy(torch.tensor([[*rollout.query_ids, rollout.response_ids[0]]])).logits[0, -1]
    logits[list(generator.vocabulary.suppressed_ids)] = -torch.inf
    exact = float(logits.softmax(-1)[::3].sum())
    assert 0.1 < exact < 0.9
    standard_error = (exact * (1 - exact) / 1500) ** 0.5
    assert float(result.scores[0, 1].mean()) == pytest.approx(exact, abs=4 * standard_error)


# --- the record -------------------------------------------------------------------------------------------


def test_numbers_of_states_go_to_their_tokens():
    positions = torch.tensor([[1, 3], [0, -1]])
    shape = (2, 2, 1)
    continuations = Continuations(
        positions=positions,
        scores=torch.zeros(shape),
        ended=torch.zeros(shape, dtype=torch.bool),
        lengths=torch.tensor([[[5], [4]], [[2], [0]]]),
    )
    values = continuations.by_token(torch.tensor([[1.5, 2.5], [3.5, 99.0]]), 4)
    assert values.tolist() == [[0, 1.5, 0, 2.5], [3.5, 0, 0, 0]]
    assert continuations.by_token(continuations.mask, 4).tolist() == [
        [False, True, False, True],
        [True, False, False, False],
    ]
    assert continuations.num_sampled.tolist() == [[[4], [1]], [[2], [0]]]
    assert continuations.map(lambda rows: rows[1:]).positions.tolist() == [[0, -1]]
