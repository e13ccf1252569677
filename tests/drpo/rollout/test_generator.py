"""The generator: log-probs of the distribution that was sampled from, and draws that decide a row alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from drpo.models.scoring import response_logprobs
from drpo.rollout.generator import Generator
from drpo.rollout.sampler import SamplingConfig, Vocabulary
from drpo.tensors import pad_batch

CONTEXTS = [[5, 6, 7], [8], [9, 10, 11, 12], [5, 6, 7]]
BUDGETS = [6, 3, 5, 0]
DRAWS = [(0, 1), (0, 2), (4, 1), (0, 3)]
STOP, PAD = 1, 2


def generator(sampling: SamplingConfig, batch_size: int = 2) -> Generator:
    return Generator(
        tiny_model("llama", seed=3), None, Vocabulary(PAD, (STOP,), (PAD,)), sampling, 8, batch_size
    )


def test_logprobs_are_those_of_scoring():
    made = generator(SamplingConfig(temperature=0.7))
    found = made.generate(CONTEXTS, BUDGETS, DRAWS, logprobs=True)
    assert [len(values) for values in found.logprobs] == [len(ids) for ids in found.tokens]
    assert found.tokens[3] == [] and max(map(len, found.tokens)) > 2
    batch = pad_batch(CONTEXTS[:3], found.tokens[:3], PAD)
    with torch.no_grad():
        expected = response_logprobs(made.policy, batch, temperature=0.7, suppressed_ids=(PAD,)).logprobs
    for row, values in enumerate(found.logprobs[:3]):
        assert values == pytest.approx(expected[row, : len(values)].tolist(), abs=1e-5)


def test_logprobs_are_those_of_what_the_filters_leave():
    """Of the two most likely tokens alone, renormalised; nothing else was possible."""
    made = generator(SamplingConfig(temperature=1.0, top_k=2))
    found = made.generate(CONTEXTS[:1], [1], [(0, 7)], logprobs=True)
    with torch.no_grad():
        logits = made.policy(torch.tensor(CONTEXTS[:1])).logits[0, -1].double()
    logits[PAD] = -torch.inf
    best, ids = logits.topk(2)
    token = found.tokens[0][0]
    assert token in ids.tolist()
    expected = best.log_softmax(-1)[ids.tolist().index(token)]
    assert found.logprobs[0][0] == pytest.approx(float(expected), abs=1e-5)


def test_greedy_tokens_are_certain_and_logprobs_come_only_when_asked():
    made = generator(SamplingConfig(temperature=0.0))
    found = made.generate(CONTEXTS[:2], BUDGETS[:2], DRAWS[:2], logprobs=True)
    assert all(value == 0.0 for values in found.logprobs for value in values)
    assert made.generate(CONTEXTS, BUDGETS, DRAWS).logprobs is None
    assert made.generate([], [], []).tokens == []


def test_a_row_depends_on_its_context_and_draw_alone():
    sampling = SamplingConfig(temperature=1.3)
    whole = generator(sampling, batch_size=4).generate(CONTEXTS, BUDGETS, DRAWS, logprobs=True)
    for row in range(4):
        alone = generator(sampling).generate([CONTEXTS[row]], [BUDGETS[row]], [DRAWS[row]], logprobs=True)
        assert alone.tokens[0] == whole.tokens[row]
        assert alone.logprobs[0] == pytest.approx(whole.logprobs[row], abs=1e-5)
    other = generator(sampling).generate(CONTEXTS[:1], BUDGETS[:1], [(1, 1)])
    assert other.tokens[0] != whole.tokens[0]
