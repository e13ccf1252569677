"""Update policy and critic by PPO: a few epochs of minibatches over a batch of rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from drpo.config import Section, key, refuse_changed, setting
from drpo.engine import Engine
from drpo.losses import (
    Normalisation,
    PolicyTerms,
    importance_weights,
    policy_divisors,
    ppo_policy_loss,
    ppo_value_loss,
)
from drpo.microbatches import microbatches, sharing_saves
from drpo.random_streams import Stream, stream
from drpo.rollout.trajectory import Microbatch, Rollouts, Trajectory
from drpo.tensors import masked_sum
from drpo.trainers.credit import Credit


@dataclass(frozen=True)
class PPOConfig(Section):
    """Settings of the optimisation of the clipped objective."""

    num_epochs: int = setting(4, ge=1)
    """Passes over each batch of rollouts."""
    num_minibatches: int = setting(1, ge=1)
    """Optimizer steps per pass: the batch is cut into this many minibatches."""
    microbatch_size: int = setting(4, ge=1)
    """Rows per forward on one device; changes memory and speed, not the result. Rows of like length go together."""
    microbatch_tokens: int | None = setting(None, ge=1)
    """Tokens per forward on one device, padding included, in place of microbatch_size rows; a longer row goes alone."""
    share_prompts: bool = True
    """Keep the rollouts of a prompt (rollout.rollouts_per_prompt) in one minibatch, and compute its tokens once for all
    of them, where the models can, they fit into a micro-batch and it saves work."""
    clip_range: float = setting(0.2, gt=0, lt=1)
    """Clipping of the probability ratio, to [1 - clip_range, 1 + clip_range]. For no clipping in effect: 0.99 here, and
    a large clip_range_high."""
    clip_range_high: float | None = setting(None, gt=0)
    """Clipping above 1, to 1 + clip_range_high (DAPO: 0.28); null takes clip_range."""
    dual_clip: float | None = setting(None, gt=1)
    """Bound of the ratio of tokens with negative advantage, whose loss is at most -dual_clip A; null for no bound."""
    loss_normalisation: Normalisation = "token"
    """What the summed policy loss of a minibatch, entropy bonus included, is divided by. token: its tokens. sequence:
    each rollout's tokens, then the rollouts. constant: rollouts times rollout.max_response_length."""
    value_clip_range: float = setting(0.2, gt=0)
    """Clipping of the value around the rollout's value."""
    value_coef: float = setting(0.1, ge=0)
    """Weight of the value loss."""
    entropy_coef: float = setting(0.0, ge=0)
    """Weight of the entropy bonus."""
    target_kl: float | None = setting(None, gt=0)
    """Stop the update early when a minibatch's KL between old and new policy (k3, nats per token) is above this."""
    importance_sampling: Literal["none", "token", "sequence"] = "none"
    """Weigh the policy loss of each token by the policy's probability over the rollout engine's, of the token or of the
    whole response, at most importance_cap; for rollout.engine=vllm."""
    importance_cap: float = setting(2.0, ge=1)
    """Largest weight of importance_sampling."""

    def check(self) -> None:
        if self.importance_sampling == "none":
            refuse_changed(self, ("importance_cap",), f"does not apply to {key('importance_sampling')}=none")


@dataclass(frozen=True)
class UpdateSettings:
    """Settings of one update, from all sections of the recipe that it follows."""

    ppo: PPOConfig
    max_response_length: int
    """Longest response that a rollout may have."""
    sft_coef: float = 0.0
    """Weight of the loss on forced tokens (ResetConfig)."""
    train_policy: bool = True
    """False trains the critic alone."""


