"""KL estimates against a policy whose KL is known, the Pareto front against a loop, best-of-n against counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from drpo.rewards import kl_estimate
from eval.statistics.frontier import (
    best_of_n_kl,
    best_of_n_means,
    best_of_n_win_rate,
    frontier,
    pareto_front,
    sequence_kls,
)
from eval.statistics.intervals import Interval, mean_interval

nan = float("nan")
LENGTH = 4
STOP = 0


def chains():
    """Next-token distributions (3, 3) given the last token, of a policy and its reference. Token 0 stops."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 3))
    tables = [
        np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (logits, logits + rng.normal(size=(3, 3)))
    ]
    return tables[0], tables[1]


def exact_kl(policy, reference):
    """Sum over all responses of at most LENGTH tokens; the state before the first token is 1."""
    total = 0.0
    for tokens in itertools.product(range(3), repeat=LENGTH):
        stops = [i for i, token in enumerate(tokens) if token == STOP]
        end = stops[0] + 1 if stops else LENGTH
        if any(tokens[end:]):  # count each response once: zeros after its stop
            continue
        states = (1, *tokens[: end - 1])
        p = math.prod(policy[s, a] for s, a in zip(states, tokens[:end], strict=True))
        q = math.prod(reference[s, a] for s, a in zip(states, tokens[:end], strict=True))
        total += p * math.log(p / q)
    return total


def sample(rng, policy, reference, size):
    logprobs, ref_logprobs = np.zeros((2, size, LENGTH))
    mask = np.zeros((size, LENGTH), dtype=bool)
    state, alive = np.ones(size, dtype=int), np.ones(size, dtype=bool)
    for t in range(LENGTH):
        token = (rng.random(size)[:, None] > policy[state].cumsum(axis=1)).sum(axis=1).clip(max=2)
        mask[:, t] = alive
        logprobs[:, t], ref_logprobs[:, t] = np.log(policy[state, token]), np.log(reference[state, token])
        alive = alive & (token != STOP)
        state = token
    return logprobs, ref_logprobs, mask


# --- KL ---------------------------------------------------------------------------------------------------


def test_kl_by_hand():
    # d = 0.5, -0.2 | 1.0: k1 0.3, 1.0; k3 e^-0.5 - 0.5 + e^0.2 - 1.2 = 0.12793, e^-1 = 0.36788
    logprobs = [[-1.0, -2.0, -9.0], [-0.5, -9.0, -9.0]]
    ref_logprobs = [[-1.5, -1.8, -1.0], [-1.5, -1.0, -1.0]]
    mask = np.array([[True, True, False], [True, False, False]])
    assert sequence_kls(logprobs, ref_logprobs, mask, "k1") == pytest.approx([0.3, 1.0])
    assert sequence_kls(logprobs, ref_logprobs, mask, "k3") == pytest.approx([0.127934, 0.367879], abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_is_the_one_of_training_summed(estimator):
    logprobs, ref_logprobs, mask = sample(np.random.default_rng(1), *chains(), 20)
    tokens = kl_estimate(torch.tensor(logprobs), torch.tensor(ref_logprobs), estimator)
    expected = torch.where(torch.tensor(mask), tokens, 0.0).sum(dim=1)
    np.testing.assert_allclose(sequence_kls(logprobs, ref_logprobs, mask, estimator), expected.numpy())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_is_unbiased(estimator):
    policy, reference = chains()
    kls = sequence_kls(*sample(np.random.default_rng(2), policy, reference, 200_000), estimator)
    error = kls.std() / math.sqrt(len(kls))
    assert kls.mean() == pytest.approx(exact_kl(policy, reference), abs=3 * error)
    assert error < 0.004


def test_k3_is_never_negative_and_varies_less_near_the_reference():
    policy, reference = chains()
    near = 0.9 * policy + 0.1 * reference
    samples = sample(np.random.default_rng(3), policy, near, 20_000)
    k1, k3 = (sequence_kls(*samples, name) for name in ("k1", "k3"))
    assert k3.min() >= 0 > k1.min()
    assert k3.std() < 0.3 * k1.std()


def test_a_policy_has_no_kl_to_itself():
    policy, _ = chains()
    kls = sequence_kls(*sample(np.random.default_rng(4), policy, policy, 50))
    interval = mean_interval(kls)
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_coverage_of_the_kl(estimator):
    policy, reference = chains()
    truth, rng = exact_kl(policy, reference), np.random.default_rng(5)
    repetitions, covered = 600, 0
    for _ in range(repetitions):
        kls = sequence_kls(*sample(rng, policy, reference, 150), estimator)
        interval = mean_interval(kls, num_resamples=699)
        covered += interval.low <= truth <= interval.high
    assert covered / repetitions == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("junk", [5.0, math.inf, -math.inf, nan])
def test_what_was_not_sampled_has_no_effect(junk):
    logprobs, ref_logprobs, mask = sample(np.random.default_rng(6), *chains(), 30)
    dirty = [np.where(mask, x, junk) for x in (logprobs, ref_logprobs)]
    for estimator in ("k1", "k3"):
        np.testing.assert_array_equal(
            sequence_kls(*dirty, mask, estimator), sequence_kls(logprobs, ref_logprobs, mask, estimator)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[-1.0]], [[-1.0]], [[1]]), "mask must be bool"),
        (([[-1.0, -1.0]], [[-1.0]], [[True]]), r"logprobs is \(1, 2\) but mask is \(1, 1\)"),
        (([[-1.0]], [[nan]], [[True]]), r"ref_logprobs has values that are no log-prob.*rows \[0\]"),
        (([[0.5]], [[-1.0]], [[True]]), "logprobs has values that are no log-probabilities"),
        (([[-1.0]], [[-1.0]], [[True]], "k2"), "k2 is biased"),
    ],
)
def test_bad_logprobs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sequence_kls(*arguments[:2], np.array(arguments[2]), *arguments[3:])


