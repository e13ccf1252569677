"""Advantage estimators: over a critic's values, over the rollouts of a prompt, over Monte-Carlo values of states."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo.tensors import masked_sum


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns, both (B, R), of the tokens where `mask` is True.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    G_t = A_t + V_t

    V and A after the last True token are 0. Where `mask` is False both results are 0, and the entries of `rewards` and
    `values` have no effect: with mask = action_mask the episode begins at the reset.
    Raises ValueError when a row's mask has a hole. Source: Schulman et al. 2016, eq. 16.

    Args:
        rewards: r, (B, R).
        values: V, (B, R); V_t is before token t.
        mask: (B, R) bool; the True tokens of a row are contiguous.
        gamma: discount per token.
        lam: weight of longer returns, 0 to 1; one for all rows, or (B,).
    """
    starts = mask & torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1].logical_not()], dim=1)
    rows_with_holes = (starts.sum(dim=1) > 1).nonzero().flatten().tolist()
    if rows_with_holes:
        raise ValueError(
            f"the mask of rows {rows_with_holes} has a hole; GAE needs one unbroken run of True tokens in a row"
        )

    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantage = torch.zeros_like(deltas[:, 0])
    backwards = []
    for delta in reversed(deltas.unbind(dim=1)):
        advantage = delta + gamma * lam * advantage
        backwards.append(advantage)
    advantages = torch.where(mask, torch.stack(backwards[::-1], dim=1), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def length_adaptive_lam(mask: Tensor, alpha: float) -> Tensor:
    """Compute the lambda (B,) of GAE for each row from its l True tokens in `mask` (B, R): longer rows, larger lambda.

        lam = max(0, 1 - 1 / (alpha l)),    so that sum_n lam^n = 1 / (1 - lam) = alpha l

    Rows of at most 1 / alpha tokens have lambda 0. Source: Yue et al. 2025 (VAPO, arXiv 2504.05118).
    """
    lengths = mask.sum(dim=1).clamp(min=1)
    return (1 - 1 / (alpha * lengths)).clamp(min=0)


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Compute the discounted sum (B, R) of the rewards from each token on, the advantage of REINFORCE++.

        A_t = r_t + gamma A_{t+1}

    Shapes, masking and errors are those of `gae`, of which it is the case V = 0, lambda = 1. It has no baseline: the
    mean over the tokens of the whole batch, taken off by whitening, serves as one.
    Source: Hu 2025 (arXiv 2501.03262).
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def rloo(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Compute leave-one-out advantages (B, R): a rollout's return less the mean return of the rest of its group.

        R_i = sum_t r_{i,t},    A_{i,t} = R_i - sum_{j != i} R_j / (K - 1)    for every token t of rollout i

    `rewards` (B, R), KL penalties included, `mask` (B, R) bool: the tokens of the episode; both are 0 elsewhere. Rows
    are ordered by group, `group_size` = K in each. Raises ValueError when K < 2 or the rows do not divide into groups.
    Source: Kool, van Hoof and Welling 2019; Ahmadian et al. 2024 (arXiv 2402.14740), section 3.2.
    """
    groups = _returns_of_groups(rewards, mask, group_size)
    means_of_others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return torch.where(mask, (groups - means_of_others).view(-1, 1), 0.0)


GROUP_STD_EPS = 1e-6
"Added to the standard deviation of a group's returns."


def grpo(rewards: Tensor, mask: Tensor, group_size: int, group_std: bool = True) -> Tensor:
    """Compute group-relative advantages (B, R): a rollout's return by the mean and deviation of its group's.

        A_{i,t} = (R_i - mean_j R_j) / (std_j R_j + GROUP_STD_EPS)    for every token t of rollout i

    std is that of a sample, over K - 1, as in TRL and verl; the paper does not say which. `group_std=False` leaves the
    division out (Dr. GRPO). Where all returns of a group are equal the advantages are exactly 0. With a KL penalty in
    the rewards equal scores do not make equal returns, and the division makes them differ by as much as scores would;
    in the paper the penalty is a term of the loss. Returns, shapes and errors are those of `rloo`, of which (K - 1) / K
    is the result without the division.
    Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; Liu et al. 2025 (arXiv 2503.20783).
    """
    groups = _returns_of_groups(rewards, mask, group_size)
    groups = groups - groups[:, :1]  # equal returns become exact zeros, whatever their mean rounds to
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if group_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + GROUP_STD_EPS)
    return torch.where(mask, advantages.view(-1, 1), 0.0)


def _returns_of_groups(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Sum the rewards (B, R) of each rollout, as (B / K, K)."""
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"{len(rewards)} rollouts do not make groups of {group_size}; a group has two or more"
        )
    return masked_sum(rewards, mask, dim=1).view(-1, group_size)


def vine(rewards: Tensor, values: Tensor, mask: Tensor, state_mask: Tensor) -> Tensor:
    """Compute advantages (B, R) over values that are known at some states only.

        A_t = sum_{u=t}^{e-1} r_u + V(s_e) - V(s_b)    for b <= t < e

    b is the last state at or before token t and e the next one, or the end of the episode, where V is 0. With a reward
    at the last token alone, R, all tokens of a segment have V(s_e) - V(s_b), those of the last one R - V(s_b), and the
    segments of an episode sum to R - V(s_first). With every token a state it is the TD error of gamma = 1. Where V is
    of the score without KL penalties in r, a token pays for the KL from itself to the end of its segment: for k1 its
    own penalty has the gradient of the KL at that token, the rest that of the later tokens which it leads to.
    Where `mask` is False the result is 0, and rewards have no effect; values have none where `state_mask` is False.
    Raises ValueError when a state lies outside of the mask or the first token of an episode is no state.
    Source: Kazemnejad et al. 2024 (VinePPO, arXiv 2410.01679), section 4, for one reward at the end; segments as in Guo
    et al. 2025 (SPO, arXiv 2505.23564).

    Args:
        rewards: r, (B, R).
        values: V, (B, R), before token t.
        mask: (B, R) bool, the tokens of the episode.
        state_mask: (B, R) bool, the tokens before which a value is known.
    """
    first = mask & (mask.cumsum(dim=1) == 1)
    wrong = (state_mask & mask.logical_not()) | (first & state_mask.logical_not())
    if rows := wrong.any(dim=1).nonzero().flatten().tolist():
        raise ValueError(
            f"rows {rows} have a state outside of the episode, or no state before its first token; every token needs a "
            "state at or before it"
        )
    rewards = torch.where(mask, rewards, 0.0)
    after = torch.zeros_like(rewards[:, 0])  # rewards up to the next state, and its value
    ahead = []
    for reward, value, is_state in zip(
        *(x.unbind(dim=1)[::-1] for x in (rewards, values, state_mask)), strict=True
    ):
        ahead.append(reward + after)
        after = torch.where(is_state, value, ahead[-1])
    columns = torch.arange(mask.shape[1], device=mask.device)
    last_state = torch.where(state_mask, columns, 0).cummax(dim=1).values
    return torch.where(mask, torch.stack(ahead[::-1], dim=1) - values.gather(1, last_state), 0.0)
