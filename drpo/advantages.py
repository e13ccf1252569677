"""Advantage estimators: GAE over a critic's values, and leave-one-out over the rollouts of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo.tensors import masked_sum


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
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
        lam: weight of longer returns, 0 to 1.
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


def rloo(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Compute leave-one-out advantages (B, R): a rollout's return less the mean return of the rest of its group.

        R_i = sum_t r_{i,t},    A_{i,t} = R_i - sum_{j != i} R_j / (K - 1)    for every token t of rollout i

    `rewards` (B, R), KL penalties included, `mask` (B, R) bool: the tokens of the episode; both are 0 elsewhere. Rows
    are ordered by group, `group_size` = K in each. Raises ValueError when K < 2 or the rows do not divide into groups.
    Source: Kool, van Hoof and Welling 2019; Ahmadian et al. 2024 (arXiv 2402.14740), section 3.2.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"{len(rewards)} rollouts do not make groups of {group_size}; a group has two or more"
        )
    returns = masked_sum(rewards, mask, dim=1)
    groups = returns.view(-1, group_size)
    means_of_others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return torch.where(mask, (groups - means_of_others).view(-1, 1), 0.0)
