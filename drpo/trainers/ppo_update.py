"""One PPO update: a few epochs of minibatches over a batch of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from drpo.engine import Engine
from drpo.losses import ppo_policy_loss, ppo_value_loss
from drpo.rollout.trajectory import Trajectory
from drpo.tensors import masked_sum
from drpo.trainers.credit import Credit

MINIBATCH_STREAM = 3  # keeps the order of minibatches apart from other random numbers

STATISTICS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "value_clip_fraction",
    "ratio",
)


@dataclass(frozen=True)
class PPOConfig:
    """How the clipped objective is optimised."""

    num_epochs: int = 4
    """Passes over each batch of rollouts."""
    num_minibatches: int = 1
    """Optimizer steps per pass: the batch is cut into this many minibatches."""
    microbatch_size: int = 4
    """Rows per forward on one device; changes memory and speed, not the result."""
    clip_range: float = 0.2
    """Clipping of the probability ratio."""
    value_clip_range: float = 0.2
    """Clipping of the value around the rollout's value."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    target_kl: float | None = None
    """Leave the update early when a minibatch's KL between old and new policy (k3, nats per token) is above this."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_minibatches", "microbatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"ppo.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("clip_range", "value_clip_range"):
            if getattr(self, name) <= 0:
                raise ValueError(f"ppo.{name} must be > 0, got {getattr(self, name)}")
        for name in ("value_coef", "entropy_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"ppo.{name} must be >= 0, got {getattr(self, name)}")
        if self.target_kl is not None and self.target_kl <= 0:
            raise ValueError(f"ppo.target_kl must be > 0 or null, got {self.target_kl}")


def ppo_update(
    engine: Engine,
    model: nn.Module,
    trajectory: Trajectory,
    credit: Credit,
    config: PPOConfig,
    *,
    train_policy: bool,
    seed: int,
    step: int,
    check_finite: Callable[[Tensor, str], None],
) -> dict[str, float]:
    """Optimise the actor-critic on a batch that every process holds whole; each computes its share of the rows.

        loss = sum_policy_tokens(clipped policy loss - entropy_coef * entropy) / N_policy
               + value_coef * sum_value_tokens(clipped value loss) / N_value

    N counts the tokens of the whole minibatch over all micro-batches and processes, so the result does not
    depend on how the minibatch is cut. Takes num_epochs * num_minibatches optimizer steps, fewer when
    `target_kl` ends it. Returns the statistics of STATISTICS, each a token mean per minibatch, averaged
    over the minibatches, and `grad_norm` (mean, before clipping) and `num_optimizer_steps`.
    """
    totals = torch.zeros(len(STATISTICS), dtype=torch.float64)
    grad_norms: list[float] = []
    for rows in _minibatches(len(trajectory.scores), config, seed, step):
        num_policy = credit.policy_mask[rows].sum()
        num_value = credit.value_mask[rows].sum()
        local = rows[engine.shard(len(rows))].to(trajectory.scores.device)
        sums = torch.zeros(len(STATISTICS), dtype=torch.float64, device=local.device)
        microbatches = local.split(config.microbatch_size)
        row_losses = []
        for index, part in enumerate(microbatches):
            last = index == len(microbatches) - 1
            batch = trajectory.batch.select(part)
            policy_mask, value_mask = credit.policy_mask[part], credit.value_mask[part]
            with engine.accumulating(last):
                logprobs, entropy, values = model(
                    batch.queries,
                    batch.query_mask,
                    batch.responses,
                    batch.response_mask,
                    None if trajectory.trunk is None else trajectory.trunk[part],
                )
                policy = ppo_policy_loss(
                    logprobs, trajectory.logprobs[part], credit.advantages[part], config.clip_range
                )
                value = ppo_value_loss(
                    values, trajectory.values[part], credit.returns[part], config.value_clip_range
                )
                policy_loss = masked_sum(policy.loss, policy_mask, dim=1) / num_policy
                value_loss = masked_sum(value.loss, value_mask, dim=1) / num_value
                bonus = masked_sum(entropy, policy_mask, dim=1) / num_policy
                rows_loss = config.value_coef * value_loss
                if train_policy:
                    rows_loss = rows_loss + policy_loss
                    if config.entropy_coef:  # else its gradient, a softmax over the vocabulary, is spared
                        rows_loss = rows_loss - config.entropy_coef * bonus
                else:  # keep the policy in the graph with a zero gradient: every process must see all weights
                    rows_loss = rows_loss + 0.0 * policy_loss
                engine.backward(rows_loss.sum() * engine.loss_scale(), last)
            row_losses.append(rows_loss.detach())
            with torch.no_grad():
                log_ratio = logprobs.detach() - trajectory.logprobs[part]
                kl = torch.expm1(log_ratio) - log_ratio
                sums += torch.stack(
                    [
                        policy_loss.sum(),
                        value_loss.sum(),
                        bonus.sum(),
                        masked_sum(kl, policy_mask) / num_policy,
                        masked_sum(policy.clipped.float(), policy_mask) / num_policy,
                        masked_sum(value.clipped.float(), value_mask) / num_value,
                        masked_sum(policy.ratio, policy_mask) / num_policy,
                    ]
                ).double()
        check_finite(_at_rows(torch.cat(row_losses), local, len(trajectory.scores)), "the loss")
        grad_norms.append(engine.optimizer_step())
        check_finite(torch.tensor([grad_norms[-1]], device=local.device), "the gradient norm")
        sums = engine.sum(sums).cpu()
        totals += sums
        if config.target_kl is not None and sums[STATISTICS.index("approx_kl")] > config.target_kl:
            break
    means = dict(zip(STATISTICS, (totals / len(grad_norms)).tolist(), strict=True))
    return means | {
        "grad_norm": float(np.mean(grad_norms)),
        "num_optimizer_steps": float(len(grad_norms)),
    }


def _minibatches(num_rows: int, config: PPOConfig, seed: int, step: int) -> Iterator[Tensor]:
    """Row indices of each minibatch, in an order that depends on (seed, step, epoch) alone."""
    for epoch in range(config.num_epochs):
        order = np.random.default_rng([seed, MINIBATCH_STREAM, step, epoch]).permutation(num_rows)
        yield from torch.from_numpy(order).tensor_split(config.num_minibatches)


def _at_rows(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The values at their rows of the whole batch, 0 elsewhere: so an error names a rollout of the step."""
    return values.new_zeros(num_rows).index_copy(0, rows, values)
