"""The loss of preference pairs: scores of policy and reference, one `match` over the losses, and their metrics."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from drpo import preference_losses as losses
from drpo.microbatches import Lengths
from drpo.models.scoring import response_logprobs
from drpo.models.shared_prompt import continuation_logprobs, shares_rows
from drpo.tensors import PaddedBatch, masked_sum
from drpo.trainers.offline import Objective, RowMetrics
from drpo.trainers.preference.pairs import Pair, PairBatch, collate_pairs
from drpo.trainers.preference.recipe import LENGTH_AVERAGED, LossConfig
from drpo.trainers.reference import Reference, policy_and_reference

QUANTILES = (0.1, 0.5, 0.9)


class PairScores(NamedTuple):
    """Inputs of a loss of B pairs, all (B,): log-probabilities in nats, weighted or averaged as the loss needs."""

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor | None
    rejected_reference: Tensor | None

    def logratios(self) -> tuple[Tensor, Tensor]:
        """Return log pi/pi_ref (B,) of the chosen and the rejected responses."""
        return self.chosen - self.chosen_reference, self.rejected - self.rejected_reference


class PairObjective(Objective):
    """A loss of pairs around the policy; `reference` computes the log-probs that the batch lacks."""

    def __init__(
        self,
        model: nn.Module,
        loss: LossConfig,
        *,
        reference: Reference | None,
        share_prompts: bool,
        pad_id: int,
        device: torch.device,
    ) -> None:
        super().__init__(model, pad_id, device)
        self.needs_step_statistics = loss.dr_dpo is not None and loss.dr_dpo.over == "step"
        self._loss, self._reference = loss, reference
        self._score = functools.partial(block_logprobs, share_prompts=share_prompts)
        self._share_prompts, self._counts_prompt_once = share_prompts, False

    def collate(self, pairs: Sequence[Pair]) -> PairBatch:
        return collate_pairs(pairs, self._pad_id, self._device)

    def before_lengths(self, pairs: Sequence[Pair]) -> None:
        """Count a pair's prompt once if the model shares it even in the longest row that a batch can have."""
        query_length = max(len(pair.example.query_ids) for pair in pairs)
        response_length = max(len(ids) for pair in pairs for ids in pair.response_ids)
        longest = query_length + 2 * (response_length - 1)
        self._counts_prompt_once = self._share_prompts and shares_rows(self.model, longest)

    def lengths(self, pair: Pair) -> Lengths:
        """Return the tokens of a pair: a shared row has no padding between its parts, so it counts as one part."""
        query_length, response_lengths = len(pair.example.query_ids), list(map(len, pair.response_ids))
        if self._counts_prompt_once:
            return query_length + sum(response_lengths), 0
        return 2 * query_length, 2 * max(response_lengths)

    def step_statistics(self, weighted: Tensor, row_metrics: RowMetrics) -> Tensor:
        """Compute log mean exp(-loss / beta') over all pairs of the step, the normaliser of Dr. DPO's weights."""
        exponents = -row_metrics["pair_loss"] / self._loss.dr_dpo.beta_prime
        log_count = torch.tensor(float(len(exponents)), dtype=exponents.dtype).log()
        return (torch.logsumexp(exponents, dim=0) - log_count).float().to(self._device)

    def forward(self, batch: PairBatch, step_statistics: Tensor | None = None) -> tuple[Tensor, RowMetrics]:
        logprobs, reference = self._logprobs(batch)
        scores = PairScores(*self._reduce(logprobs, batch), *self._reduce(reference, batch))
        pair_losses = pair_loss(self._loss, scores, batch.offsets)
        row_metrics = self._row_metrics(logprobs, reference, scores, batch) | {"pair_loss": pair_losses}
        if self._loss.dr_dpo is None or (self.needs_step_statistics and step_statistics is None):
            return pair_losses, row_metrics
        beta_prime = self._loss.dr_dpo.beta_prime
        if step_statistics is not None:
            weights = losses.dr_dpo_weights(pair_losses, beta_prime, step_statistics)
            return weights * pair_losses, row_metrics | {"weight": weights}
        weights = len(batch) * losses.dr_dpo_weights(pair_losses, beta_prime)
        batch_loss = losses.dr_dpo_loss(pair_losses, beta_prime)
        return batch_loss.expand(len(batch)), row_metrics | {"weight": weights}

    def _logprobs(self, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """Compute log-probs per token (2B, R) of the policy and, if the loss needs them, of the reference."""
        if not self._loss.needs_reference or batch.reference_logprobs is not None:
            return self._score(self.model, batch.padded), batch.reference_logprobs
        return policy_and_reference(self.model, self._reference, self._score, batch.padded)

    def _reduce(self, logprobs: Tensor | None, batch: PairBatch) -> tuple[Tensor | None, Tensor | None]:
        """Reduce per-token log-probs (2B, R) to numbers of the chosen and the rejected responses (B,)."""
        if logprobs is None:
            return None, None
        mask = batch.padded.response_mask
        if batch.token_weights is not None:
            reduced = losses.token_weighted_sum(logprobs, batch.token_weights, mask)
        else:
            reduced = masked_sum(logprobs, mask, dim=1)
        if self._loss.name in LENGTH_AVERAGED:
            reduced = reduced / mask.sum(dim=1)
        return tuple(reduced.chunk(2))

    def _row_metrics(
        self, logprobs: Tensor, reference: Tensor | None, scores: PairScores, batch: PairBatch
    ) -> RowMetrics:
        mask, beta = batch.padded.response_mask, self._loss.beta
        chosen, rejected = masked_sum(logprobs.detach(), mask, dim=1).chunk(2)
        row_metrics = {"chosen_logprobs": chosen, "rejected_logprobs": rejected}
        chosen_ratio, rejected_ratio = scores.chosen, scores.rejected
        if reference is not None:
            chosen_ratio, rejected_ratio = scores.logratios()
            chosen_reference, rejected_reference = masked_sum(reference, mask, dim=1).chunk(2)
            ratios = torch.stack([chosen_reference - chosen, rejected_reference - rejected])
            row_metrics["implicit_kl"] = ratios.mean(0)
        chosen_reward, rejected_reward = beta * chosen_ratio, beta * rejected_ratio
        row_metrics |= {
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "reward_margin": chosen_reward - rejected_reward,
            "accuracy": chosen_reward > rejected_reward,
        }
        return row_metrics if batch.flipped is None else row_metrics | {"flipped": batch.flipped}

    def summarise(self, weighted: Tensor, row_metrics: RowMetrics) -> dict[str, float]:
        """Return means of the numbers, quantiles of the losses, and means over flipped and clean pairs."""
        metrics = super().summarise(weighted, row_metrics)
        pair_losses = row_metrics["pair_loss"]
        quantiles = torch.quantile(pair_losses, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        metrics |= {f"pair_loss_p{100 * q:.0f}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
        if self.needs_step_statistics:  # the loss whose gradient is the weighted one
            metrics["loss"] = float(losses.dr_dpo_loss(pair_losses, self._loss.dr_dpo.beta_prime))
        if "flipped" in row_metrics:
            flipped = row_metrics["flipped"].bool()
            for name in [n for n in ("accuracy", "pair_loss", "weight") if n in row_metrics]:
                for group, mask in (("flipped", flipped), ("clean", flipped.logical_not())):
                    if mask.any():
                        metrics[f"{name}_{group}"] = float(row_metrics[name][mask].mean())
        return metrics


def block_logprobs(
    model: nn.Module, batch: PaddedBatch, num_responses: int = 2, *, share_prompts: bool
) -> Tensor:
    """Compute log-probabilities (K*B, R) of K blocks of responses to the same queries, sharing prompts or not."""
    if share_prompts:
        return continuation_logprobs(model, batch, num_responses).logprobs
    return response_logprobs(model, batch).logprobs


def pair_loss(config: LossConfig, scores: PairScores, offsets: Tensor) -> Tensor:
    """Compute the loss of each pair (B,), unweighted."""
    match config.name:
        case "simpo":
            return losses.simpo_loss(scores.chosen, scores.rejected, config.beta, config.target_margin)
        case "orpo":
            return losses.orpo_loss(scores.chosen, scores.rejected, config.odds_coef)
    ratios = scores.logratios()
    match config.name:
        case "apo_zero":
            return losses.apo_zero_loss(*ratios, config.beta)
        case "apo_down":
            return losses.apo_down_loss(*ratios, config.beta)
        case "sppo":
            return losses.sppo_loss(*ratios, config.beta)
    alpha = config.divergence_alpha or 1.0
    margins = losses.implicit_margins(*ratios, config.beta, config.divergence, alpha) - offsets
    match config.name:
        case "dpo":
            return losses.dpo_loss(margins)
        case "cdpo":
            return losses.cdpo_loss(margins, config.label_smoothing)
        case "robust":
            return losses.robust_dpo_loss(margins, config.label_smoothing)
        case "hinge":
            return losses.hinge_loss(margins)
        case "ipo" | "ipo_avg":
            return losses.ipo_loss(margins, config.beta)
    raise ValueError(f"loss.name={config.name} is not a loss of pairs")
