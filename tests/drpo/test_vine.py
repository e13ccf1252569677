"""Segment advantages over Monte-Carlo values: values by hand, a plain loop, and the identities they must satisfy."""

from __future__ import annotations

import pytest
import torch

from drpo.advantages import gae, vine

T, F = True, False


def random_states(seed: int, rows: int = 9, length: int = 12) -> tuple[torch.Tensor, ...]:
    """Rewards, values, a mask whose rows start and end at random, and states; row 0 is full, row 1 is empty."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    starts = torch.randint(0, length, (rows, 1), generator=generator)
    ends = starts + 1 + (torch.rand(rows, 1, generator=generator) * (length - starts)).long()
    starts[0], ends[0], ends[1] = 0, length, starts[1]
    columns = torch.arange(length)
    mask = (columns >= starts) & (columns < ends)
    chosen = torch.rand(rows, length, generator=generator) < 0.3
    return rewards, values, mask, mask & (chosen | (columns == starts))


def test_vine_by_hand():
    # The prompt's state has V = 1, the one before token 3 has V = 4. r = -0.1, 0, -0.2 | -0.5, 5.
    #   first segment:  V' - V = 3, with the rewards up to its end  3 - 0.3,  3 - 0.2,  3 - 0.2
    #   last segment:   -0.5 + 5 - 4 = 0.5,  5 - 4 = 1
    rewards = torch.tensor([[-0.1, 0.0, -0.2, -0.5, 5.0, 7.0]])
    values = torch.tensor([[1.0, 9.0, 9.0, 4.0, 9.0, 9.0]])
    mask, states = torch.tensor([[T, T, T, T, T, F]]), torch.tensor([[T, F, F, T, F, F]])
    expected = torch.tensor([[2.7, 2.8, 2.8, 0.5, 1.0, 0.0]])
    torch.testing.assert_close(vine(rewards, values, mask, states), expected)
    # The same episode after a forced prefix of two tokens.
    prefix = torch.full((1, 2), 5.0)
    forced = torch.tensor([[F, F]])
    shifted = vine(
        *(torch.cat([prefix, numbers], dim=1) for numbers in (rewards, values)),
        *(torch.cat([forced, entries], dim=1) for entries in (mask, states)),
    )
    torch.testing.assert_close(shifted, torch.cat([torch.zeros(1, 2), expected], dim=1))


@pytest.mark.parametrize("seed", range(4))
def test_vine_equals_a_plain_loop(seed):
    rewards, values, mask, states = random_states(seed)
    expected = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        tokens = mask[row].nonzero().flatten().tolist()
        begins = states[row].nonzero().flatten().tolist()
        for begin, end in zip(begins, [*begins[1:], None], strict=False):
            segment = [t for t in tokens if t >= begin and (end is None or t < end)]
            value_after = 0.0 if end is None else values[row, end]
            for t in segment:
                ahead = sum(rewards[row, u] for u in segment if u >= t)
                expected[row, t] = ahead + value_after - values[row, begin]
    assert int(mask.sum()) > int(states.sum()) > 9
    torch.testing.assert_close(vine(rewards, values, mask, states), expected)


def test_the_segments_of_a_scored_rollout_sum_to_score_less_value():
    rewards, values, mask, states = random_states(20)
    columns = torch.arange(mask.shape[1])
    last = torch.where(mask, columns, -1).amax(dim=1, keepdim=True)
    scored = torch.where(columns == last, rewards, 0.0)
    advantages = vine(scored, values, mask, states)
    for row in range(len(mask)):
        if not mask[row].any():
            continue
        first = int(states[row].nonzero()[0])
        score = scored[row, last[row, 0]]
        torch.testing.assert_close(advantages[row, states[row]].sum(), score - values[row, first])
        for t in range(first, int(last[row, 0])):
            if not states[row, t + 1]:
                torch.testing.assert_close(advantages[row, t], advantages[row, t + 1])


def test_with_a_state_at_every_token_it_is_the_td_error():
    rewards, values, mask, _ = random_states(21)
    td_errors, _ = gae(rewards, values, mask, 1.0, 0.0)
    torch.testing.assert_close(vine(rewards, values, mask, mask), td_errors)


@pytest.mark.parametrize("junk", [1e30, torch.inf, torch.nan])
def test_masked_rewards_and_values_of_no_state_have_no_effect(junk):
    rewards, values, mask, states = random_states(22)
    expected = vine(rewards, values, mask, states)
    other = vine(torch.where(mask, rewards, junk), torch.where(states, values, junk), mask, states)
    assert torch.equal(other, expected)


@pytest.mark.parametrize("states", [[[T, F, F], [F, F, T]], [[T, F, T], [F, T, F]], [[F, F, F], [F, T, F]]])
def test_tokens_without_a_state_and_states_outside_are_errors(states):
    mask = torch.tensor([[T, T, F], [F, T, T]])
    with pytest.raises(
        ValueError, match=r"rows \[[01]\] have a state outside of the episode, or no state before"
    ):
        vine(torch.zeros(2, 3), torch.zeros(2, 3), mask, torch.tensor(states))
