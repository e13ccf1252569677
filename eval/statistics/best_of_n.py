"""Best-of-n: the expected score of the best of n samples under a reward model, and its KL to the sampling policy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.statistics.intervals import without_nan


def order_weights(num_samples: int) -> NDArray[np.float64]:
    """Compute the probability (n, rank) that the sample of a rank is the best of n drawn without replacement.

        w[n, i] = C(i - 1, n - 1) / C(N, n),    ranks i = 1 (lowest) to N, n = 1 to N

    Row and column 0 are n = 1 and rank 1. Source: Nakano et al. 2021, appendix I.
    """
    n, ranks = np.arange(1, num_samples + 1)[:, None], np.arange(1, num_samples + 1)[None, :]
    # Downwards from w[n, N] = n / N by w[n, i - 1] = w[n, i] (i - n) / (i - 1): binomials overflow from N = 1030.
    falls = np.maximum(ranks[:, 1:] - n, 0) / (ranks[:, 1:] - 1)
    factors = np.concatenate([falls, n / num_samples], axis=1)
    return np.cumprod(factors[:, ::-1], axis=1)[:, ::-1]


def expected_best(proxy: ArrayLike, values: ArrayLike) -> NDArray[np.float64]:
    """Estimate, without bias, the mean value (P, N) of the best of n = 1 to N samples by `proxy`, for each prompt.

        best_n = sum_i w[n, i] v_(i),    v_(i): the value of the sample with the i-th lowest proxy

    Every subset of n of the N samples counts once; samples of equal proxy are as likely to be picked. `proxy`, `values`
    (P, N): the scores of N samples for each of P prompts. Raises ValueError on nan or unequal shapes.
    Source: Nakano et al. 2021, appendix I.
    """
    proxy, values = np.asarray(proxy, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if proxy.ndim != 2 or proxy.shape != values.shape or proxy.size == 0:
        raise ValueError(
            f"proxy and values must both be (prompts, samples), got {proxy.shape} and {values.shape}"
        )
    without_nan(proxy.ravel(), "proxy")
    without_nan(values.ravel(), "values")
    weights = order_weights(proxy.shape[1])
    return np.stack([weights @ _by_rank(*row) for row in zip(proxy, values, strict=True)])


def _by_rank(proxy: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sort the values (N,) by their proxy; those of equal proxy become their mean."""
    codes = np.unique(proxy, return_inverse=True)[1]
    means = np.bincount(codes, weights=values) / np.bincount(codes)
    return means[np.sort(codes)]


def kl_bound(n: ArrayLike) -> NDArray[np.float64]:
    """Compute log n - (n - 1) / n in nats, an upper bound of the KL of best-of-n to the sampling policy.

    It is reached where no two samples have the same score and none is drawn twice. Sources: Stiennon et al. 2020,
    appendix G.3; Beirami et al. 2024 (the bound).
    """
    n = np.asarray(n, dtype=np.float64)
    if (n < 1).any():
        raise ValueError(f"n must be at least 1, got {n.min():g}")
    return np.log(n) - (n - 1) / n


def top_credit(right: ArrayLike, wrong: ArrayLike) -> float:
    """Compute the share of right responses among those of the highest score: 1/k where one of k tied ones is right.

    `right` and `wrong` are the scores of the right and the wrong responses to a prompt, one or more each. Source: the
    best-of-4 accuracy of RewardBench 2 (Malik et al. 2025).
    """
    right, wrong = without_nan(right, "right"), without_nan(wrong, "wrong")
    best = max(right.max(), wrong.max())
    num_right, num_wrong = int((right == best).sum()), int((wrong == best).sum())
    return num_right / (num_right + num_wrong)
