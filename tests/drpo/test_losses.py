"""PPO's losses against hand-worked values, plain loops and gradients known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from drpo.losses import (
    MAX_LOG_RATIO,
    importance_weights,
    policy_divisors,
    ppo_policy_loss,
    ppo_value_loss,
)
from drpo.tensors import masked_sum


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_policy_loss_by_hand():
    # clip_range 0.2, so clip(ratio) lies in [0.8, 1.2]; loss = max(-A ratio, -A clip(ratio)).
    #   ratio 1    A  2   max(-2,   -2  ) = -2
    #   ratio 1.5  A  2   max(-3,   -2.4) = -2.4  clipped
    #   ratio 1.5  A -2   max( 3,    2.4) =  3
    #   ratio 0.5  A  2   max(-1,   -1.6) = -1
    #   ratio 0.5  A -2   max( 1,    1.6) =  1.6  clipped
    #   ratio 1.1  A  3   max(-3.3, -3.3) = -3.3
    ratios = torch.tensor([[1.0, 1.5, 1.5], [0.5, 0.5, 1.1]])
    advantages = torch.tensor([[2.0, 2.0, -2.0], [2.0, -2.0, 3.0]])
    logprobs = torch.full((2, 3), -0.7)
    terms = ppo_policy_loss(logprobs + ratios.log(), logprobs, advantages, 0.2)
    torch.testing.assert_close(terms.loss, torch.tensor([[-2.0, -2.4, 3.0], [-1.0, 1.6, -3.3]]))
    torch.testing.assert_close(terms.ratio, ratios)
    assert terms.clipped.tolist() == [[False, True, False], [False, True, False]]


def test_policy_loss_equals_a_plain_loop():
    new, old, advantages = randn(0, 5, 7), randn(1, 5, 7), randn(2, 5, 7)
    terms = ppo_policy_loss(new, old, advantages, 0.3)
    for i in range(5):
        for t in range(7):
            a, ratio = advantages[i, t].item(), math.exp(new[i, t].item() - old[i, t].item())
            objective = min(ratio * a, max(0.7, min(1.3, ratio)) * a)  # eq. 7 as printed
            assert terms.loss[i, t].item() == pytest.approx(-objective)
            assert terms.clipped[i, t].item() == (a > 0 and ratio > 1.3 or a < 0 and ratio < 0.7)


def test_policy_gradient_is_that_of_the_surrogate_and_zero_where_clipped():
    new, old, advantages = randn(3, 6, 8).requires_grad_(), randn(4, 6, 8), randn(5, 6, 8)
    terms = ppo_policy_loss(new, old, advantages, 0.2)
    terms.loss.sum().backward()
    expected = -advantages * (new.detach() - old).exp()  # d(-A ratio)/d new = -A ratio
    torch.testing.assert_close(new.grad, torch.where(terms.clipped, 0.0, expected))
    assert terms.clipped.any() and not terms.ratio.requires_grad


def test_at_equal_logprobs_the_gradient_is_minus_the_advantage():
    new, advantages = randn(6, 3, 4).requires_grad_(), randn(7, 3, 4)
    terms = ppo_policy_loss(new, new.detach(), advantages, 0.2)
    assert torch.equal(terms.ratio, torch.ones(3, 4, dtype=torch.float64)) and not terms.clipped.any()
    terms.loss.sum().backward()
    torch.testing.assert_close(new.grad, -advantages)


@pytest.mark.parametrize("bad", [1e4, -1e4, math.inf, -math.inf, math.nan])
def test_forced_tokens_have_no_loss_and_no_gradient_whatever_stands_there(bad):
    action_mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    new, old, advantages = (randn(seed, 2, 4).float() for seed in (8, 9, 10))
    clean = new.clone().requires_grad_()
    dirty = torch.where(action_mask, new, bad).requires_grad_()
    expected = masked_sum(ppo_policy_loss(clean, old, advantages, 0.2).loss, action_mask)
    got = masked_sum(ppo_policy_loss(dirty, old, advantages, 0.2).loss, action_mask)
    assert got.item() == expected.item()
    expected.backward()
    got.backward()
    assert torch.equal(dirty.grad, clean.grad)
    assert dirty.grad[action_mask.logical_not()].tolist() == [0.0, 0.0, 0.0]
    assert (dirty.grad[action_mask] != 0).any()


def test_an_enormous_ratio_is_held_finite():
    new = torch.tensor([500.0, -500.0], requires_grad=True)
    terms = ppo_policy_loss(new, torch.zeros(2), torch.tensor([-1.0, 1.0]), 0.2)
    expected = torch.tensor([math.exp(MAX_LOG_RATIO), math.exp(-MAX_LOG_RATIO)])
    torch.testing.assert_close(terms.ratio, expected)
    terms.loss.sum().backward()
    assert new.grad.tolist() == [0.0, 0.0]


# --- clip-higher and dual clip ----------------------------------------------------------------------------


def test_clip_higher_by_hand():
    # clip(ratio) lies in [0.8, 1.5]; loss = max(-A ratio, -A clip(ratio)).
    #   ratio 1.4  A  2   max(-2.8, -2.8) = -2.8         (-2.4 and clipped with 1.2)
    #   ratio 2    A  2   max(-4,   -3  ) = -3    clipped
    #   ratio 2    A -2   max( 4,    3  ) =  4
    #   ratio 0.5  A -2   max( 1,    1.6) =  1.6  clipped: the lower bound is as before
    ratios = torch.tensor([1.4, 2.0, 2.0, 0.5])
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0])
    terms = ppo_policy_loss(ratios.log(), torch.zeros(4), advantages, 0.2, clip_range_high=0.5)
    torch.testing.assert_close(terms.loss, torch.tensor([-2.8, -3.0, 4.0, 1.6]))
    assert terms.clipped.tolist() == [False, True, False, True]


def test_dual_clip_by_hand():
    # clip(ratio) lies in [0.8, 1.2], dual_clip 3: where A < 0 the loss is at most -3 A.
    #   ratio 4    A -2   min(max(8, 2.4),  6) = 6    held
    #   ratio 2.5  A -2   min(max(5, 2.4),  6) = 5
    #   ratio 0.5  A -2   min(max(1, 1.6),  6) = 1.6  clipped
    #   ratio 4    A  2   max(-8, -2.4) = -2.4        clipped, not held
    #   ratio 4    A  0   0
    ratios = torch.tensor([4.0, 2.5, 0.5, 4.0, 4.0])
    advantages = torch.tensor([-2.0, -2.0, -2.0, 2.0, 0.0])
    logprobs = ratios.log().requires_grad_()
    terms = ppo_policy_loss(logprobs, torch.zeros(5), advantages, 0.2, dual_clip=3.0)
    torch.testing.assert_close(terms.loss, torch.tensor([6.0, 5.0, 1.6, -2.4, 0.0]))
    assert terms.clipped.tolist() == [True, False, True, True, False]
    terms.loss.sum().backward()
    torch.testing.assert_close(
        logprobs.grad, torch.tensor([0.0, 5.0, 0.0, 0.0, 0.0])
    )  # -A ratio where it counts


def test_dual_clip_has_no_effect_where_advantages_are_positive():
    new, old, advantages = 3 * randn(27, 9, 8), randn(28, 9, 8), randn(29, 9, 8).abs()
    for found, expected in zip(
        ppo_policy_loss(new, old, advantages, 0.2, dual_clip=1.5),
        ppo_policy_loss(new, old, advantages, 0.2),
        strict=True,
    ):
        assert torch.equal(found, expected)
    held = ppo_policy_loss(new, old, -advantages, 0.2, dual_clip=1.5)
    assert (held.loss <= 1.5 * advantages).all() and (held.loss == 1.5 * advantages).any()


def test_clip_range_high_of_clip_range_changes_nothing():
    inputs = 2 * randn(30, 9, 8), randn(31, 9, 8), randn(32, 9, 8)
    for found, expected in zip(
        ppo_policy_loss(*inputs, 0.3, clip_range_high=0.3), ppo_policy_loss(*inputs, 0.3), strict=True
    ):
        assert torch.equal(found, expected)


# --- normalisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        # Token losses 1, 2 | 6 | 3, 3, 3 of rollouts with 2, 1 and 3 policy tokens; at most 5.
        ("token", 18 / 6),
        ("sequence", (3 / 2 + 6 / 1 + 9 / 3) / 3),
        ("constant", 18 / (3 * 5)),
    ],
)
def test_normalisations_by_hand_whole_and_in_parts(normalisation, expected):
    losses = torch.tensor([[9.0, 1.0, 2.0], [6.0, 9.0, 9.0], [3.0, 3.0, 3.0]])
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        sums = [
            masked_sum(losses[rows], mask[rows], dim=1)
            / policy_divisors(mask[rows], normalisation, mask.sum(), 3, 5)
            for rows in parts
        ]
        assert torch.cat(sums).sum().item() == pytest.approx(expected)


def test_value_loss_by_hand():
    # clip_range 0.2 around V = 1, so clip(v) lies in [0.8, 1.2]; loss = 0.5 max((v - G)^2, (clip(v) - G)^2).
    #   v 1.1  G 2    both (1.1 - 2)^2 = 0.81                          -> 0.405
    #   v 1.5  G 2    max((-0.5)^2, (1.2 - 2)^2) = max(0.25, 0.64)     -> 0.32   clipped
    #   v 1.5  G 0    max(1.5^2, 1.2^2) = max(2.25, 1.44)              -> 1.125
    #   v 0.5  G 0    max(0.25, 0.64)                                  -> 0.32   clipped
    new_values = torch.tensor([[1.1, 1.5], [1.5, 0.5]])
    returns = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    terms = ppo_value_loss(new_values, torch.ones(2, 2), returns, 0.2)
    torch.testing.assert_close(terms.loss, torch.tensor([[0.405, 0.32], [1.125, 0.32]]))
    assert terms.clipped.tolist() == [[False, True], [False, True]]


def test_value_loss_equals_a_plain_loop():
    new, old, returns = randn(11, 5, 7), randn(12, 5, 7), randn(13, 5, 7)
    terms = ppo_value_loss(new, old, returns, 0.5)
    for i in range(5):
        for t in range(7):
            v, centre, g = new[i, t].item(), old[i, t].item(), returns[i, t].item()
            held = min(max(v, centre - 0.5), centre + 0.5)
            assert terms.loss[i, t].item() == pytest.approx(0.5 * max((v - g) ** 2, (held - g) ** 2))
            assert terms.clipped[i, t].item() == ((held - g) ** 2 > (v - g) ** 2)


def test_value_gradient_is_the_error_and_zero_where_clipped():
    new, old, returns = randn(14, 6, 8).requires_grad_(), randn(15, 6, 8), randn(16, 6, 8)
    terms = ppo_value_loss(new, old, returns, 0.2)
    terms.loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.where(terms.clipped, 0.0, new.detach() - returns))
    assert terms.clipped.any()


def test_forced_tokens_have_no_value_gradient():
    action_mask = torch.tensor([[False, True, True], [True, False, False]])
    new, old, returns = (randn(seed, 2, 3).float() for seed in (17, 22, 23))
    clean = new.clone().requires_grad_()
    dirty = torch.where(action_mask, new, 1e6).requires_grad_()
    for values in (clean, dirty):
        masked_sum(ppo_value_loss(values, old, returns, 0.2).loss, action_mask).backward()
    assert dirty.grad[action_mask.logical_not()].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(dirty.grad, clean.grad) and (dirty.grad[action_mask] != 0).any()


@pytest.mark.parametrize("loss", [ppo_policy_loss, ppo_value_loss])
def test_counted_tokens_alone_give_the_same_loss_and_gradient(loss):
    mask = torch.tensor([[False, True, True], [True, False, False]])
    new, old, target = (randn(seed, 2, 3) for seed in (24, 25, 26))
    masked = new.clone().requires_grad_()
    selected = torch.where(mask, new, math.nan).requires_grad_()
    expected = masked_sum(loss(masked, old, target, 0.2).loss, mask)
    got = loss(selected[mask], old[mask], target[mask], 0.2).loss.sum()
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    assert torch.equal(selected.grad, masked.grad)


# --- tokens of another engine -----------------------------------------------------------------------------


def test_importance_weights_by_hand():
    # Ratios pi / mu of the sampled tokens; the third row has one forced token, the fourth two tokens of padding.
    #   token:    min(ratio, 2)
    #   sequence: min(product of the row, 2): 2 x 0.5 x 1 = 1;  3 x 1.5 x 0.2 = 0.9;  4 x 2 = 8 -> 2;  0.25
    ratios = torch.tensor([[2.0, 0.5, 1.0], [3.0, 1.5, 0.2], [7.0, 4.0, 2.0], [0.25, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]]).bool()
    logprobs = torch.full((4, 3), -1.5)
    inputs = (logprobs, logprobs - ratios.log(), mask)
    by_token = torch.tensor([[2.0, 0.5, 1.0], [2.0, 1.5, 0.2], [1.0, 2.0, 2.0], [0.25, 1.0, 1.0]])
    torch.testing.assert_close(importance_weights(*inputs, "token", 2.0), by_token)
    by_row = torch.tensor([[1.0, 1.0, 1.0], [0.9, 0.9, 0.9], [1.0, 2.0, 2.0], [0.25, 1.0, 1.0]])
    torch.testing.assert_close(importance_weights(*inputs, "sequence", 2.0), by_row)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_make_a_mean_under_mu_one_under_pi(level):
    """All 9 pairs of tokens, each with its probability under mu; no weight is cut."""
    pi, mu = (randn(seed, 3).softmax(0) for seed in (0, 1))
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    values = randn(2, 9)
    mask = torch.ones(9, 2, dtype=torch.bool)
    weights = importance_weights(pi.log()[pairs], mu.log()[pairs], mask, level, 1e6)
    weight = weights.prod(dim=1) if level == "token" else weights[:, 0]
    mean_under_mu = (mu[pairs].prod(dim=1) * weight * values).sum()
    torch.testing.assert_close(mean_under_mu, (pi[pairs].prod(dim=1) * values).sum())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_look_at_sampled_tokens_alone(level, bad):
    logprobs, engine_logprobs = randn(3, 4, 5), randn(4, 4, 5)
    mask = randn(5, 4, 5) > 0
    expected = importance_weights(logprobs, engine_logprobs, mask, level, 2.0)
    outside = mask.logical_not()
    spoilt = (tensor.masked_fill(outside, bad) for tensor in (logprobs, engine_logprobs))
    assert torch.equal(importance_weights(*spoilt, mask, level, 2.0), expected)
    assert not importance_weights(logprobs.requires_grad_(), engine_logprobs, mask, level, 2.0).requires_grad
