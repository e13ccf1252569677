"""Find which policies no other one beats in reward at less KL to the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.statistics.intervals import Interval, without_nan


def pareto_front(kl: ArrayLike, reward: ArrayLike) -> NDArray[np.bool_]:
    """True (n,) for the points that no other one beats: at most their KL, at least their reward, one strictly.

    Points that are equal in both stand or fall together. Raises ValueError on unequal lengths or nan.
    """
    kl, reward = without_nan(kl, "kl"), without_nan(reward, "reward")
    if len(kl) != len(reward):
        raise ValueError(f"{len(kl)} KLs but {len(reward)} rewards; give one of each per point")
    no_worse = (kl[:, None] <= kl) & (reward[:, None] >= reward)
    better = (kl[:, None] < kl) | (reward[:, None] > reward)
    return ~(no_worse & better).any(axis=0)


@dataclass(frozen=True)
class FrontierPoint:
    """One policy (a method, a checkpoint) on the frontier plot; intervals of its KL in nats and of its reward."""

    system: str
    kl: Interval
    reward: Interval
    on_front: bool


def frontier(
    systems: Sequence[str], kls: Sequence[Interval], rewards: Sequence[Interval]
) -> tuple[FrontierPoint, ...]:
    """The policies by rising KL, each with its intervals and whether it is on the Pareto front of the means.

    Raises ValueError on unequal lengths, a system given twice, or no system.
    """
    if not len(systems) == len(kls) == len(rewards):
        raise ValueError(f"{len(systems)} systems, {len(kls)} KLs and {len(rewards)} rewards; give one each")
    twice = sorted({system for system in systems if list(systems).count(system) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} given twice; name checkpoints apart")
    front = pareto_front([kl.value for kl in kls], [reward.value for reward in rewards])
    points = map(FrontierPoint, systems, kls, rewards, front.tolist())
    return tuple(sorted(points, key=lambda point: (point.kl.value, -point.reward.value)))
