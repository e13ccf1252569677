"""The losses of offline preference training, one value per pair (or per response for KTO), unreduced.

Most of them read the margin h of a pair alone:

    h = implicit_margins(chosen_logratios, rejected_logratios, beta)    logratio = log pi(y|x) - log pi_ref(y|x)
    dpo | cdpo | robust_dpo | hinge | ipo _loss(h)                      ODPO: the same of h - score_offsets(...)

The others need more than a difference, as their arguments show. Dr. DPO reads only losses, so it composes
with all of them; `token_weighted_sum` gives the log-probabilities that enter any of them. A
log-probability is a sum over the response unless it is called mean. Everything is in nats, (B,) and float32
or wider; beta > 0. Inputs of +-1e4 nats give finite losses and gradients, unless a loss says otherwise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from drpo.losses import MAX_LOG_RATIO

# --- the margin of a pair ---------------------------------------------------------------------------------


def implicit_margins(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float,
    divergence: str = "reverse_kl",
    alpha: float = 1.0,
) -> Tensor:
    """Compute the margin h (B,) of the implicit rewards under an f-divergence penalty.

        h = beta (f'(u_w) - f'(u_l)),   u = pi / pi_ref = exp(logratio)
        reverse_kl  f'(u) = log u + 1             the margin of DPO
        forward_kl  f'(u) = -1 / u                is alpha at 1
        js          f'(u) = log(2 u / (1 + u))
        alpha       f'(u) = (1 - u^-alpha) / alpha,   0 < alpha <= 1; tends to reverse_kl at 0

    u^-alpha grows exponentially where the policy abandons a response. It is exact up to exp(MAX_LOG_RATIO), that
    is for alpha logratio >= -MAX_LOG_RATIO; below, it continues as the tangent there: still monotone, with the
    gradient clamped at its maximum. Raises ValueError on an unknown divergence or an alpha outside (0, 1].
    Source: Wang et al. 2023 (f-DPO, "Beyond Reverse KL"), table 1; Rafailov et al. 2023, eq. 7 (reverse_kl).

    Args:
        chosen_logratios, rejected_logratios: (B,), in nats.
        beta: strength of the penalty.
        divergence: name of f.
        alpha: exponent of the divergence alpha; others ignore it.
    """
    match divergence:
        case "reverse_kl":
            return beta * (chosen_logratios - rejected_logratios)
        case "js":
            return beta * (F.logsigmoid(chosen_logratios) - F.logsigmoid(rejected_logratios))
        case "forward_kl":
            alpha = 1.0
        case "alpha":
            if not 0 < alpha <= 1:
                raise ValueError(f"alpha must be in (0, 1] (1 is forward_kl), got {alpha}")
        case _:
            raise ValueError(f"divergence must be reverse_kl, forward_kl, js or alpha, got {divergence!r}")
    powers = _bounded_exp(-alpha * rejected_logratios) - _bounded_exp(-alpha * chosen_logratios)
    return beta * powers / alpha


def _bounded_exp(x: Tensor) -> Tensor:
    """Compute exp(x) up to MAX_LOG_RATIO, and its tangent from there on."""
    clamped = x.clamp(max=MAX_LOG_RATIO)
    return clamped.exp() * (1 + x - clamped)


def score_offsets(gaps: Tensor, alpha: float, scale: str) -> Tensor:
    """Compute the offsets (B,) that ODPO subtracts from the margin h: alpha f(gap), not scaled by beta.

        gap = score(chosen) - score(rejected)
        identity  f(gap) = gap
        log       f(gap) = log gap          as in the released code; < 0 for gap < 1, so such pairs need less margin
        log1p     f(gap) = log(1 + gap)     never below 0

    alpha = 0 is DPO. Scores have the reward's unit, offsets are nats. Raises ValueError on an unknown scale
    and where f has no finite value for a preference: log needs gap > 0, log1p gap >= 0 (one device sync).
    Source: Amini et al. 2024 (ODPO) and its released code (log).
    """
    match scale:
        case "identity":
            return alpha * gaps
        case "log":
            _require_gaps(gaps > 0, gaps, "log", "positive")
            return alpha * gaps.log()
        case "log1p":
            _require_gaps(gaps >= 0, gaps, "log1p", "at least 0")
            return alpha * gaps.log1p()
        case _:
            raise ValueError(f"scale must be identity, log or log1p, got {scale!r}")


def _require_gaps(valid_mask: Tensor, gaps: Tensor, scale: str, needed: str) -> None:
    if not bool(valid_mask.all()):
        raise ValueError(
            f"scale {scale!r} needs score gaps that are {needed}, got {gaps[valid_mask.logical_not()][0]:g}; "
            "drop such pairs or choose another scale"
        )


# --- losses of the margin ---------------------------------------------------------------------------------


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Compute the Bradley-Terry loss (B,) of reward models, in nats: -log P(the chosen response wins).

        -log sigmoid(chosen_scores - rejected_scores)

    Both are (B,). Equal scores cost log 2. Source: Stiennon et al. 2020, section 3.4.
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


def dpo_loss(margins: Tensor) -> Tensor:
    """Compute the DPO loss (B,): the Bradley-Terry loss of the implicit rewards.

        -log sigmoid(h)

    Source: Rafailov et al. 2023, eq. 7; with h - offset it is ODPO (Amini et al. 2024).
    """
    return -F.logsigmoid(margins)


def cdpo_loss(margins: Tensor, label_smoothing: float) -> Tensor:
    """Compute the cross-entropy (B,) under a label error rate e, with a finite optimal margin.

        (1 - e) l(h) + e l(-h),   l = dpo_loss;   smallest at h = log((1 - e) / e)

    Raises ValueError unless 0 <= e < 0.5.
    Source: Mitchell 2023, "A note on DPO with noisy preferences" (cDPO), eq. 3.
    """
    _require_label_smoothing(label_smoothing)
    return (1 - label_smoothing) * dpo_loss(margins) + label_smoothing * dpo_loss(-margins)


def robust_dpo_loss(margins: Tensor, label_smoothing: float) -> Tensor:
    """Compute a DPO loss (B,) that is unbiased when labels are flipped with probability e; it may be < 0.

        ((1 - e) l(h) - e l(-h)) / (1 - 2 e),   l = dpo_loss

    Raises ValueError unless 0 <= e < 0.5. Source: Chowdhury et al. 2024 (rDPO).
    """
    _require_label_smoothing(label_smoothing)
    correct = (1 - label_smoothing) * dpo_loss(margins)
    return (correct - label_smoothing * dpo_loss(-margins)) / (1 - 2 * label_smoothing)


def _require_label_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is the rate of wrong labels and must be in [0, 0.5), got {label_smoothing}"
        )


def hinge_loss(margins: Tensor) -> Tensor:
    """Compute the hinge loss (B,): the amount by which the margin falls short of 1.

        max(0, 1 - h)

    Source: Zhao et al. 2023 (SLiC-HF), with the reference's log-probabilities as in Liu et al. 2023 (RSO).
    """
    return F.relu(1 - margins)


def ipo_loss(margins: Tensor, beta: float) -> Tensor:
    """Compute the squared distance (B,) of the log-ratio difference from 1 / (2 beta), a finite optimum.

        (h / beta - 1 / (2 beta))^2

    `beta` is that of the margin (tau in the paper). Margins of mean log-ratios give the length-averaged form.
    Source: Azar et al. 2023, eq. 17.
    """
    return (margins / beta - 1 / (2 * beta)) ** 2


# --- losses of the two log-ratios -------------------------------------------------------------------------


def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute the APO-zero loss (B,) in [0, 2]: raise the chosen, lower the rejected response.

        sigmoid(-r_w) + sigmoid(r_l),   r = beta logratio

    For chosen responses better than the policy's own. The paper's loss + 1.
    Source: D'Oosterlinck et al. 2024 (APO), eq. 7.
    """
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


