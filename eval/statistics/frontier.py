"""What reward each policy reaches at what KL to the reference policy, and what best-of-n would reach there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from eval.statistics.intervals import Interval, without_nan


def sequence_kls(
    logprobs: ArrayLike, ref_logprobs: ArrayLike, mask: ArrayLike, estimator: Literal["k1", "k3"] = "k1"
) -> NDArray[np.float64]:
    """One estimate (n,) per sampled response of KL(policy || reference) over whole responses, in nats.

        d_t = log pi(a_t | s_t) - log pi_ref(a_t | s_t),    k1: sum_t d_t,    k3: sum_t (exp(-d_t) - 1 + d_t)

    The mean over responses is unbiased for both, if these were sampled from `logprobs`' own distribution: at
    temperature 1 without top-k or top-p, from the prompt (no forced prefix). k3 is never negative and varies less
    near the reference; far from it exp(-d) has heavy tails, and k1 is the safer one. Feed the result to
    `eval.statistics.intervals.mean_interval` with the prompt ids. Arrays are (n, R), mask bool, True = sampled token;
    what lies outside it has no effect. Raises ValueError on unequal shapes, a mask that is not bool, or
    log-probabilities inside it that are not finite or above 0.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    mask = np.asarray(mask)
    arrays = [np.asarray(x, dtype=np.float64) for x in (logprobs, ref_logprobs)]
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"mask must be bool (n, R), True = sampled, got {mask.dtype} {mask.shape}")
    for name, array in zip(("logprobs", "ref_logprobs"), arrays, strict=True):
        if array.shape != mask.shape:
            raise ValueError(f"{name} is {array.shape} but mask is {mask.shape}; give one per token")
        bad = (mask & ~(np.isfinite(array) & (array <= 1e-6))).any(axis=1)
        if bad.any():
            raise ValueError(
                f"{name} has values that are no log-probabilities in rows {np.flatnonzero(bad)[:5].tolist()}; "
                "score these responses again"
            )
    d = np.where(mask, arrays[0], 0.0) - np.where(mask, arrays[1], 0.0)
    match estimator:
        case "k1":
            return d.sum(axis=1)
        case "k3":
            return (np.expm1(-d) + d).sum(axis=1)
    raise ValueError(f"estimator must be k1 or k3, got {estimator!r}; k2 is biased and not for reporting")


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


def best_of_n_kl(n: int) -> float:
    """Upper bound, in nats, on KL(best of n samples || the policy sampled): log n - (n - 1) / n.

    Exact when no two samples have equal reward. Raises ValueError on n < 1. Sources: Stiennon et al. 2020, appendix
    G.3; Beirami et al. 2024 (that it is a bound).
    """
    _checked_n(n)
    return math.log(n) - (n - 1) / n


def best_of_n_win_rate(n: int) -> float:
    """Rate at which the best of n samples beats one fresh sample by the reward that chose it: n / (n + 1).

    For rewards without ties. With `best_of_n_kl` this is the curve to hold a policy's win rate against the
    reference to. Raises ValueError on n < 1. Source: Gui et al. 2024 (BoNBoN).
    """
    _checked_n(n)
    return n / (n + 1)


def best_of_n_means(scores: ArrayLike, n: int) -> NDArray[np.float64]:
    """Expected score of the best of n, one estimate (prompts,) from the N >= n samples of each prompt.

        sum_{i=n}^{N} C(i-1, n-1) / C(N, n) r_(i),    r_(1) <= ... <= r_(N)

    The mean over all subsets of n, so unbiased, unlike taking the first n. `scores` (prompts, N) without nan.
    Feed the result to `eval.statistics.intervals.mean_interval`. Raises ValueError when n is not in 1..N, or on nan.
    Source: Nakano et al. 2021 (WebGPT), on best-of-n estimates.
    """
    _checked_n(n)
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] < n:
        raise ValueError(f"scores must be (prompts, at least n = {n} samples), got shape {array.shape}")
    without_nan(array.ravel(), "scores")
    num_samples = array.shape[1]
    i = np.arange(n, num_samples + 1)
    log_weights = _log_choose(i - 1, n - 1) - _log_choose(num_samples, n)
    return np.sort(array, axis=1)[:, n - 1 :] @ np.exp(log_weights)


def _log_choose(n: ArrayLike, k: int) -> NDArray[np.float64]:
    n = np.asarray(n)
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _checked_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"best of n needs n >= 1, got {n}")
