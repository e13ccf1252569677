"""Score shaping, per-token rewards and running moments."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from drpo.data.records import Record
from drpo.rewards import (
    Completion,
    RunningMoments,
    shape_scores,
    token_rewards,
)

T, F = True, False
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