def apo_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute the APO-down loss (B,) in [0, 2]: lower the chosen response, and the rejected one more.

        sigmoid(r_w) + sigmoid(-(r_w - r_l)),   r = beta logratio

    For chosen responses worse than the policy's own. The paper's loss + 1.
    Source: D'Oosterlinck et al. 2024 (APO), eq. 8.
    """
    differences = chosen_logratios - rejected_logratios
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * differences)


def sppo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute the squared distance (B,) of both log-ratios from those of a self-play step, win rates 1 and 0.

        (logratio_w - 1 / (2 beta))^2 + (logratio_l + 1 / (2 beta))^2

    The step size of the paper is 1 / beta. Source: Wu et al. 2024 (SPPO), eq. 4.7, P = 1 and 0.
    """
    target = 1 / (2 * beta)
    return (chosen_logratios - target) ** 2 + (rejected_logratios + target) ** 2


# --- losses without a reference ---------------------------------------------------------------------------


def simpo_loss(
    chosen_mean_logprobs: Tensor, rejected_mean_logprobs: Tensor, beta: float, target_margin: float
) -> Tensor:
    """Compute the Bradley-Terry loss (B,) of length-averaged log-probabilities with a target margin.

        -log sigmoid(beta (m_w - m_l) - target_margin),   m = mean log-probability of a token

    Source: Meng et al. 2024 (SimPO), eq. 6 (target_margin is gamma, not gamma / beta).
    """
    return dpo_loss(beta * (chosen_mean_logprobs - rejected_mean_logprobs) - target_margin)


