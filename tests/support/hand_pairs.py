"""Ragged pairs by hand, and their losses token by token from a model's full logits, without any padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drpo.data.encode import Example
from drpo.data.records import Record
from drpo.trainers.preference.pairs import Pair
from drpo.trainers.preference.recipe import LossConfig

STOP, PAD = 1, 2  # of tiny_models


def hand_pair(
    prompt: str, query: list[int], chosen: list[int], rejected: list[int], offset=0.0, weights=None, **extra
) -> Pair:
    record = Record(prompt, chosen=f"chosen of {prompt}", rejected=f"rejected of {prompt}", extra=extra)
    example = Example(record, query, chosen_ids=[*chosen, STOP], rejected_ids=[*rejected, STOP])
    return Pair(example, offset, weights)


PAIRS = [
    hand_pair("a", [3, 4, 5], [11, 12, 13], [14], flipped=False),
    hand_pair("b", [7] * 9, [15], [16, 17, 18, 19, 20], flipped=True),
    hand_pair("c", [10], [21, 22, 23, 24], [25, 26], flipped=False),
    hand_pair("d", [9, 8, PAD, 6], [PAD, 27], [28, PAD, 29], flipped=False),  # ids of padding that count
    hand_pair("e", [30, 31], [32] * 7, [33, 34], flipped=True),
    hand_pair("f", [35, 36, 37, 38, 39], [40], [41], flipped=False),
    hand_pair("g", [42], [43, 44], [45, 46, 47, 48], flipped=False),
    hand_pair("h", [49, 50], [], [51, 52, 53], flipped=False),  # nothing but the stop token
]


def naive_logprobs(model: nn.Module, query: list[int], response: list[int]) -> Tensor:
    """log softmax(logits)[token] of each token of one response, (length,) float64, with the model's gradients."""
    logits = model(torch.tensor([query + response])).logits[0].double()
    chosen = []
    for place, token in enumerate(response, start=len(query)):
        row = logits[place - 1]
        chosen.append(row[token] - row.max() - torch.log(torch.exp(row - row.max()).sum()))
    return torch.stack(chosen)


def naive_sides(model: nn.Module, pair: Pair) -> tuple[Tensor, Tensor]:
    """Those of the chosen and of the rejected response."""
    query = pair.example.query_ids
    return naive_logprobs(model, query, pair.example.chosen_ids), naive_logprobs(
        model, query, pair.example.rejected_ids
    )


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def naive_loss(config: LossConfig, pair: Pair, policy: nn.Module, reference: nn.Module) -> Tensor:
    """The loss of one pair, written out from its paper; float64, with the policy's gradients."""
    weights = pair.token_weights or (
        [1.0] * len(pair.example.chosen_ids),
        [1.0] * len(pair.example.rejected_ids),
    )
    weights = [torch.tensor(side, dtype=torch.float64) for side in weights]
    w, l = (  # noqa: E741
        (side * weight).sum() for side, weight in zip(naive_sides(policy, pair), weights, strict=True)
    )
    w_ref, l_ref = (
        (side * weight).sum() for side, weight in zip(naive_sides(reference, pair), weights, strict=True)
    )
    n_w, n_l = len(pair.example.chosen_ids), len(pair.example.rejected_ids)
    u_w, u_l = torch.exp(w - w_ref), torch.exp(l - l_ref)
    b, e, alpha = config.beta, config.label_smoothing or 0.0, config.divergence_alpha
    match config.divergence:
        case "reverse_kl":
            h = b * ((w - w_ref) - (l - l_ref))
        case "forward_kl":
            h = b * (-1 / u_w + 1 / u_l)
        case "js":
            h = b * (torch.log(2 * u_w / (1 + u_w)) - torch.log(2 * u_l / (1 + u_l)))
        case "alpha":
            h = b * ((1 - u_w**-alpha) / alpha - (1 - u_l**-alpha) / alpha)
    h = h - pair.offset
    match config.name:
        case "dpo":
            return -log_sigmoid(h)
        case "cdpo":
            return -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)
        case "robust":
            return (-(1 - e) * log_sigmoid(h) + e * log_sigmoid(-h)) / (1 - 2 * e)
        case "hinge":
            return max(0 * h, 1 - h)
        case "ipo":
            return (h / b - 1 / (2 * b)) ** 2
        case "ipo_avg":
            return ((w - w_ref) / n_w - (l - l_ref) / n_l - 1 / (2 * b)) ** 2
        case "apo_zero":
            return 1 - torch.sigmoid(b * (w - w_ref)) + torch.sigmoid(b * (l - l_ref))
        case "apo_down":
            return torch.sigmoid(b * (w - w_ref)) + 1 - torch.sigmoid(b * (w - w_ref - l + l_ref))
        case "sppo":
            return (w - w_ref - 1 / (2 * b)) ** 2 + (l - l_ref + 1 / (2 * b)) ** 2
        case "simpo":
            return -log_sigmoid(b * w / n_w - b * l / n_l - config.target_margin)
        case "orpo":
            p_w, p_l = torch.exp(w / n_w), torch.exp(l / n_l)
            odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
            return -w / n_w - config.odds_coef * log_sigmoid(torch.log(odds_ratio))
    raise AssertionError(config.name)


LOSSES = {
    "dpo": {},
    "cdpo": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "ipo_avg": {},
    "apo_zero": {},
    "apo_down": {},
    "sppo": {},
    "simpo": {"target_margin": 0.3},
    "orpo": {"odds_coef": 0.7},
}