# --- front ------------------------------------------------------------------------------------------------


def test_the_front_by_hand():
    #         best   beaten  cheap  equal to the first  beaten by the first at its KL
    kl = [2.0, 3.0, 0.5, 2.0, 2.0]
    reward = [1.0, 0.9, 0.1, 1.0, 0.8]
    assert pareto_front(kl, reward).tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_equals_a_loop(seed):
    kl, reward = np.random.default_rng(seed).integers(0, 6, (2, 25)).astype(float)
    expected = [
        not any(
            (k <= kl[i] and r >= reward[i]) and (k < kl[i] or r > reward[i])
            for k, r in zip(kl, reward, strict=True)
        )
        for i in range(25)
    ]
    assert pareto_front(kl, reward).tolist() == expected


def test_the_frontier_lists_policies_by_kl():
    def at(value):
        return Interval(value, value - 0.1, value + 0.1, 50, "bca")

    points = frontier(["ppo", "sft", "dpo"], [at(3.0), at(0.0), at(4.0)], [at(2.0), at(0.5), at(1.0)])
    assert [(p.system, p.on_front) for p in points] == [("sft", True), ("ppo", True), ("dpo", False)]
    assert points[1].kl == at(3.0)
    assert points[1].reward == at(2.0)


def test_bad_points_are_refused():
    with pytest.raises(ValueError, match="kl is nan in 1 of 2"):
        pareto_front([nan, 1], [1, 1])
    with pytest.raises(ValueError, match="2 KLs but 1 rewards"):
        pareto_front([1, 2], [1])
    one = Interval(1, 1, 1, 5, "bca")
    with pytest.raises(ValueError, match="ppo given twice"):
        frontier(["ppo", "ppo"], [one] * 2, [one] * 2)
    with pytest.raises(ValueError, match="1 systems, 0 KLs and 1 rewards"):
        frontier(["ppo"], [], [one])
    with pytest.raises(ValueError, match="kl has no rows"):
        frontier([], [], [])


# --- best of n --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_best_of_n_against_counting(n):
    # Uniform over v outcomes of different reward: the k-th best of them is picked with (k^n - (k-1)^n) / v^n. Its
    # KL stays below the bound and approaches it as samples stop coinciding.
    gaps = []
    for v in (10, 10_000):
        k = np.arange(1, v + 1)
        picked = (k / v) ** n - ((k - 1) / v) ** n
        exact = np.sum(np.where(picked > 0, picked * np.log(np.maximum(picked, 1e-300) * v), 0.0))
        gaps.append(best_of_n_kl(n) - exact)
    assert gaps[0] >= gaps[1] >= -1e-12
    assert gaps[1] < 0.01
    wins = np.sum(picked * (k - 0.5) / 10_000)
    assert best_of_n_win_rate(n) == pytest.approx(wins, abs=1e-3)


def test_best_of_n_by_hand():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    assert best_of_n_win_rate(3) == 0.75


@pytest.mark.parametrize("n", [1, 3, 6])
def test_best_of_n_means_equal_all_subsets(n):
    scores = np.random.default_rng(7).normal(size=(4, 6))
    expected = [np.mean([max(subset) for subset in itertools.combinations(row, n)]) for row in scores]
    np.testing.assert_allclose(best_of_n_means(scores, n), expected)


def test_best_of_many_is_finite():
    scores = np.random.default_rng(8).random((1, 2000))
    assert best_of_n_means(scores, 1000) == pytest.approx(1000 / 1001, abs=2e-3)


def test_bad_n_is_refused():
    for function in (best_of_n_kl, best_of_n_win_rate):
        with pytest.raises(ValueError, match="n >= 1, got 0"):
            function(0)
    with pytest.raises(ValueError, match=r"at least n = 3 samples\), got shape \(2, 2\)"):
        best_of_n_means(np.ones((2, 2)), 3)
    with pytest.raises(ValueError, match="scores is nan in 1 of 4"):
        best_of_n_means([[1, nan], [1, 2]], 1)
