"""Bradley-Terry strengths of all systems on one scale, from their comparisons, as log-odds and as Elo.

Strengths are fitted for many resampled tables of results at once. The bootstrap resamples prompts, since comparisons
on the same prompt are not independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

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


@dataclass(frozen=True, eq=False)
class Ranking:
    """Systems by decreasing strength. `strengths`, `low`, `high` (K,) are log-odds.

    They are relative to `anchor` (strength 0), or to the mean of all systems when it is None.
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


def elo(strengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert strengths to the Elo scale, 1000 + 400 / ln 10 * strength: 400 points are odds of ten to one."""
    return ELO_CENTRE + ELO_PER_LOGIT * strengths


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

    The limits are percentiles over resamples of the prompts. The estimate exists only if no group of systems won
    everything against the rest (Ford 1957); otherwise a warning names the systems at fault, strengths are kept finite
    by a normal prior of precision 0.1, and the limits are widened to those of the prior and the likelihood's curvature.
    The same prior is used in resamples that need it.

    Args:
        systems_a: Names (n,) of the first system of each comparison.
        systems_b: Names (n,) of the second one.
        scores: Score (n,) of system a in [0, 1]; nan = undecided.
        prompt_ids: Prompt (n,) of each row; None when each row is its own prompt.
        anchor: System of strength 0; None puts the mean of all systems there.
        confidence: Confidence level of the limits.
        num_resamples: Number of resamples of the prompts.
        seed: Seed of the resamples.

    Raises ValueError on unequal rows, a system against itself, no decided comparison, an unknown anchor,
    fewer than two prompts, or systems that no chain of comparisons joins.
    Sources: Bradley and Terry 1952; Ford 1957; Chiang et al. 2024 (Chatbot Arena).
    """
    confidence = checked_confidence(confidence)
    scores = checked_scores(scores)
    names_a, names_b = np.asarray(systems_a, dtype=str), np.asarray(systems_b, dtype=str)
    same_rows({"scores": len(scores), "systems_a": len(names_a), "systems_b": len(names_b)})
    codes = prompt_codes(prompt_ids, len(scores))
    if (names_a == names_b).any():
        row = int((names_a == names_b).argmax())
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
    shares = np.full(num_prompts, 1 / num_prompts)
    rng, num_at_once = np.random.default_rng(seed), max(1, BATCH_ELEMENTS // num_prompts)
    sizes = [min(num_at_once, num_resamples - first) for first in range(0, num_resamples, num_at_once)]
    counts = (rng.multinomial(num_prompts, shares, size=size).astype(np.float64) for size in sizes)
    tables = np.concatenate([np.tensordot(count, per_prompt, axes=1) for count in counts])
    draws, _ = _fit(tables, pairs, len(systems))
    zero = 1 / len(systems) if anchor is None else systems == anchor
    centre = np.eye(len(systems)) - zero
    strengths, draws = strengths @ centre.T, draws @ centre.T
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    notes = []
    groups = _components(table, pairs, len(systems), "strong")[0]
    if groups.any():
        notes.append(_separation_warning(groups, systems))
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


def _components(
    tables: NDArray, pairs: NDArray, num_systems: int, connection: Literal["weak", "strong"]
) -> NDArray[np.intp]:
    """Label the connected components of each table's graph, from 0: (B, K).

    An edge leads from a system to one over which it has a win, or a part of one.
    """
    table, pair, side = np.nonzero(tables)
    first, second = table * num_systems + pairs[pair, side], table * num_systems + pairs[pair, 1 - side]
    size = len(tables) * num_systems
    graph = coo_array((np.ones(len(table)), (first, second)), shape=(size, size))
    labels = connected_components(graph, connection=connection)[1].reshape(-1, num_systems)
    return labels - labels.min(axis=1, keepdims=True)


def _grouped(labels: NDArray, systems: NDArray) -> list[str]:
    """Return the names of each component's systems, joined by commas."""
    return sorted(", ".join(systems[labels == label]) for label in np.unique(labels))


def _check_connected(table: NDArray, pairs: NDArray, systems: NDArray) -> None:
    labels = _components(table, pairs, len(systems), "weak")[0]
    if labels.any():
        raise ValueError(
            "no chain of decided comparisons joins these groups of systems, so they share no scale: "
            f"{' | '.join(_grouped(labels, systems))}; compare a system of each with a common baseline"
        )


def _separation_warning(labels: NDArray, systems: NDArray) -> str:
    listed = ", ".join(f"{{{group}}}" for group in _grouped(labels, systems))
    return (
        f"separation: between the groups {listed} one side got everything or nothing, so their distance has no "
        "finite estimate; the one shown is held finite by a weak prior; more comparisons are needed"
    )


def _fit(
    tables: NDArray[np.float64], pairs: NDArray[np.intp], num_systems: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return strengths (B, K) of mean 0 and the inverse of the penalised information (B, K, K).

    Newton's method on all B tables (B, M, 2) at once, no step longer than 1 in any coordinate. The model is an
    exponential family, so the log-likelihood is concave and the information its curvature.
    """
    sign = np.zeros((len(pairs), num_systems))
    sign[np.arange(len(pairs)), pairs[:, 0]], sign[np.arange(len(pairs)), pairs[:, 1]] = 1, -1
    wins, totals = tables[:, :, 0], tables.sum(axis=2)
    separated = _components(tables, pairs, num_systems, "strong").any(axis=1)
    ridge = np.where(separated, RIDGE, 0.0)
    level = np.ones(
        (num_systems, num_systems)
    )  # fixes the mean of s, on which the likelihood does not depend
    s = np.zeros((len(tables), num_systems))
    for _ in range(MAX_STEPS):
        prob = expit(s @ sign.T)
        gradient = (wins - totals * prob) @ sign - ridge[:, None] * s
        spread = totals * prob * expit(-s @ sign.T)
        information = level + np.einsum("mi,bm,mj->bij", sign, spread, sign, optimize=True)
        information += ridge[:, None, None] * np.eye(num_systems)
        step = np.linalg.solve(information, gradient[:, :, None])[:, :, 0]
        if np.abs(step).max() < 1e-9:
            break
        s = s + step * np.minimum(1.0, 1.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
    else:
        raise ValueError(f"strengths did not settle in {MAX_STEPS} steps; the results are too one-sided")
    return s, np.linalg.inv(information)
