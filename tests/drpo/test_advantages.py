"""Advantage estimators against hand-worked values, plain loops, and the identities that they must satisfy."""

from __future__ import annotations

import math

import pytest
import torch

from drpo.advantages import gae, grpo, length_adaptive_lam, rewards_to_go, rloo

T, F = True, False


def random_episodes(seed: int, rows: int = 9, length: int = 12) -> tuple[torch.Tensor, ...]:
    """Rewards, values and a mask whose rows start and end at random; row 0 is full, row 1 is empty."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    starts = torch.randint(0, length, (rows, 1), generator=generator)
    ends = starts + 1 + (torch.rand(rows, 1, generator=generator) * (length - starts)).long()
    starts[0], ends[0], ends[1] = 0, length, starts[1]
    columns = torch.arange(length)
    return rewards, values, (columns >= starts) & (columns < ends)


def loop_gae(rewards, values, mask, gamma, lam):
    """Each row alone: cut the counted run out, then sum (gamma lam)^l delta_{t+l} for every t."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for i in range(len(rewards)):
        columns = [t for t in range(rewards.shape[1]) if mask[i, t]]
        r = [rewards[i, t].item() for t in columns]
        v = [values[i, t].item() for t in columns] + [0.0]
        deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(len(r))]
        for k, t in enumerate(columns):
            advantages[i, t] = sum((gamma * lam) ** n * deltas[k + n] for n in range(len(r) - k))
            returns[i, t] = advantages[i, t] + v[k]
    return advantages, returns


def test_by_hand():
    # gamma 0.9, lambda 0.5, so gamma lambda = 0.45. r = 1, 0, 2 and V = 0.5, 1, 2, then V = 0.
    #   delta_2 = 2 + 0       - 2   = 0          A_2 = 0
    #   delta_1 = 0 + 0.9 * 2 - 1   = 0.8        A_1 = 0.8 + 0.45 * 0    = 0.8
    #   delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4        A_0 = 1.4 + 0.45 * 0.8  = 1.76
    # returns A + V = 2.26, 1.8, 2
    rewards = torch.tensor([[1.0, 0.0, 2.0, 7.0]])
    values = torch.tensor([[0.5, 1.0, 2.0, 7.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[T, T, T, F]]), 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.76, 0.8, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.26, 1.8, 2.0, 0.0]]))
    # The same episode after a forced prefix of two tokens.
    rewards = torch.cat([torch.full((1, 2), 5.0), rewards], dim=1)
    values = torch.cat([torch.full((1, 2), -5.0), values], dim=1)
    advantages, returns = gae(rewards, values, torch.tensor([[F, F, T, T, T, F]]), 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.0, 1.76, 0.8, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.0, 0.0, 2.26, 1.8, 2.0, 0.0]]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (0.5, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_equals_a_plain_loop(seed, gamma, lam):
    episodes = random_episodes(seed)
    for got, expected in zip(gae(*episodes, gamma, lam), loop_gae(*episodes, gamma, lam), strict=True):
        torch.testing.assert_close(got, expected)


def test_gamma_and_lambda_one_give_the_return_to_go():
    rewards, values, mask = random_episodes(10)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    kept = rewards.masked_fill(mask.logical_not(), 0)
    to_go = kept.flip(1).cumsum(1).flip(1).masked_fill(mask.logical_not(), 0)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, (to_go - values).masked_fill(mask.logical_not(), 0))


def test_lambda_zero_gives_the_td_error():
    rewards, values, mask = random_episodes(11)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    for i, t in mask.nonzero().tolist():
        follows = t + 1 < mask.shape[1] and bool(mask[i, t + 1])
        next_value = values[i, t + 1] if follows else 0.0
        torch.testing.assert_close(advantages[i, t], rewards[i, t] + 0.9 * next_value - values[i, t])