def minibatches(
    rollouts: Rollouts, config: PPOConfig, world_size: int, draw: tuple[int, int]
) -> Iterator[list[Microbatch]]:
    """Yield the micro-batches of each minibatch, epoch after epoch; number i is for process i % world_size.

    The minibatches depend on `draw`, the seed and the step, alone; how they are cut, on the lengths of all rows too.
    """
    lengths = rollouts.row_lengths()
    minibatch_size = len(lengths) // config.num_minibatches
    together = 1 if minibatch_size % rollouts.rollouts_together else rollouts.rollouts_together
    fits = config.microbatch_tokens is not None or together <= config.microbatch_size
    divides = minibatch_size % (together * world_size) == 0
    num_continuations = together if fits and divides and sharing_saves(lengths, together) else 1
    max_groups = None if config.microbatch_tokens else config.microbatch_size // num_continuations
    prompts = np.arange(len(lengths)).reshape(-1, together)

    def microbatch(rows: np.ndarray) -> Microbatch:
        query_length, response_length = np.max([lengths[row] for row in rows], axis=0).tolist()
        indices = torch.from_numpy(rows).to(rollouts.scores.device)
        return Microbatch(indices, query_length, response_length, num_continuations)

    for epoch in range(config.num_epochs):
        order = stream(draw[0], Stream.MINIBATCHES, draw[1], epoch).permutation(len(prompts))
        for indices in np.array_split(order, config.num_minibatches):
            groups = prompts[indices].reshape(-1, num_continuations)
            group_lengths = [
                (lengths[group[0]][0], sum(lengths[row][1] for row in group)) for group in groups
            ]
            parts = microbatches(group_lengths, max_groups, config.microbatch_tokens, world_size)
            yield [microbatch(groups[part].T.ravel()) for part in parts]


def ppo_update(
    engine: Engine,
    model: nn.Module,
    trajectory: Trajectory,
    credit: Credit,
    settings: UpdateSettings,
    draw: tuple[int, int],
    check_finite: Callable[[Tensor, str], None],
) -> dict[str, float]:
    """Optimise the actor-critic on a whole batch, each process computing its share of the rows.

        loss = sum_policy_tokens(clipped policy loss - entropy_coef * entropy) / N_policy
               + value_coef * sum_value_tokens(clipped value loss) / N_value
               + sft_coef * sum_forced_tokens(-log pi) / N_forced

    N counts the tokens of the whole minibatch over all micro-batches and processes, so the result does not depend on
    how the minibatch is cut. With another `loss_normalisation` than token, N_policy is what `policy_divisors` gives.
    Without a critic the second term is missing, where no token is forced the third; with `importance_sampling` the
    clipped policy loss of a token is multiplied by its weight (`importance_weights`). Takes num_epochs *
    num_minibatches optimizer steps, fewer when `target_kl` ends it. Returns the statistics of `_losses`, token means
    averaged over the minibatches that have them, and `grad_norm` (mean, before clipping) and `num_optimizer_steps`.

    Args:
        engine: divides the rows, accumulates gradients, takes the steps.
        model: the prepared actor-critic.
        trajectory: B rollouts, the same on every process.
        credit: their advantages, returns and masks, (B, R).
        settings: settings of the update.
        draw: seed and step, which determine the order of the minibatches.
        check_finite: called with a tensor and its name, raises on inf or nan.
    """
    config = settings.ppo
    totals: Counter[str] = Counter()
    num_minibatches: Counter[str] = Counter()
    forced_mask = trajectory.forced_mask if settings.sft_coef else None
    grad_norms: list[float] = []
    for parts in minibatches(trajectory, config, engine.world_size, draw):
        rows = torch.cat([part.rows for part in parts])
        num_forced = 0 if forced_mask is None else int(forced_mask[rows].sum())
        counts = Counts(credit.policy_mask[rows].sum(), credit.value_mask[rows].sum(), num_forced, len(rows))
        local = parts[engine.rank :: engine.world_size]
        row_losses, sums = [], None
        for index, part in enumerate(local):
            last = index == len(local) - 1
            with engine.accumulating(last):
                losses, statistics = _losses(model, trajectory, credit, part, counts, settings)
                engine.backward(losses.sum() * engine.loss_scale(), last)
            row_losses.append(losses.detach())
            values = torch.stack(list(statistics.values())).double()
            sums = values if sums is None else sums + values
        # At their rows of the whole batch, 0 elsewhere, so that an error names the right rollout.
        own_rows = torch.cat([part.rows for part in local])
        placed_losses = losses.new_zeros(len(trajectory.scores)).index_copy(
            0, own_rows, torch.cat(row_losses)
        )
        check_finite(placed_losses, "the loss")
        grad_norms.append(engine.optimizer_step())
        check_finite(torch.tensor([grad_norms[-1]], device=engine.device), "the gradient norm")
        means = dict(zip(statistics, engine.sum(sums).tolist(), strict=True))
        totals.update(means)
        num_minibatches.update(means.keys())
        if config.target_kl is not None and means["approx_kl"] > config.target_kl:
            break
    return {name: total / num_minibatches[name] for name, total in totals.items()} | {
        "grad_norm": float(np.mean(grad_norms)),
        "num_optimizer_steps": float(len(grad_norms)),
    }


