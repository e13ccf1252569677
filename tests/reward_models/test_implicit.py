"""Implicit rewards against a plain loop over log-probabilities."""

from __future__ import annotations

import pytest
import torch
from online_runs import forget_precision
from tiny_models import tiny_model
from tiny_tokenizers import single_bytes

from drpo.data.records import Record
from drpo.engine import Engine, EngineConfig
from drpo.rewards import Completion
from reward_models.implicit import ImplicitReward

QUERY = [40, 41, 42]
ROWS = [(QUERY, [90, 91, 0]), ([50] * 9, [60, 0]), (QUERY, [92, 93, 94, 95, 0]), ([70, 71], [0])]


@pytest.fixture
def engine(tmp_path):
    forget_precision()
    yield Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    forget_precision()


def completions(rows=ROWS) -> list[Completion]:
    return [Completion("", "", True, list(query), list(response), Record("")) for query, response in rows]


@torch.no_grad()
def log_prob(model, query, response) -> float:
    logits = model(input_ids=torch.tensor([query + response])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(query) + t - 1, token]) for t, token in enumerate(response))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_are_beta_times_the_log_ratio(engine, batch_size):
    policy, reference = (
        tiny_model("gpt_neox", vocab_size=len(single_bytes()), seed=s).eval() for s in (0, 1)
    )
    score = ImplicitReward(policy, reference, single_bytes(), engine, batch_size, beta=0.3)
    expected = [0.3 * (log_prob(policy, *row) - log_prob(reference, *row)) for row in ROWS]
    assert score(completions()).tolist() == pytest.approx(expected, abs=2e-5)
    assert len({round(value, 4) for value in expected}) == len(ROWS)


def test_completions_without_tokens_are_refused(engine):
    model = tiny_model("gpt_neox", vocab_size=len(single_bytes())).eval()
    score = ImplicitReward(model, model, single_bytes(), engine, 2, beta=0.1)
    with pytest.raises(ValueError, match="scores of tokens, and a completion has none"):
        score(completions([([], [])]))
