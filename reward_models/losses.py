"""The loss that reward models are trained with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood (B,), in nats, that the chosen response of each pair wins by its margin.

        -log sigmoid(chosen_scores - rejected_scores - margin)

    All are (B,); no margin means 0. Equal scores cost log 2.
    Source: Stiennon et al. 2020, section 3.4 (loss); Touvron et al. 2023 (Llama 2), eq. 2 (margin).
    """
    difference = chosen_scores - rejected_scores
    return -F.logsigmoid(difference if margin is None else difference - margin)