class Counts(NamedTuple):
    """Sizes of a whole minibatch, over micro-batches and processes."""

    policy_tokens: Tensor
    value_tokens: Tensor
    forced_tokens: int
    "0 also where they are not trained on."
    rollouts: int


def _losses(
    model: nn.Module,
    trajectory: Trajectory,
    credit: Credit,
    part: Microbatch,
    counts: Counts,
    settings: UpdateSettings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each row of a micro-batch, and their share of the minibatch's statistics."""
    config, num_policy, num_value = settings.ppo, counts.policy_tokens, counts.value_tokens
    batch, trunk = trajectory.select(part)
    policy_mask, value_mask = part.responses(credit.policy_mask), part.responses(credit.value_mask)
    logprobs, entropy, values = model(
        *(batch.queries, batch.query_mask, batch.responses, batch.response_mask),
        trunk,
        part.num_continuations,
    )
    old_logprobs = part.responses(trajectory.logprobs)
    policy = ppo_policy_loss(
        logprobs,
        old_logprobs,
        part.responses(credit.advantages),
        config.clip_range,
        config.clip_range_high,
        config.dual_clip,
    )
    token_losses, weights = policy.loss, None
    if config.importance_sampling != "none":
        weights = importance_weights(
            old_logprobs,
            part.responses(trajectory.engine_logprobs),
            policy_mask,
            config.importance_sampling,
            config.importance_cap,
        )
        token_losses = weights * token_losses
    divisors = policy_divisors(
        policy_mask, config.loss_normalisation, num_policy, counts.rollouts, settings.max_response_length
    )
    policy_loss = masked_sum(token_losses, policy_mask, dim=1) / divisors
    row_entropies = masked_sum(entropy, policy_mask, dim=1)
    statistics = {"policy_loss": policy_loss.sum(), "entropy": (row_entropies / num_policy).sum()}
    terms = []
    if values is not None:
        old_values, returns = part.responses(trajectory.values), part.responses(credit.returns)
        value = ppo_value_loss(values, old_values, returns, config.value_clip_range)
        value_loss = masked_sum(value.loss, value_mask, dim=1) / num_value
        statistics["value_loss"] = value_loss.sum()
        statistics["value_clip_fraction"] = masked_sum(value.clipped.float(), value_mask) / num_value
        terms.append(config.value_coef * value_loss)
    # All weights must be in every process's graph, so an untrained policy stays in it with a zero gradient.
    terms.append(policy_loss if settings.train_policy else 0.0 * policy_loss)
    # At 0 the bonus is left out: its gradient is a softmax over the vocabulary.
    if settings.train_policy and config.entropy_coef:
        terms.append(-config.entropy_coef * (row_entropies / divisors))
    if counts.forced_tokens:
        forced_mask = part.responses(trajectory.forced_mask)
        sft_loss = -masked_sum(logprobs, forced_mask, dim=1) / counts.forced_tokens
        statistics["sft_loss"] = sft_loss.sum()
        if settings.train_policy:
            terms.append(settings.sft_coef * sft_loss)
    with torch.no_grad():
        log_ratio = logprobs.detach() - old_logprobs
        statistics |= _token_means(log_ratio, policy, weights, policy_mask, num_policy, config.importance_cap)
    return sum(terms[1:], terms[0]), {name: value.detach() for name, value in statistics.items()}


def _token_means(
    log_ratio: Tensor,
    policy: PolicyTerms,
    weights: Tensor | None,
    mask: Tensor,
    num_tokens: Tensor,
    importance_cap: float,
) -> dict[str, Tensor]:
    """Compute a micro-batch's share of the means over the policy tokens of a minibatch.

    Args:
        log_ratio: (B, R), new over old policy.
        policy: (B, R) each.
        weights: (B, R), importance weights, if there are any.
        mask: (B, R) bool, the policy tokens.
        num_tokens: policy tokens of the minibatch.
        importance_cap: largest importance weight.
    """
    columns = {
        "approx_kl": torch.expm1(log_ratio) - log_ratio,
        "clip_fraction": policy.clipped.float(),
        "ratio": policy.ratio,
    }
    if weights is not None:
        columns |= {
            "importance_weight": weights,
            "importance_truncated": (weights >= importance_cap).float(),
        }
    return {name: masked_sum(column, mask) / num_tokens for name, column in columns.items()}
