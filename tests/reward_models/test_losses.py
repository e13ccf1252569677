"""Losses of reward models by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from reward_models.losses import comparison_loss, plackett_luce_loss


def test_comparisons_by_hand():
    # -log sigmoid(0) = log 2; -log sigmoid(1) = log(1 + 1/e) = 0.3132616875, -log sigmoid(-1) is 1 more.
    losses = comparison_loss(torch.tensor([0.0, 1.0, -1.0]))
    assert losses.tolist() == pytest.approx([0.6931471806, 0.3132616875, 1.3132616875])
    # 0.9 x 0.3132616875 + 0.1 x 1.3132616875 = 0.4132616875, and the other way round 1.2132616875.
    smooth = comparison_loss(torch.tensor([0.0, 1.0, -1.0]), label_smoothing=0.1)
    assert smooth.tolist() == pytest.approx([0.6931471806, 0.4132616875, 1.2132616875])


def test_smoothing_has_its_least_loss_at_the_log_odds_of_the_label():
    margins = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    best = margins[comparison_loss(margins, 0.2).argmin()]
    assert float(best) == pytest.approx(math.log(0.8 / 0.2), abs=1e-3)


def test_two_responses_are_a_comparison():
    scores = torch.tensor([[0.3, 1.7], [2.0, -1.0]])
    found = plackett_luce_loss(scores, torch.tensor([[1, 0], [0, 1]]))
    expected = [math.log1p(math.exp(-1.4)), math.log1p(math.exp(-3.0))]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_probabilities_of_all_orders_sum_to_one():
    scores = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    total = sum(
        math.exp(-float(plackett_luce_loss(scores[None], torch.tensor([order]))))
        for order in itertools.permutations(range(4))
    )
    assert total == pytest.approx(1.0)


def test_three_responses_by_hand():
    # exp r = 4, 2, 1 in the order middle, best, last: P = 2/7 x 4/5 = 8/35.
    scores = torch.log(torch.tensor([[4.0, 2.0, 1.0]]))
    assert plackett_luce_loss(scores, torch.tensor([[1, 0, 2]])).item() == pytest.approx(math.log(35 / 8))


def test_absent_responses_cost_nothing_and_get_no_gradient():
    scores = torch.tensor([[1.0, 2.0, 50.0], [0.0, 1.0, 2.0]], requires_grad=True)
    losses = plackett_luce_loss(scores, torch.tensor([[0, 1, -1], [-1, -1, -1]]))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.log1p(math.e), 0.0])
    assert scores.grad[0, 2] == 0 and not scores.grad[1].any()
    assert not scores.grad.isnan().any()


def test_tied_responses_are_best_equal():
    """exp r = a, b, and 1 behind both: P = ab / (a + b + 1)^2 has its maximum, of given a + b, at a = b."""
    ranks = torch.tensor([[0, 0, 1]])
    scores = torch.log(torch.tensor([[3.0, 3.0, 1.0], [4.0, 2.0, 1.0], [2.0, 4.0, 1.0]]))
    losses = plackett_luce_loss(scores, ranks.expand(3, -1))
    assert losses.tolist() == pytest.approx([math.log(49 / 9), math.log(49 / 8), math.log(49 / 8)])