def test_true_values_have_no_advantage():
    # One reward of 1 at the end of 4 tokens, gamma 0.5: V = 1/8, 1/4, 1/2, 1 is exact, so every A is 0.
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.125, 0.25, 0.5, 1.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), 0.5, 0.95)
    assert advantages.tolist() == [[0.0] * 4]
    assert torch.equal(returns, values)


@pytest.mark.parametrize("junk", [3.0, -1e30, math.inf, math.nan])
def test_forced_and_padded_positions_have_no_effect(junk):
    rewards, values, mask = random_episodes(12)
    expected = gae(rewards, values, mask, 1.0, 0.95)
    dirty_rewards, dirty_values = (x.masked_fill(mask.logical_not(), junk) for x in (rewards, values))
    got = gae(dirty_rewards, dirty_values, mask, 1.0, 0.95)
    for before, after in zip(expected, got, strict=True):
        assert torch.equal(before, after)
        assert after[mask.logical_not()].abs().max() == 0


def test_padding_width_changes_nothing():
    rewards, values, mask = (x.float() if x.is_floating_point() else x for x in random_episodes(13))
    expected = gae(rewards, values, mask, 1.0, 0.95)

    def widen(x, left, right):
        return torch.nn.functional.pad(x, (left, right), value=1)

    for left, right in [(0, 5), (3, 0), (2, 7)]:
        wide_mask = widen(mask.int(), left, right).bool()
        wide_mask[:, :left] = wide_mask[:, left + mask.shape[1] :] = False
        got = gae(widen(rewards, left, right), widen(values, left, right), wide_mask, 1.0, 0.95)
        for before, after in zip(expected, got, strict=True):
            assert torch.equal(after[:, left : left + mask.shape[1]], before)


def test_rows_do_not_see_each_other():
    rewards, values, mask = random_episodes(14)
    together = gae(rewards, values, mask, 0.99, 0.9)
    for i in range(len(mask)):
        alone = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], 0.99, 0.9)
        assert all(torch.equal(x[i : i + 1], y) for x, y in zip(together, alone, strict=True))


def test_a_hole_in_the_mask_is_refused_by_row():
    mask = torch.tensor([[T, T, F], [T, F, T], [F, T, T], [F, F, F]])
    with pytest.raises(ValueError, match=r"rows \[1\] has a hole"):
        gae(torch.zeros(4, 3), torch.zeros(4, 3), mask, 1.0, 1.0)


def test_inputs_are_not_changed():
    episodes = random_episodes(15)
    before = [x.clone() for x in episodes]
    gae(*episodes, 1.0, 0.95)
    assert all(torch.equal(x, y) for x, y in zip(episodes, before, strict=True))


# --- a lambda for each row --------------------------------------------------------------------------------


def test_gae_with_lambda_of_rows_equals_each_row_alone():
    rewards, values, mask = random_episodes(16)
    lams = torch.linspace(0, 1, len(mask), dtype=torch.float64)
    together = gae(rewards, values, mask, 0.99, lams)
    for i, lam in enumerate(lams.tolist()):
        alone = loop_gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], 0.99, lam)
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[i : i + 1], y)


def test_length_adaptive_lambda_by_hand():
    # alpha 0.5: l = 1 and 2 give 1 - 1/0.5 = -1 and 1 - 1/1 = 0, so 0; l = 4: 1 - 1/2 = 0.5; l = 8: 1 - 1/4 = 0.75.
    # A row without tokens has lambda 0.
    mask = torch.arange(9)[None, :] < torch.tensor([[1], [2], [4], [8], [0]])
    assert length_adaptive_lam(mask, 0.5).tolist() == [0, 0, 0.5, 0.75, 0]
    # Only True tokens count: the same after a forced prefix.
    assert length_adaptive_lam(mask[:, 1:], 0.5).tolist() == [
        0,
        0,
        pytest.approx(1 / 3),
        pytest.approx(5 / 7),
        0,
    ]


