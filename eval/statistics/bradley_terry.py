"""Bradley-Terry strengths of all systems on one scale, from their comparisons, as log-odds and as Elo.

Strengths are fitted for many resampled tables of results at once. The bootstrap resamples prompts, since comparisons
on the same prompt are not independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from eval.statistics.intervals import (
    BATCH_ELEMENTS,
    checked_confidence,
    checked_scores,
    prompt_codes,
    same_rows,
)

ELO_PER_LOGIT = 400 / math.log(10)
ELO_CENTRE = 1000.0
RIDGE = 0.1  # precision of the normal prior that replaces an infinite strength: an sd of 550 Elo
MAX_STEPS = 200
WIN, LOSS = range(2)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Systems by decreasing strength. `strengths`, `low`, `high` (K,) are log-odds; `elo*` the same on Elo's scale.

    They are relative to `anchor` (strength 0, Elo 1000), or to the mean of all systems when it is None.
    """

    systems: tuple[str, ...]
    strengths: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    anchor: str | None
    num_comparisons: int
    num_prompts: int
    undecided: int
    warnings: tuple[str, ...]

    @property
    def elo(self) -> NDArray[np.float64]:
        """Strengths on the Elo scale, 1000 + 400 / ln 10 * strength: 400 points are odds of ten to one."""
        return ELO_CENTRE + ELO_PER_LOGIT * self.strengths

    @property
    def elo_low(self) -> NDArray[np.float64]:
        return ELO_CENTRE + ELO_PER_LOGIT * self.low

    @property
    def elo_high(self) -> NDArray[np.float64]:
        return ELO_CENTRE + ELO_PER_LOGIT * self.high


def bradley_terry(
    systems_a: ArrayLike,
    systems_b: ArrayLike,
    scores: ArrayLike,
    prompt_ids: ArrayLike | None = None,
    anchor: str | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Ranking:
    """Estimate the strengths of all systems by maximum likelihood, with bootstrap intervals over prompts.

        P(a beats b) = sigmoid(s_a - s_b);  a score y is y wins and 1 - y losses, a tie half of each

    `systems_a`, `systems_b` (n,) names, `scores` (n,) of system a in [0, 1], nan = undecided; `prompt_ids` (n,), None
    when each row is its own prompt. The limits are percentiles over `num_resamples` resamples of the prompts. The
    estimate exists only if no group of systems won everything against the rest (Ford 1957); otherwise a warning names
    the systems at fault, strengths are kept finite by a normal prior of precision 0.1, and the limits are widened to
    those of the prior and the likelihood's curvature. The same prior is used in resamples that need it. Strengths are
    relative to the system `anchor`, or to the mean of all systems when it is None.
    Raises ValueError on unequal rows, a system against itself, no decided comparison, an unknown anchor,
    fewer than two prompts, or systems that no chain of comparisons joins.
    Sources: Bradley and Terry 1952; Ford 1957; Chiang et al. 2024 (Chatbot Arena).
    """
    confidence = checked_confidence(confidence)
    scores = checked_scores(scores)
    names_a, names_b = np.asarray(systems_a, dtype=str), np.asarray(systems_b, dtype=str)
    same_rows("scores", len(scores), {"systems_a": len(names_a), "systems_b": len(names_b)})
    codes = prompt_codes(prompt_ids, len(scores))
    if (names_a == names_b).any():
        row = int(np.flatnonzero(names_a == names_b)[0])
        raise ValueError(f"row {row} compares {names_a[row]} with itself; leave such rows out")
    decided = ~np.isnan(scores)
    if not decided.any():
        raise ValueError(f"all {len(scores)} comparisons are undecided; see the statuses of the verdicts")
    systems, indices = np.unique(np.concatenate([names_a, names_b]), return_inverse=True)
    if anchor is not None and anchor not in systems:
        raise ValueError(f"anchor {anchor!r} is not among the systems: {', '.join(systems)}")
    index_a, index_b = indices[: len(scores)][decided], indices[len(scores) :][decided]
    codes = np.unique(codes[decided], return_inverse=True)[1]
    num_prompts = int(codes.max()) + 1
    if num_prompts < 2:
        raise ValueError("all decided comparisons are on one prompt; an interval needs at least two prompts")
    per_prompt, pairs = _results(index_a, index_b, scores[decided], codes, len(systems))
    table = per_prompt.sum(axis=0, keepdims=True)
    _check_connected(table, pairs, systems)

    strengths, covariance = _fit(table, pairs, len(systems))
    resampled = _resampled_tables(per_prompt, num_resamples, seed)
    draws = _fit(resampled, pairs, len(systems))[0]
    centre = np.eye(len(systems)) - 1 / len(systems)
    if anchor is not None:
        centre = np.eye(len(systems)) - (systems == anchor)
    strengths, draws = strengths @ centre.T, draws @ centre.T
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    notes = []
    beats = _reachable(_edges(table, pairs, len(systems)))[0]
    if not beats.all():
        notes.append(_separation_warning(beats, systems))
        half = stats.norm.isf(tail) * np.sqrt(np.diag(centre @ covariance[0] @ centre.T))
        low, high = np.minimum(low, strengths[0] - half), np.maximum(high, strengths[0] + half)
    order = np.argsort(-strengths[0], kind="stable")
    return Ranking(
        systems=tuple(systems[order].tolist()),
        strengths=strengths[0, order],
        low=low[order],
        high=high[order],
        anchor=anchor,
        num_comparisons=int(decided.sum()),
        num_prompts=num_prompts,
        undecided=int((~decided).sum()),
        warnings=tuple(notes),
    )


def _results(
    index_a: NDArray, index_b: NDArray, scores: NDArray, codes: NDArray, num_systems: int
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Count wins and losses of the first of each pair, by prompt (P, M, 2); pairs (M, 2) have first < second."""
    first, second = np.minimum(index_a, index_b), np.maximum(index_a, index_b)
    keys, pair = np.unique(first * num_systems + second, return_inverse=True)
    scores = np.where(index_a == first, scores, 1 - scores)
    results = np.zeros((int(codes.max()) + 1, len(keys), 2))
    np.add.at(results, (codes, pair), np.stack([scores, 1 - scores], axis=1))
    return results, np.stack([keys // num_systems, keys % num_systems], axis=1)


def _resampled_tables(per_prompt: NDArray, num_resamples: int, seed: int) -> NDArray[np.float64]:
    """Sum P prompts drawn with replacement, R times: (R, M, 2)."""
    num_prompts = len(per_prompt)
    rng = np.random.default_rng(seed)
    flat = per_prompt.reshape(num_prompts, -1)
    at_once = max(1, BATCH_ELEMENTS // num_prompts)
    sums = []
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        counts = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=size)
        sums.append(counts.astype(np.float64) @ flat)
    return np.concatenate(sums).reshape(num_resamples, *per_prompt.shape[1:])


def _edges(tables: NDArray, pairs: NDArray, num_systems: int) -> NDArray[np.bool_]:
    """Return (B, K, K): whether the row's system has a win, or a part of one, over the column's."""
    edges = np.zeros((len(tables), num_systems, num_systems), dtype=bool)
    edges[:, pairs[:, 0], pairs[:, 1]] = tables[:, :, WIN] > 0
    edges[:, pairs[:, 1], pairs[:, 0]] = tables[:, :, LOSS] > 0
    return edges


def _reachable(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (B, K, K): whether a chain of edges leads from the row's system to the column's."""
    reach = edges | np.eye(edges.shape[-1], dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(edges.shape[-1])))):
        reach = np.matmul(reach.astype(np.float32), reach.astype(np.float32)) > 0
    return reach


