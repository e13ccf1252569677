"""Update policy and critic by PPO: a few epochs of minibatches over a batch of rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from drpo.config import Section, setting
from drpo.engine import Engine
from drpo.losses import ppo_policy_loss, ppo_value_loss
from drpo.rollout.trajectory import Trajectory
from drpo.tensors import masked_sum
from drpo.trainers.credit import Credit

MINIBATCH_STREAM = 3  # separates the order of minibatches from other random numbers


@dataclass(frozen=True)
class PPOConfig(Section):
    """Settings of the optimisation of the clipped objective."""

    num_epochs: int = setting(4, ge=1)
    """Passes over each batch of rollouts."""
    num_minibatches: int = setting(1, ge=1)
    """Optimizer steps per pass: the batch is cut into this many minibatches."""
    microbatch_size: int = setting(4, ge=1)
    """Rows per forward on one device; changes memory and speed, not the result."""
    clip_range: float = setting(0.2, gt=0)
    """Clipping of the probability ratio."""
    value_clip_range: float = setting(0.2, gt=0)
    """Clipping of the value around the rollout's value."""
    value_coef: float = setting(0.1, ge=0)
    """Weight of the value loss."""
    entropy_coef: float = setting(0.0, ge=0)
    """Weight of the entropy bonus."""
    target_kl: float | None = setting(None, gt=0)
    """Stop the update early when a minibatch's KL between old and new policy (k3, nats per token) is above this."""


def ppo_update(
    engine: Engine,
    model: nn.Module,
    trajectory: Trajectory,
    credit: Credit,
    config: PPOConfig,
    train_policy: bool,
    draw: tuple[int, int],
    check_finite: Callable[[Tensor, str], None],
) -> dict[str, float]:
    """Optimise the actor-critic on a whole batch, each process computing its share of the rows.

        loss = sum_policy_tokens(clipped policy loss - entropy_coef * entropy) / N_policy
               + value_coef * sum_value_tokens(clipped value loss) / N_value

    N counts the tokens of the whole minibatch over all micro-batches and processes, so the result does not depend on
    how the minibatch is cut. Without a critic the second term is missing. Takes num_epochs * num_minibatches optimizer
    steps, fewer when `target_kl` ends it. Returns the statistics of `_losses`, token means averaged over the
    minibatches, and `grad_norm` (mean, before clipping) and `num_optimizer_steps`.

    Args:
        engine: divides the rows, accumulates gradients, takes the steps.
        model: the prepared actor-critic.
        trajectory: B rollouts, the same on every process.
        credit: their advantages, returns and masks, (B, R).
        config: settings of the update.
        train_policy: False trains the critic alone.
        draw: seed and step, which determine the order of the minibatches.
        check_finite: called with a tensor and its name, raises on inf or nan.
    """
    totals: Counter[str] = Counter()
    grad_norms: list[float] = []
    for indices in _minibatches(len(trajectory.scores), config, *draw):
        counts = (credit.policy_mask[indices].sum(), credit.value_mask[indices].sum())
        local = indices[engine.shard(len(indices))].to(trajectory.scores.device)
        parts = local.split(config.microbatch_size)
        row_losses, sums = [], None
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with engine.accumulating(last):
                losses, statistics = _losses(model, trajectory, credit, part, counts, config, train_policy)
                engine.backward(losses.sum() * engine.loss_scale(), last)
            row_losses.append(losses.detach())
            values = torch.stack(list(statistics.values())).double()
            sums = values if sums is None else sums + values
        # At their rows of the whole batch, 0 elsewhere, so that an error names the right rollout.
        placed_losses = losses.new_zeros(len(trajectory.scores)).index_copy(0, local, torch.cat(row_losses))
        check_finite(placed_losses, "the loss")
        grad_norms.append(engine.optimizer_step())
        check_finite(torch.tensor([grad_norms[-1]], device=local.device), "the gradient norm")
        means = dict(zip(statistics, engine.sum(sums).tolist(), strict=True))
        totals.update(means)
        if config.target_kl is not None and means["approx_kl"] > config.target_kl:
            break
    return {name: total / len(grad_norms) for name, total in totals.items()} | {
        "grad_norm": float(np.mean(grad_norms)),
        "num_optimizer_steps": float(len(grad_norms)),
    }


def _losses(
    model: nn.Module,
    trajectory: Trajectory,
    credit: Credit,
    indices: Tensor,
    counts: tuple[Tensor, Tensor],
    config: PPOConfig,
    train_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of the rows at `indices`, and their share of the minibatch's statistics.

    `counts` are the policy tokens and value tokens of the whole minibatch.
    """
    num_policy, num_value = counts
    batch = trajectory.batch.select(indices)
    policy_mask, value_mask = credit.policy_mask[indices], credit.value_mask[indices]
    trunk = None if trajectory.trunk is None else trajectory.trunk[indices]
    logprobs, entropy, values = model(
        batch.queries, batch.query_mask, batch.responses, batch.response_mask, trunk
    )
    old_logprobs = trajectory.logprobs[indices]
    policy = ppo_policy_loss(logprobs, old_logprobs, credit.advantages[indices], config.clip_range)
    policy_loss = masked_sum(policy.loss, policy_mask, dim=1) / num_policy
    bonus = masked_sum(entropy, policy_mask, dim=1) / num_policy
    statistics = {"policy_loss": policy_loss.sum(), "entropy": bonus.sum()}
    terms = []
    if values is not None:
        value = ppo_value_loss(
            values, trajectory.values[indices], credit.returns[indices], config.value_clip_range
        )
        value_loss = masked_sum(value.loss, value_mask, dim=1) / num_value
        statistics["value_loss"] = value_loss.sum()
        statistics["value_clip_fraction"] = masked_sum(value.clipped.float(), value_mask) / num_value
        terms.append(config.value_coef * value_loss)
    # All weights must be in every process's graph, so an untrained policy stays in it with a zero gradient.
    terms.append(policy_loss if train_policy else 0.0 * policy_loss)
    if train_policy and config.entropy_coef:  # at 0 its gradient, a softmax over the vocabulary, is skipped
        terms.append(-config.entropy_coef * bonus)
    with torch.no_grad():
        log_ratio = logprobs.detach() - old_logprobs
        kl = torch.expm1(log_ratio) - log_ratio
        statistics["approx_kl"] = masked_sum(kl, policy_mask) / num_policy
        statistics["clip_fraction"] = masked_sum(policy.clipped.float(), policy_mask) / num_policy
        statistics["ratio"] = masked_sum(policy.ratio, policy_mask) / num_policy
    return sum(terms[1:], terms[0]), {name: value.detach() for name, value in statistics.items()}


def _minibatches(num_rows: int, config: PPOConfig, seed: int, step: int) -> Iterator[Tensor]:
    """Yield the row indices of each minibatch, in an order that depends on (seed, step, epoch) alone."""
    for epoch in range(config.num_epochs):
        order = np.random.default_rng([seed, MINIBATCH_STREAM, step, epoch]).permutation(num_rows)
        yield from torch.from_numpy(order).tensor_split(config.num_minibatches)
