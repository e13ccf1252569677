"""Summarise a batch of rollouts as metrics. Every key is explained in docs/algorithms/drpo.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drpo.kl import kl_per_token, sequence_kl
from drpo.rollout.trajectory import Continuations, Trajectory
from drpo.tensors import explained_variance, masked_mean, masked_var
from drpo.trainers.credit import Credit

SHOWN = (
    "objective/score",
    "objective/kl_k3",
    "objective/kl_k3_per_token",
    "objective/ended",
    "objective/length",
    "ppo/value_loss",
    "eval/score",
    "eval/kl",
    "eval/log_ratio",
    "eval/length",
    "time/step",
)

PREFIX_BINS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
"""Bins of the prefix fraction h / L, each (low, high]."""


def online_metrics(trajectory: Trajectory, credit: Credit, kl_coef: float) -> dict[str, float]:
    """Compute scalars of a whole batch (the rows of all processes), before the update."""
    mask = trajectory.action_mask
    sampled = (trajectory.logprobs, trajectory.ref_logprobs, mask)
    kl_in_reward = credit.kl.sum(dim=1)
    row_metrics = {
        "score": trajectory.scores,
        "shaped_score": credit.scores,
        "kl_k1": sequence_kl(*sampled, "k1"),
        "kl_k3": sequence_kl(*sampled, "k3"),
        "total": credit.scores - kl_coef * kl_in_reward,
        "length": trajectory.lengths.float(),
        "sampled_length": mask.sum(dim=1).float(),
        "ended": trajectory.ended.float(),
    }
    metrics = {f"objective/{name}": float(values.mean()) for name, values in row_metrics.items()}
    metrics["objective/score_std"] = float(trajectory.scores.std(correction=0))
    metrics["objective/sampled_tokens"] = float(mask.sum())
    metrics["objective/length_max"] = float(trajectory.lengths.max())
    for estimator in ("k1", "k3"):
        metrics[f"objective/kl_{estimator}_per_token"] = float(kl_per_token(*sampled, estimator))
    metrics["objective/kl_coef"] = kl_coef
    metrics["objective/entropy"] = float(masked_mean(trajectory.entropy, mask))
    metrics |= _by_start(trajectory, row_metrics)
    if trajectory.reward_details is not None:
        means = trajectory.reward_details.mean(dim=0).tolist()
        metrics |= {f"reward/{name}": mean for name, mean in zip(trajectory.reward_names, means, strict=True)}
    if trajectory.values is not None:
        metrics |= _of_the_critic(trajectory, credit)
    if trajectory.engine_logprobs is not None:
        metrics |= _of_the_rollout_engine(trajectory)
    if credit.continuation_scores is not None:
        metrics |= _of_the_states(trajectory.continuations, credit.continuation_scores)
    return metrics


def _of_the_states(continuations: Continuations, scores: Tensor) -> dict[str, float]:
    """Summarise the Monte-Carlo values of states: their mean, their mean standard error, and what they cost."""
    of_states = scores[continuations.mask]
    metrics = {
        "vine/num_states": float(len(of_states)),
        "vine/sampled_tokens": float(continuations.num_sampled.sum()),
        "vine/value_mean": float(of_states.mean()),
    }
    if (num_rollouts := of_states.shape[1]) > 1:  # one continuation has no spread
        metrics["vine/value_std_error"] = float((of_states.std(dim=1) / math.sqrt(num_rollouts)).mean())
    return metrics


def _of_the_rollout_engine(trajectory: Trajectory) -> dict[str, float]:
    """Compare the log-probs of the engine that sampled with the trainer's, over the sampled tokens."""
    mask = trajectory.action_mask
    differences = (trajectory.logprobs - trajectory.engine_logprobs)[mask]
    ratios, distances = differences.exp(), differences.abs()
    return {
        "rollout/logprob_difference": float(distances.mean()),
        "rollout/logprob_difference_max": float(distances.max()),
        "rollout/importance_ratio": float(ratios.mean()),
        "rollout/importance_ratio_min": float(ratios.min()),
        "rollout/importance_ratio_max": float(ratios.max()),
    }


def _of_the_critic(trajectory: Trajectory, credit: Credit) -> dict[str, float]:
    """Compare the critic's values with the returns."""
    metrics = {}
    explained = float(explained_variance(trajectory.values, credit.returns, credit.value_mask))
    if math.isfinite(explained):  # undefined where all returns are equal
        metrics["value/explained_variance"] = explained
    metrics["value/mean"] = float(masked_mean(trajectory.values, credit.value_mask))
    metrics["value/return_mean"] = float(masked_mean(credit.returns, credit.value_mask))
    metrics["value/return_std"] = float(masked_var(credit.returns, credit.value_mask).sqrt())
    return metrics


def _by_start(trajectory: Trajectory, row_metrics: dict[str, Tensor]) -> dict[str, float]:
    """Compute the means for rollouts from the prompt, from resets, and by the share of the response forced."""
    is_reset = trajectory.is_reset
    fraction = trajectory.reset_lengths / trajectory.source_lengths.clamp(min=1)
    groups = {"from_prompt": is_reset.logical_not(), "from_reset": is_reset}
    for low, high in PREFIX_BINS:
        groups[f"prefix_{low:g}_{high:g}"] = is_reset & (fraction > low) & (fraction <= high)
    metrics = {"reset/share": float(is_reset.float().mean())}
    if bool(is_reset.any()):
        metrics["reset/prefix_length"] = float(trajectory.reset_lengths[is_reset].float().mean())
        metrics["reset/prefix_fraction"] = float(fraction[is_reset].mean())
        if trajectory.source_scores is not None:
            metrics["reset/source_score"] = float(trajectory.source_scores[is_reset].mean())
    for group, members in groups.items():
        if not bool(members.any()):
            continue  # a group without rollouts has no mean; its keys are absent in this step
        for name in ("score", "sampled_length", "kl_k1", "kl_k3", "ended"):
            metrics[f"{group}/{name}"] = float(torch.mean(row_metrics[name][members]))
        tokens = row_metrics["sampled_length"][members].sum()
        metrics[f"{group}/kl_k3_per_token"] = float(row_metrics["kl_k3"][members].sum() / tokens)
    return metrics
