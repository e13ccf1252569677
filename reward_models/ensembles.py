"""Combine the scores of an ensemble of reward models."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(scores: Tensor, how: str, coef: float) -> Tensor:
    """Combine the scores (M, B) of M members into one score (B,), in the members' unit.

        mean                 m = 1/M sum_i s_i
        min                  min_i s_i
        mean_minus_std       m - coef * sigma,     sigma^2 = 1/M sum_i (s_i - m)^2
        mean_minus_variance  m - coef * sigma^2

    Source: Coste et al. 2023 (arXiv 2310.02743), section 3: mean, worst-case optimisation (min), and
    uncertainty-weighted optimisation (mean_minus_variance). mean_minus_std is a lower confidence bound; it has the
    unit of the scores, so coef does not depend on it. Raises ValueError on another `how`.
    """
    scores = scores.double()
    mean = scores.mean(dim=0)
    match how:
        case "mean":
            combined = mean
        case "min":
            combined = scores.amin(dim=0)
        case "mean_minus_std":
            combined = mean - coef * spread(scores)
        case "mean_minus_variance":
            combined = mean - coef * spread(scores) ** 2
        case _:
            raise ValueError(f"unknown combination {how!r}: mean, min, mean_minus_std or mean_minus_variance")
    return combined.float()


def spread(scores: Tensor) -> Tensor:
    """Return the members' standard deviation (B,) of scores (M, B), divisor M: 0 where they agree."""
    return torch.std(scores.double(), dim=0, correction=0)