def orpo_loss(chosen_mean_logprobs: Tensor, rejected_mean_logprobs: Tensor, odds_coef: float) -> Tensor:
    """Compute the SFT loss of the chosen response plus a loss of the log odds ratio, (B,).

        -m_w + odds_coef * -log sigmoid(log odds_w - log odds_l)
        odds = p / (1 - p),   p = exp(m),   m = mean log-probability of a token, <= 0

    The odds of p = 1 are infinite: m above -eps of its dtype is clamped and has no gradient through them.
    Source: Hong et al. 2024 (ORPO), eq. 6 and 7.
    """
    log_odds_ratios = _log_odds(chosen_mean_logprobs) - _log_odds(rejected_mean_logprobs)
    return -chosen_mean_logprobs + odds_coef * dpo_loss(log_odds_ratios)


def _log_odds(logprobs: Tensor) -> Tensor:
    """Compute log p - log(1 - p); expm1 keeps 1 - p exact where p is near 1."""
    clamped = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    return clamped - (-torch.expm1(clamped)).log()


# --- single responses -------------------------------------------------------------------------------------


def kto_loss(
    logratios: Tensor,
    desirable_mask: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Compute the lost utility (B,), in [0, weight], of single responses labelled desirable or undesirable.

        desirable     desirable_weight   (1 - sigmoid(beta (logratio - kl)))
        undesirable   undesirable_weight (1 - sigmoid(beta (kl - logratio)))

    Source: Ethayarajh et al. 2024 (KTO), section 4.

    Args:
        logratios: (B,), in nats.
        desirable_mask: (B,) bool.
        kl: scalar >= 0, the reference point z0: an estimate of KL(pi || pi_ref) over the batch, used without gradient.
        beta: strength of the penalty.
        desirable_weight, undesirable_weight: weights of the two kinds.
    """
    rewards = beta * (logratios - kl.detach())
    desirable = desirable_weight * torch.sigmoid(-rewards)
    return torch.where(desirable_mask, desirable, undesirable_weight * torch.sigmoid(rewards))


# --- weights of pairs and of tokens -----------------------------------------------------------------------


def dr_dpo_loss(losses: Tensor, beta_prime: float) -> Tensor:
    """Compute the soft minimum of a batch's losses, a scalar, which down-weights pairs of large loss.

        -beta' log mean_i exp(-l_i / beta')

    beta' > 0, in the losses' unit: large gives their mean, small their minimum; at 1, with DPO's losses, it
    is -log mean sigmoid(h). It is not a mean over micro-batches (see dr_dpo_weights).
    Source: Wu et al. 2024 (Dr. DPO, "Towards Robust Alignment of Language Models").
    """
    return -beta_prime * (torch.logsumexp(-losses / beta_prime, dim=0) - math.log(len(losses)))


def dr_dpo_weights(losses: Tensor, beta_prime: float, log_normaliser: Tensor | None = None) -> Tensor:
    """Compute the weights (B,) of the pairs' gradients in the gradient of `dr_dpo_loss`, detached.

        w_i = exp(-l_i / beta') / sum_j exp(-l_j / beta')

    `log_normaliser`, a scalar, is logsumexp(-l / beta') over a larger batch, such as all micro-batches of a
    step; the weights then sum to 1 over that batch, and the sum of w_i l_i has the gradient of its loss.
    Source: the derivative of the equation above.
    """
    scaled = -losses.detach() / beta_prime
    return torch.softmax(scaled, dim=0) if log_normaliser is None else (scaled - log_normaliser).exp()


def token_weighted_sum(logprobs: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Compute the weighted log-probability (B,) of each response: sum of weights * logprobs where mask is True.

    All (B, R). Give policy and reference the same weights: 1 on relevant tokens, gamma on the others.
    Masked entries, also inf or nan, affect neither the sum nor a gradient.
    Source: Banerjee et al. 2024 (DPO against hallucinated prior exams in radiology reports), eq. 2 and 3.
    """
    return (torch.where(mask, logprobs, 0) * torch.where(mask, weights, 0)).sum(dim=1)
