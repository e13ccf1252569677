"""Best-of-n by enumeration of all subsets, by hand, and where samples tie."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from eval.statistics.best_of_n import expected_best, kl_bound, order_weights, top_credit


def test_weights_by_hand():
    assert order_weights(3) == pytest.approx(np.array([[1, 1, 1], [0, 1, 2], [0, 0, 3]]) / 3)


@pytest.mark.parametrize("num_samples", [1, 9, 2000])
def test_weights_are_exact_fractions(num_samples):
    """Also where C(N, n) is beyond float64, from N = 1030."""
    weights = order_weights(num_samples)
    for n in {1, 2, 7, num_samples // 2, num_samples - 1, num_samples} & set(range(1, num_samples + 1)):
        total = math.comb(num_samples, n)
        exact = [float(Fraction(math.comb(rank, n - 1), total)) for rank in range(num_samples)]
        assert weights[n - 1] == pytest.approx(exact, rel=1e-9, abs=1e-300)
    assert weights.sum(axis=1) == pytest.approx(1)


def test_three_samples_by_hand():
    """By rank the values are 5, 1, 3: all; the better of 1, 3, 3; the best."""
    found = expected_best([[0.1, 0.9, 0.4]], [[5.0, 3.0, 1.0]])
    assert found[0] == pytest.approx([3, 7 / 3, 3])


@pytest.mark.parametrize("seed", range(3))
def test_all_subsets_give_the_same(seed):
    rng = np.random.default_rng(seed)
    proxy, values = rng.integers(0, 4, (2, 7)).astype(float), rng.normal(size=(2, 7))
    found = expected_best(proxy, values)
    for row in range(2):
        for n in range(1, 8):
            best = []
            for subset in combinations(range(7), n):
                top = max(proxy[row, i] for i in subset)
                best.append(np.mean([values[row, i] for i in subset if proxy[row, i] == top]))
            # A subset's tied samples are each as likely; over all subsets that is the mean of all tied samples.
            assert found[row, n - 1] == pytest.approx(np.mean(best))


def test_the_proxy_itself_never_falls():
    proxy = np.random.default_rng(5).normal(size=(4, 16))
    found = expected_best(proxy, proxy)
    assert found[:, 0] == pytest.approx(proxy.mean(axis=1))
    assert found[:, -1] == pytest.approx(proxy.max(axis=1))
    assert (np.diff(found, axis=1) > 0).all()


def test_kl_bound_by_hand():
    assert kl_bound([1, 2, 4]) == pytest.approx([0, math.log(2) - 1 / 2, math.log(4) - 3 / 4])
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        kl_bound([0])


def test_kl_bound_is_that_of_distinct_scores():
    """The best of 3 of K equally likely, ordered responses: KL = sum_i p_i log(K p_i), near the bound for large K."""
    size = 4000
    edges = np.arange(size + 1) / size
    best = edges[1:] ** 3 - edges[:-1] ** 3
    kl = float((best * np.log(size * best)).sum())
    assert kl <= float(kl_bound(3)) and kl == pytest.approx(float(kl_bound(3)), abs=1e-3)


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ([2.0], [1.0, 0.0, -1.0], 1),
        ([2.0], [2.0, 0.0, -1.0], 1 / 2),
        ([2.0], [2.0, 2.0, 2.0], 1 / 4),
        ([1.0], [2.0, 0.0, 0.0], 0),
        ([2.0, 2.0], [2.0], 2 / 3),
    ],
)
def test_credit_of_the_top_by_hand(right, wrong, expected):
    assert top_credit(right, wrong) == pytest.approx(expected)


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match=r"\(prompts, samples\), got \(2,\) and \(2,\)"):
        expected_best([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="values is nan in 1 of 2"):
        expected_best([[1.0, 2.0]], [[float("nan"), 2.0]])