def _check_connected(table: NDArray, pairs: NDArray, systems: NDArray) -> None:
    edges = _edges(table, pairs, len(systems))
    reach = _reachable(edges | edges.transpose(0, 2, 1))[0]
    if not reach.all():
        groups = sorted({", ".join(systems[row]) for row in reach})
        raise ValueError(
            "no chain of decided comparisons joins these groups of systems, so they share no scale: "
            f"{' | '.join(groups)}; compare a system of each with a common baseline"
        )


def _separation_warning(beats: NDArray[np.bool_], systems: NDArray) -> str:
    groups = {tuple(np.flatnonzero(row & column)) for row, column in zip(beats, beats.T, strict=True)}
    listed = ", ".join("{" + ", ".join(systems[list(group)]) + "}" for group in sorted(groups))
    return (
        f"separation: between the groups {listed} one side got everything or nothing, so their distance has no "
        "finite estimate; what stands here is held finite by a weak prior; more comparisons are needed"
    )


def _fit(
    tables: NDArray[np.float64], pairs: NDArray[np.intp], num_systems: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return strengths (B, K) of mean 0 and the inverse of the penalised information (B, K, K).

    Newton's method on all B tables (B, M, 2) at once, no step longer than 1 in any coordinate. The model is an
    exponential family, so the log-likelihood is concave and the information its curvature.
    """
    num_tables = len(tables)
    sign = np.zeros((len(pairs), num_systems))
    sign[np.arange(len(pairs)), pairs[:, 0]], sign[np.arange(len(pairs)), pairs[:, 1]] = 1, -1
    totals = tables.sum(axis=2)
    held = ~_reachable(_edges(tables, pairs, num_systems)).all(axis=(1, 2))
    ridge = np.where(held, RIDGE, 0.0)
    level = np.ones(
        (num_systems, num_systems)
    )  # fixes the mean of s, on which the likelihood does not depend
    s = np.zeros((num_tables, num_systems))
    for _ in range(MAX_STEPS):
        half_gap = s @ sign.T / 2
        logits = np.stack([half_gap, -half_gap], axis=2)
        probs = np.exp(logits - logits.max(axis=2, keepdims=True))
        probs /= probs.sum(axis=2, keepdims=True)
        lead = (probs[:, :, WIN] - probs[:, :, LOSS]) / 2
        gradient = ((tables[:, :, WIN] - tables[:, :, LOSS]) / 2 - totals * lead) @ sign - ridge[:, None] * s
        spread = totals * ((probs[:, :, WIN] + probs[:, :, LOSS]) / 4 - lead**2)
        information = level + np.einsum("mi,bm,mj->bij", sign, spread, sign, optimize=True)
        information += ridge[:, None, None] * np.eye(num_systems)
        step = np.linalg.solve(information, gradient[:, :, None])[:, :, 0]
        if np.abs(step).max() < 1e-9:
            break
        s = s + step * np.minimum(1.0, 1.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
    else:
        raise ValueError(f"strengths did not settle in {MAX_STEPS} steps; the results are too one-sided")
    return s, np.linalg.inv(information)
