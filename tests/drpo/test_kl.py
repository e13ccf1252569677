"""KL estimates by hand and against a policy whose KL is known; the coefficients that steer it."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from drpo.kl import AdaptiveKL, FixedKL, kl_estimate, sequence_kl
from eval.statistics.intervals import mean_interval

nan = float("nan")
LENGTH = 4
STOP = 0


def test_kl_estimates_by_hand():
    # d = log p - log q with p/q = 2, 1/2, 1:
    #   k1 = d          = log 2, -log 2, 0
    #   k2 = d^2 / 2    = (log 2)^2 / 2 twice, 0
    #   k3 = q/p - 1 + d = 1/2 - 1 + log 2,  2 - 1 - log 2,  0
    log2 = math.log(2)
    logprobs = torch.tensor([[0.5, 0.25, 0.3]], dtype=torch.float64).log()
    ref_logprobs = torch.tensor([[0.25, 0.5, 0.3]], dtype=torch.float64).log()
    expected = {
        "k1": [log2, -log2, 0.0],
        "k2": [log2**2 / 2, log2**2 / 2, 0.0],
        "k3": [log2 - 0.5, 1 - log2, 0.0],
    }
    for estimator, values in expected.items():
        assert kl_estimate(logprobs, ref_logprobs, estimator)[0].tolist() == pytest.approx(values, abs=1e-12)


def test_k1_and_k3_are_unbiased_on_an_enumerated_distribution():
    # E_p[k] summed over all four outcomes must be KL(p || q) = sum p log(p / q); k2 is close but biased.
    p, q = [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.4, 0.1]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    logprobs = torch.tensor([p], dtype=torch.float64).log()
    ref_logprobs = torch.tensor([q], dtype=torch.float64).log()
    mean = {
        k: (torch.tensor([p]) * kl_estimate(logprobs, ref_logprobs, k)).sum().item()
        for k in ("k1", "k2", "k3")
    }
    assert mean["k1"] == pytest.approx(kl) and mean["k3"] == pytest.approx(kl)
    assert abs(mean["k2"] - kl) > 0.01


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e-2, 1.0, 10.0])
def test_k2_and_k3_are_never_negative(scale):
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(50, 100, generator=generator)
    ref_logprobs = logprobs + scale * torch.randn(50, 100, generator=generator)
    assert kl_estimate(logprobs, ref_logprobs, "k2").min() >= 0
    assert kl_estimate(logprobs, ref_logprobs, "k3").min() >= 0


def test_k3_keeps_its_digits_near_zero():
    # k3 = d^2/2 - d^3/6 + ...; exp(-d) - 1 in float32 would leave nothing of it at d = 1e-4.
    got = kl_estimate(torch.tensor([[1e-3]]), torch.tensor([[0.0]]), "k3").item()
    assert got == pytest.approx(1e-6 / 2 - 1e-9 / 6, rel=1e-3)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def test_adaptive_kl_by_hand():
    # coef 0.1, target 6, horizon 1000, 50 episodes an update: it moves by at most 0.2 * 50 / 1000 = 1%.
    # (Whatever the unit: the loop gives nats per sampled token.)
    #   kl 12:  error clip(1, +-0.2)    =  0.2  ->  0.1    * 1.01  = 0.101
    #   kl 0:   error clip(-1, +-0.2)   = -0.2  ->  0.101  * 0.99  = 0.09999
    #   kl 6.6: error 0.1, within       =  0.1  ->  0.09999 * 1.005 = 0.10048995 (0.1 * 50 / 1000 = 0.5%)
    #   kl 6:   error 0                         ->  unchanged
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    for kl, expected in [
        (12.0, 0.101),
        (0.0, 0.09999),
        (6.6, 0.10048995),
        (6.0, 0.10048995),
    ]:
        controller.update(kl, num_episodes=50)
        assert controller.coef == pytest.approx(expected, rel=1e-6)


def test_adaptive_kl_survives_a_round_trip():
    straight = AdaptiveKL(0.1, 6.0, 1000)
    straight.update(9.0, 64)
    resumed = AdaptiveKL(0.1, 6.0, 1000)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for controller in (straight, resumed):
        controller.update(5.0, 64)
    assert resumed.coef == straight.coef


def test_fixed_kl_never_moves():
    fixed = FixedKL(0.05)
    fixed.update(100.0, 512)
    assert fixed.coef == 0.05
    fixed.load_state_dict(fixed.state_dict())
    assert fixed.coef == 0.05


def test_kl_coefficients_refuse():
    with pytest.raises(ValueError, match="must be >= 0"):
        FixedKL(-0.1)
    with pytest.raises(ValueError, match="fixed at 0.05, but the saved run adapted"):
        FixedKL(0.05).load_state_dict(AdaptiveKL(0.1, 6.0, 1000).state_dict())
    for arguments in [(0.0, 6.0, 1000), (0.1, 0.0, 1000), (0.1, 6.0, 0)]:
        with pytest.raises(ValueError, match="> 0"):
            AdaptiveKL(*arguments)
    with pytest.raises(ValueError, match="measured KL is nan"):
        AdaptiveKL(0.1, 6.0, 1000).update(math.nan, 64)


# --- over whole responses -------------------------------------------------------------------------------


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


def sequence_kls(logprobs, ref_logprobs, mask, estimator="k1") -> np.ndarray:
    tensors = (torch.as_tensor(np.asarray(x)) for x in (logprobs, ref_logprobs, mask))
    return sequence_kl(*tensors, estimator).numpy()


def test_sequence_kl_by_hand():
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
