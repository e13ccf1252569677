"""The Pareto front of policies in reward and KL to the reference policy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.statistics.intervals import same_rows, without_nan


def pareto_front(kl: ArrayLike, reward: ArrayLike) -> NDArray[np.bool_]:
    """Return True (n,) for points that no other dominates (no more KL, no less reward, one of them strictly).

    Equal points are both on the front or both off it. Raises ValueError on unequal lengths or nan.
    """
    kl, reward = without_nan(kl, "kl"), without_nan(reward, "reward")
    same_rows({"kl": len(kl), "reward": len(reward)})
    no_worse = (kl[:, None] <= kl) & (reward[:, None] >= reward)
    better = (kl[:, None] < kl) | (reward[:, None] > reward)
    return ~(no_worse & better).any(axis=0)