def test_length_adaptive_lambda_weighs_alpha_l_tokens():
    """The paper's aim: the weights lambda^n of all returns sum to alpha l."""
    lam = length_adaptive_lam(torch.ones(1, 400, dtype=torch.bool), 0.05).double()
    weights = lam ** torch.arange(2000, dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(0.05 * 400, rel=1e-5)


# --- rewards to go ----------------------------------------------------------------------------------------


def test_rewards_to_go_by_hand():
    # gamma 0.5: A_2 = 4, A_1 = -2 + 0.5 * 4 = 0, A_0 = 1 + 0.5 * 0 = 1; after a prefix of one token: -1 + 0.5 * 6 = 2.
    rewards = torch.tensor([[1.0, -2.0, 4.0, 9.0], [9.0, -1.0, 6.0, 9.0]])
    mask = torch.tensor([[T, T, T, F], [F, T, T, F]])
    expected = torch.tensor([[1.0, 0.0, 4.0, 0.0], [0.0, 2.0, 6.0, 0.0]])
    torch.testing.assert_close(rewards_to_go(rewards, mask, 0.5), expected)


@pytest.mark.parametrize("junk", [-1e30, math.nan])
def test_rewards_to_go_equal_a_plain_sum_and_ignore_masked_entries(junk):
    rewards, _, mask = random_episodes(17)
    found = rewards_to_go(rewards.masked_fill(mask.logical_not(), junk), mask, 0.9)
    for i, t in mask.nonzero().tolist():
        later = [u for u in range(t, mask.shape[1]) if mask[i, u]]
        assert found[i, t].item() == pytest.approx(sum(0.9 ** (u - t) * rewards[i, u].item() for u in later))
    assert not found[mask.logical_not()].any()


# --- leave-one-out ----------------------------------------------------------------------------------------


def test_rloo_by_hand():
    # Two prompts of three rollouts. Returns 3, 0, 1.5 and -1, -1, 4:
    #   3 - (0 + 1.5) / 2 = 2.25,  0 - (3 + 1.5) / 2 = -2.25,  1.5 - (3 + 0) / 2 = 0
    #   -1 - (-1 + 4) / 2 = -2.5 twice,  4 - (-1 - 1) / 2 = 5
    rewards = torch.tensor([[1.0, 2.0], [0.0, 9.0], [2.0, -0.5], [-1.0, 9.0], [9.0, -1.0], [0.0, 4.0]])
    mask = torch.tensor([[T, T], [T, F], [T, T], [T, F], [F, T], [T, T]])
    expected = [[2.25, 2.25], [-2.25, 0], [0, 0], [-2.5, 0], [0, -2.5], [5, 5]]
    torch.testing.assert_close(rloo(rewards, mask, 3), torch.tensor(expected))


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_rloo_of_a_group_sums_to_zero_and_ignores_a_constant(group_size):
    rewards, _, mask = random_episodes(5, rows=12)
    mask[:, 0] = True  # no empty row: a return has a token
    first = mask.long().argmax(dim=1, keepdim=True)
    advantages = rloo(rewards, mask, group_size)
    each = advantages.gather(1, first).view(-1, group_size)
    torch.testing.assert_close(each.sum(dim=1), torch.zeros(12 // group_size, dtype=torch.float64))
    shifted = rewards.scatter_add(1, first, torch.full((12, 1), 7.0, dtype=torch.float64))
    torch.testing.assert_close(rloo(shifted, mask, group_size), advantages)


@pytest.mark.parametrize(("rows", "group_size"), [(4, 1), (4, 3), (4, 0)])
def test_rloo_needs_whole_groups_of_two_or_more(rows, group_size):
    with pytest.raises(ValueError, match=f"4 rollouts do not make groups of {group_size}"):
        rloo(torch.ones(rows, 2), torch.ones(rows, 2, dtype=torch.bool), group_size)


# --- the group's mean and deviation -----------------------------------------------------------------------

GROUPS = torch.tensor([[1.0, 2.0], [0.0, 9.0], [2.0, -0.5], [-1.0, 9.0], [9.0, -1.0], [0.0, 4.0]])
GROUP_MASK = torch.tensor([[T, T], [T, F], [T, T], [T, F], [F, T], [T, T]])


@pytest.mark.parametrize("group_std", [True, False])
def test_grpo_by_hand(group_std):
    # Two prompts of three rollouts, returns 3, 0, 1.5 and -1, -1, 4.
    #   mean 1.5:   1.5, -1.5, 0;  variance (2.25 + 2.25) / 2 = 2.25, std 1.5:         1, -1, 0
    #   mean 2/3: -5/3, -5/3, 10/3;  variance (25 + 25 + 100) / 9 / 2 = 25/3, std 5 / sqrt 3:
    #             -sqrt 3 / 3 twice, 2 sqrt 3 / 3
    root = math.sqrt(3)
    a, b, c, d = (1, -1, -root / 3, 2 * root / 3) if group_std else (1.5, -1.5, -5 / 3, 10 / 3)
    expected = torch.tensor([[a, a], [b, 0], [0, 0], [c, 0], [0, c], [d, d]])
    torch.testing.assert_close(grpo(GROUPS, GROUP_MASK, 3, group_std), expected)


@pytest.mark.parametrize("group_std", [True, False])
@pytest.mark.parametrize("score", [0.1, -7.3, 1e6])
def test_grpo_of_equal_returns_is_exactly_zero(group_std, score):
    """The mean of three times -7.3 is not -7.3 in float32: off by 5e-7, half of what is added to the deviation."""
    rewards = torch.full((6, 1), score)
    assert grpo(rewards, torch.ones(6, 1, dtype=torch.bool), 3, group_std).tolist() == [[0.0]] * 6


@pytest.mark.parametrize("group_std", [True, False])
@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_grpo_ignores_a_constant_and_follows_groups(group_std, group_size):
    rewards, _, mask = random_episodes(6, rows=12)
    mask[:, 0] = True  # no empty row: a return has a token
    first = mask.long().argmax(dim=1, keepdim=True)
    advantages = grpo(rewards, mask, group_size, group_std)
    each = advantages.gather(1, first).view(-1, group_size)
    torch.testing.assert_close(each.sum(dim=1), torch.zeros(12 // group_size, dtype=torch.float64))
    constants = torch.arange(12 // group_size, dtype=torch.float64).repeat_interleave(group_size)[:, None]
    torch.testing.assert_close(
        grpo(rewards.scatter_add(1, first, constants), mask, group_size, group_std), advantages
    )
    order = torch.arange(12).view(-1, group_size).flip(0, 1).flatten()
    permuted = grpo(rewards[order], mask[order], group_size, group_std)
    torch.testing.assert_close(permuted, advantages[order])


def test_grpo_ignores_a_factor_where_it_divides_by_the_deviation():
    rewards, _, mask = random_episodes(7, rows=12)
    torch.testing.assert_close(grpo(1000 * rewards, mask, 4), grpo(rewards, mask, 4), rtol=1e-4, atol=0)
    torch.testing.assert_close(grpo(1000 * rewards, mask, 4, False), 1000 * grpo(rewards, mask, 4, False))


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_grpo_without_deviation_is_rloo_scaled(group_size):
    """R_i - mean of all = (1 - 1/K) (R_i - mean of the others)."""
    rewards, _, mask = random_episodes(8, rows=12)
    expected = (group_size - 1) / group_size * rloo(rewards, mask, group_size)
    torch.testing.assert_close(grpo(rewards, mask, group_size, group_std=False), expected)


def test_grpo_needs_whole_groups_of_two_or_more():
    with pytest.raises(ValueError, match="4 rollouts do not make groups of 3"):
        grpo(torch.ones(4, 2), torch.ones(4, 2, dtype=torch.bool), 3)
