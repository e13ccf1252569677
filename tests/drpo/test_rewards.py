"""KL estimates, score shaping, per-token rewards, running moments and KL coefficients."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from drpo.data.records import Record
from drpo.rewards import (
    AdaptiveKL,
    Completion,
    FixedKL,
    RunningMoments,
    kl_estimate,
    shape_scores,
    token_rewards,
)

T, F = True, False


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


SCORES = torch.tensor([3.0, -4.0, 0.5])
ENDED = torch.tensor([T, F, F])
LENGTHS = torch.tensor([2, 5, 10])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3.0, -4.0, 0.5]),
        ({"missing_stop": "replace", "missing_stop_penalty": 1.0}, [3.0, -1.0, -1.0]),
        ({"missing_stop": "subtract", "missing_stop_penalty": 1.0}, [3.0, -5.0, -0.5]),
        ({"length_penalty": 0.1}, [2.8, -4.5, -0.5]),
        ({"length_penalty": -0.1}, [3.2, -3.5, 1.5]),
        ({"clip": 1.0}, [1.0, -1.0, 0.5]),
        # All together: clip to [-2, 2], replace by -3 (not clipped again), then 0.1 a token off.
        (
            {"clip": 2.0, "missing_stop": "replace", "missing_stop_penalty": 3.0, "length_penalty": 0.1},
            [1.8, -3.5, -4.0],
        ),
        (
            {"clip": 2.0, "missing_stop": "subtract", "missing_stop_penalty": 3.0, "length_penalty": 0.1},
            [1.8, -5.5, -3.5],
        ),
    ],
)
def test_shape_scores_by_hand(options, expected):
    defaults = {"missing_stop": "none", "missing_stop_penalty": 0.0, "length_penalty": 0.0, "clip": None}
    before = SCORES.clone()
    shaped = shape_scores(SCORES, ENDED, LENGTHS, **(defaults | options))
    torch.testing.assert_close(shaped, torch.tensor(expected))
    assert torch.equal(SCORES, before)


def test_a_replaced_score_may_be_anything():
    shaped = shape_scores(
        torch.tensor([1.0, math.nan]),
        torch.tensor([T, F]),
        torch.tensor([1, 1]),
        missing_stop="replace",
        missing_stop_penalty=1.0,
        length_penalty=0.0,
        clip=5.0,
    )
    assert shaped.tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing_stop": "drop"}, "unknown missing_stop 'drop'"),
        ({"missing_stop_penalty": -1.0}, "give it as >= 0"),
        ({"clip": 0.0}, "must be > 0"),
    ],
)
def test_shape_scores_refuses(options, message):
    defaults = {"missing_stop": "none", "missing_stop_penalty": 0.0, "length_penalty": 0.0, "clip": None}
    with pytest.raises(ValueError, match=message):
        shape_scores(SCORES, ENDED, LENGTHS, **(defaults | options))


def test_token_rewards_by_hand():
    # Row 0: 2 forced tokens, 2 sampled, padding. Row 1: fills the row. KL coefficient 0.5.
    response_mask = torch.tensor([[T, T, T, T, F], [T, T, T, T, T]])
    kl_mask = torch.tensor([[F, F, T, T, F], [T, T, T, T, T]])
    kl = torch.tensor([[9.0, math.nan, 0.2, 0.4, math.inf], [0.2, -0.2, 0.0, 1.0, 2.0]])
    expected = torch.tensor([[0.0, 0.0, -0.1, 3.0 - 0.2, 0.0], [-0.1, 0.1, 0.0, -0.5, -2.0 - 1.0]])
    rewards = token_rewards(torch.tensor([3.0, -2.0]), kl, 0.5, kl_mask, response_mask)
    torch.testing.assert_close(rewards, expected)


def test_a_full_row_is_scored_at_its_last_token_whether_or_not_it_is_a_stop_token():
    # A stop token exactly at the last column leaves no padding behind it; the score must still stand there.
    full = torch.ones(1, 53, dtype=torch.bool)
    rewards = token_rewards(torch.tensor([2.5]), torch.zeros(1, 53), 0.05, full, full)
    assert rewards[0, -1].item() == 2.5 and rewards.count_nonzero() == 1
    shorter = full.clone()
    shorter[0, -1] = False
    rewards = token_rewards(torch.tensor([2.5]), torch.zeros(1, 53), 0.05, shorter, shorter)
    assert rewards[0, -2].item() == 2.5 and rewards.count_nonzero() == 1


def test_the_score_stands_at_the_last_real_token_even_when_that_one_carries_no_kl():
    response_mask = torch.tensor([[T, T, T, F]])
    for kl_mask in (torch.tensor([[T, T, F, F]]), torch.zeros(1, 4, dtype=torch.bool)):
        rewards = token_rewards(torch.tensor([2.0]), torch.ones(1, 4), 0.0, kl_mask, response_mask)
        assert rewards.tolist() == [[0.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("seed", range(3))
def test_rewards_sum_to_the_score_less_the_kl(seed):
    generator = torch.Generator().manual_seed(seed)
    num, length, coef = 16, 20, 0.07
    kl = torch.randn(num, length, generator=generator, dtype=torch.float64)
    scores = torch.randn(num, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (num, 1), generator=generator)
    resets = (torch.rand(num, 1, generator=generator) * lengths).long()
    columns = torch.arange(length)
    response_mask = columns < lengths
    action_mask = response_mask & (columns >= resets)
    rewards = token_rewards(scores, kl, coef, action_mask, response_mask)
    for i in range(num):
        spent = sum(kl[i, t].item() for t in range(length) if action_mask[i, t])
        assert rewards[i].sum().item() == pytest.approx(scores[i].item() - coef * spent)
        last = lengths[i].item() - 1
        assert rewards[i, last].item() == pytest.approx(scores[i].item() - coef * kl[i, last].item())
        assert rewards[i][response_mask[i].logical_not()].abs().sum() == 0


def test_a_response_without_tokens_is_refused_by_row():
    mask = torch.tensor([[T, F], [F, F]])
    with pytest.raises(ValueError, match=r"rows \[1\] of response_mask are empty"):
        token_rewards(torch.zeros(2), torch.zeros(2, 2), 0.1, mask, mask)


def test_token_rewards_leave_their_inputs_alone():
    mask, kl, scores = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3), torch.ones(1)
    token_rewards(scores, kl, 0.1, mask, mask)
    assert kl.tolist() == [[1.0] * 3] and scores.tolist() == [1.0]


def test_completion_is_what_a_reward_function_sees():
    completion = Completion("TL;DR:", " short", True, [1, 2], [3, 0], Record(prompt="TL;DR:"))
    with pytest.raises(AttributeError):
        completion.response = "longer"


def test_running_moments_equal_numpy_on_all_batches_together():
    rng = np.random.default_rng(0)
    batches = [
        rng.normal(loc=1e4, scale=scale, size=size) for scale, size in [(1, 7), (5, 1), (0.1, 64), (3, 2)]
    ]
    moments = RunningMoments()
    for k, batch in enumerate(batches):
        moments.update(torch.from_numpy(batch))
        seen = np.concatenate(batches[: k + 1])
        assert moments.count == len(seen)
        assert moments.mean == pytest.approx(seen.mean(), rel=1e-12)
        assert moments.var == pytest.approx(seen.var(), rel=1e-8)
    scores = torch.tensor([1e4, 1e4 + 2], dtype=torch.float64)
    expected = (scores.numpy() - seen.mean()) / seen.std()
    np.testing.assert_allclose(moments.normalise(scores).numpy(), expected, rtol=1e-6)


def test_running_moments_by_hand():
    # 1, 3 then 8: mean 12 / 3 = 4, var (9 + 1 + 16) / 3 = 26 / 3; 4 normalises to 0.
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    moments.update(torch.tensor([]))
    moments.update(torch.tensor([8.0]))
    assert (moments.count, moments.mean) == (3, 4.0) and moments.var == pytest.approx(26 / 3)
    normalised = moments.normalise(torch.tensor([4.0, 4.0 + math.sqrt(26 / 3)]))
    assert normalised.dtype == torch.float32 and normalised.tolist() == pytest.approx([0.0, 1.0])


def test_running_moments_go_on_exactly_after_a_round_trip_through_json():
    batches = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    straight, resumed = RunningMoments(), RunningMoments()
    for batch in batches:
        straight.update(batch)
        reloaded = RunningMoments()
        reloaded.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        resumed = reloaded
        resumed.update(batch)
    assert resumed.state_dict() == straight.state_dict()


def test_running_moments_refuse_what_would_spoil_them():
    moments = RunningMoments()
    assert math.isnan(moments.var)
    with pytest.raises(ValueError, match="no score seen yet"):
        moments.normalise(torch.ones(2))
    moments.update(torch.ones(2))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not all finite"):
            moments.update(torch.tensor([1.0, bad]))
    assert (moments.count, moments.mean) == (2, 1.0)
    assert moments.normalise(torch.tensor([1.0])).item() == 0.0  # no spread so far, yet no division by zero


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
