"""Losses of reward models, as functions of scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def comparison_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the Bradley-Terry loss (N,) of comparisons, in nats, under a label error rate e.

        -(1 - e) log sigmoid(m) - e log sigmoid(-m),    m = r(better) - r(worse) - margin

    e = 0 is -log P(the better response wins); with e > 0 the best margin is finite, log((1 - e) / e). Source: Stiennon
    et al. 2020, section 3.4; the margin Touvron et al. 2023 (Llama 2), eq. 2; e Chowdhury et al. 2024, eq. 9.
    """
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def plackett_luce_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Compute the Plackett-Luce loss (B,) of rankings, in nats: -log P(the responses are drawn in this order).

        sum_k log sum_{j: rank_j >= rank_k} exp r_j - r_k

    `scores` r (B, K); `ranks` (B, K) of integers, 0 the best, -1 for no response. Responses of one rank compete with
    each other (Breslow's way with ties), so that equal scores are best for them; the last one alone costs nothing. Two
    responses give the Bradley-Terry loss. Source: Luce 1959; Plackett 1975; ties Breslow 1974.
    """
    real = ranks >= 0
    competes = (ranks[:, None, :] >= ranks[:, :, None]) & real[:, None, :]  # (B, k, j)
    totals = torch.logsumexp(scores[:, None, :].masked_fill(~competes, float("-inf")), dim=2)
    return torch.where(real, totals - scores, 0).sum(dim=1)
