"""Find which policies no other one beats in reward at less KL to the reference policy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.statistics.intervals import without_nan


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
