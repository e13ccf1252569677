"""KL to the reference policy: estimates per token and per response, and the coefficient that controls it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from drpo.tensors import masked_sum

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """Estimate KL(policy || reference) per token, (B, R), in nats, from tokens that the policy sampled.

    With d = logprobs - ref_logprobs:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d.
    k1 and k3 are unbiased, k2 and k3 never negative. None of them estimates a KL on tokens that the policy
    did not sample. Raises ValueError on another estimator.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return 0.5 * log_ratio**2
        case "k3":
            return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}; choose k1, k2 or k3")


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Estimate KL(policy || reference) over each response, (B,), in nats: the masked sum of `kl_estimate`.

    `mask` (B, R) bool covers the tokens that the policy sampled; other tokens have no effect. The mean over responses
    is unbiased for k1 and k3 if they were sampled from the distribution of `logprobs`. k3 is never negative and varies
    less near the reference; far from it exp(-d) has heavy tails, and k1 is safer.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    return masked_sum(kl_estimate(logprobs, ref_logprobs, estimator), mask, dim=1)


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Estimator) -> Tensor:
    """Return the mean KL to the reference over all tokens that the policy sampled, in nats: a scalar.

        sum over rows and sampled tokens of KL_t / number of those tokens

    Forced tokens are in neither sum, so the same policy has the same KL with and without resets. The sum over an
    episode has not this property: a reset leaves fewer tokens to sum over.
    """
    return sequence_kl(logprobs, ref_logprobs, mask, estimator).sum() / mask.sum()


class FixedKL:
    """A constant KL coefficient, without state; a negative one raises ValueError."""

    def __init__(self, coef: float) -> None:
        if not coef >= 0:
            raise ValueError(f"a KL coefficient must be >= 0, got {coef}")
        self.coef = coef

    def update(self, kl: float, num_episodes: int) -> None:
        """Do nothing; both coefficients share this interface."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the coefficient comes from the recipe."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if the saved run adapted its coefficient."""
        if state:
            raise ValueError(
                f"the KL coefficient is fixed at {self.coef}, but the saved run adapted its own: {state}"
            )


class AdaptiveKL:
    """An adaptive KL coefficient, which steers the measured KL (nats per sampled token) to a target.

        error = clip(kl / target - 1, -0.2, 0.2);   coef <- coef (1 + error * num_episodes / horizon)

    Update it with the KL of sampled tokens only, never of forced ones. Per token, not per episode as in
    the source: episodes from resets have fewer sampled tokens than those from the prompt. The coefficient stays
    positive while num_episodes < 5 * horizon.
    Raises ValueError when an argument is not positive. Source: Ziegler et al. 2019, section 2.2.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        for name, value in (("coef", coef), ("target", target), ("horizon", horizon)):
            if not value > 0:
                raise ValueError(f"adaptive KL needs {name} > 0, got {value}")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_episodes: int) -> None:
        """Update the coefficient after `num_episodes` of mean KL `kl`; raise ValueError if that is not finite."""
        if not math.isfinite(kl):
            raise ValueError(f"the measured KL is {kl}; the policy's log-probabilities are broken")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_episodes / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """Return the current coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved coefficient; raise KeyError if the saved run had a fixed one."""
        self.coef = state["coef"]
