"""The two losses of PPO, per token and unreduced, and the weights of tokens that another engine sampled.

The trainer sums them where the mask is True (`masked_sum`) and divides by counts of the whole optimizer step
(`policy_divisors`), so a token weighs the same however the batch is cut into micro-batches. Both work element by
element on any shape, so also on the counted tokens alone, `x[mask]`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"Bound of |log ratio|, in nats: exp(20) = 5e8. float32 overflows at 88, and gradient norms square."


class PolicyTerms(NamedTuple):
    """Per-token parts of the policy loss, (B, R) each."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    "bool: the clipped branch is the larger loss, or dual_clip holds the loss, so the token has no gradient."


def ppo_policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyTerms:
    """Compute the clipped surrogate loss of each token, all tensors (B, R).

        ratio = exp(new_logprobs - logprobs)
        loss  = max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range_high))
        loss  = min(loss, -A dual_clip)    where A < 0, with dual_clip

    Only `new_logprobs` should carry a gradient. A log ratio beyond +-MAX_LOG_RATIO is clamped and has no
    gradient, so an infinite or nan log ratio under the mask cannot turn its zero gradient into nan.
    Source: Schulman et al. 2017, eq. 7 (negated); the upper bound of its own: Yu et al. 2025 (DAPO, arXiv 2503.14476),
    Clip-Higher; dual_clip: Ye et al. 2020 (arXiv 1912.09729), eq. 5 (negated).

    Args:
        new_logprobs: of the policy that is trained.
        logprobs: of the policy that sampled.
        advantages: A.
        clip_range: how far below 1 the ratio counts, and above 1 without clip_range_high.
        clip_range_high: how far above 1 the ratio counts; None for clip_range.
        dual_clip: bound of the ratio where A < 0, above 1; None for no bound.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = (new_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    loss = torch.maximum(unclipped_loss, clipped_loss)
    clipped = clipped_loss.detach() > unclipped_loss.detach()
    if dual_clip is not None:
        largest = -dual_clip * advantages
        held = (advantages < 0) & (loss.detach() > largest)
        loss, clipped = torch.where(held, largest, loss), clipped | held
    return PolicyTerms(loss, ratio.detach(), clipped)


Normalisation = Literal["token", "sequence", "constant"]


def policy_divisors(
    mask: Tensor, normalisation: Normalisation, num_tokens: Tensor, num_rollouts: int, max_length: int
) -> Tensor:
    """Compute what the summed policy losses of each rollout are divided by, (B,) or a scalar for all.

        token:     N        the mean over the N tokens of the minibatch
        sequence:  M n_i    the mean over its M rollouts of the mean over the n_i tokens of each
        constant:  M L      L the longest that a response may be: a token weighs the same in every step

    Source: token Yu et al. 2025 (DAPO, arXiv 2503.14476), sequence Shao et al. 2024 (GRPO, arXiv 2402.03300), constant
    Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783).

    Args:
        mask: (B, R) bool, tokens with policy loss; B rollouts of the minibatch, all or a part of them.
        normalisation: which of the three.
        num_tokens: N.
        num_rollouts: M.
        max_length: L, in tokens.
    """
    match normalisation:
        case "token":
            return num_tokens
        case "sequence":
            return num_rollouts * mask.sum(dim=1).clamp(min=1)
        case "constant":
            return torch.full_like(num_tokens, num_rollouts * max_length)
    raise ValueError(f"unknown normalisation {normalisation!r}; choose token, sequence or constant")


def importance_weights(
    logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, level: Literal["token", "sequence"], cap: float
) -> Tensor:
    """Compute truncated importance weights (B, R) of tokens that a rollout engine sampled.

        token:     w_t = min(pi(a_t | s_t) / mu(a_t | s_t), cap)
        sequence:  w_t = min(prod_u pi(a_u | s_u) / mu(a_u | s_u), cap), the same for all tokens of a row

    pi is the trainer's policy at sampling time, mu what the engine computed for the same weights. Their expectation
    under mu turns into one under pi, up to the truncation. Tokens outside `mask` have weight 1 and no influence.
    Source: Ionides 2008, Truncated importance sampling; for rollout engines Yao et al. 2025, Your efficient RL
    framework secretly brings you off-policy RL training.

    Args:
        logprobs: (B, R), under pi.
        engine_logprobs: (B, R), under mu.
        mask: (B, R) bool, the sampled tokens.
        level: whether the ratio is that of a token or of all tokens of the row.
        cap: largest weight.
    """
    log_ratio = torch.where(mask, logprobs - engine_logprobs, 0.0).detach()
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
    return torch.where(mask, weights, 1.0)


class ValueTerms(NamedTuple):
    """Per-token parts of the value loss, (B, R) each."""

    loss: Tensor
    clipped: Tensor
    "bool: the clipped branch is the larger loss, so the token has no gradient."


def ppo_value_loss(new_values: Tensor, values: Tensor, returns: Tensor, clip_range: float) -> ValueTerms:
    """Compute the clipped value loss of each token, all tensors (B, R).

        loss = 0.5 max((v - G)^2, (clip(v, V - clip_range, V + clip_range) - G)^2)

    v are the new values (with gradient), V those of the rollout, G the returns; all finite, also under the
    mask (`gae` ensures it for G), since the square of an infinite error has a nan gradient there.
    Source: OpenAI baselines, PPO2; the paper's eq. 9 has no clipping (Schulman et al. 2017).
    """
    clipped_values = torch.clamp(new_values, values - clip_range, values + clip_range)
    unclipped_loss = 0.5 * (new_values - returns) ** 2
    clipped_loss = 0.5 * (clipped_values - returns) ** 2
    loss = torch.maximum(unclipped_loss, clipped_loss)
    return ValueTerms(loss, clipped_loss.detach() > unclipped_loss.detach())
