"""The score of an ensemble from its members' scores, by hand and by plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from reward_models.ensembles import combine, spread

SCORES = torch.tensor([[1.0, 0.5], [4.0, 0.5], [-2.0, 0.5]])  # means 1 and 0.5; variances 6 and 0


@pytest.mark.parametrize(
    "how, coef, expected",
    [
        ("mean", 1.0, [1.0, 0.5]),
        ("min", 1.0, [-2.0, 0.5]),
        ("mean_minus_std", 0.5, [1 - 0.5 * math.sqrt(6), 0.5]),
        ("mean_minus_std", 0.0, [1.0, 0.5]),
        ("mean_minus_variance", 0.5, [-2.0, 0.5]),
    ],
)
def test_combinations_by_hand(how, coef, expected):
    combined = combine(SCORES, how, coef)
    assert combined.dtype == torch.float32
    assert combined.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_std", "mean_minus_variance"])
def test_one_member_scores_as_it_does_alone_bit_for_bit(how):
    scores = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(combine(scores, how, 2.0), scores[0])
    assert not spread(scores).any()


def test_the_spread_is_the_population_deviation_over_members():
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    expected = [statistics.pstdev(column) for column in scores.T.tolist()]
    assert spread(scores).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_std", "mean_minus_variance"])
def test_the_order_of_the_members_does_not_matter(how):
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(combine(scores, how, 0.7), combine(scores.flip(0), how, 0.7))


@pytest.mark.parametrize("how", ["min", "mean_minus_std", "mean_minus_variance"])
def test_disagreement_never_raises_the_score(how):
    scores = torch.randn(3, 200, generator=torch.Generator().manual_seed(3))
    assert bool((combine(scores, how, 1.0) <= combine(scores, "mean", 1.0)).all())


def test_an_unknown_combination_is_an_error():
    with pytest.raises(ValueError, match="unknown combination 'median'"):
        combine(SCORES, "median", 1.0)
