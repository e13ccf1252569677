"""The loss of a reward model: scores of all responses of a ranking from one forward over their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from drpo.microbatches import Lengths
from drpo.models.inputs import unwrap_peft
from drpo.models.scoring import chunked_scores, scoring
from drpo.models.shared_prompt import continuation_hidden, shares_rows
from drpo.tensors import masked_sum
from drpo.trainers.offline import Objective, RowMetrics
from reward_models.losses import comparison_loss, plackett_luce_loss
from reward_models.rankings import Ranking, RankingBatch, collate_rankings

if TYPE_CHECKING:
    from reward_models.train import LossConfig

LM_CHUNK = 1024
"Positions whose logits are there at a time."


class RewardObjective(Objective):
    """The loss of rankings, each the mean over its comparisons, or Plackett-Luce's."""

    def __init__(
        self,
        model: nn.Module,
        pad_id: int,
        loss: LossConfig,
        score_penalty: float,
        device: torch.device,
        lm_head: nn.Module | None = None,
    ) -> None:
        """Make the loss.

        Args:
            model: a RewardModel, with or without adapter.
            pad_id: id of padding.
            loss: which loss.
            score_penalty: weight of the mean squared score.
            device: where batches go.
            lm_head: output embedding for the language-model loss.
        """
        super().__init__(model, pad_id, device)
        self._loss, self._score_penalty, self.lm_head = loss, score_penalty, lm_head
        self._shares_prompts = False

    def collate(self, rankings: Sequence[Ranking]) -> RankingBatch:
        return collate_rankings(rankings, self._pad_id, self._device)

    def before_lengths(self, rankings: Sequence[Ranking]) -> None:
        """Settle whether prompts are shared, for the longest row that a batch can have."""
        longest = max(len(ranking.query_ids) + _response_tokens(ranking) for ranking in rankings)
        self._shares_prompts = shares_rows(self.model, longest)

    def lengths(self, ranking: Ranking) -> Lengths:
        num_queries = 1 if self._shares_prompts else len(ranking.response_ids)
        return num_queries * len(ranking.query_ids), _response_tokens(ranking)

    def forward(self, batch: RankingBatch) -> tuple[Tensor, RowMetrics]:
        model, padded = unwrap_peft(self.model), batch.padded
        hidden = continuation_hidden(self.model, padded, batch.num_responses)
        scores = model.scores_of(hidden[:, 1:], padded.response_mask).view(batch.num_responses, -1).T
        row, better, worse = batch.comparisons.T
        margins = scores[row, better] - scores[row, worse]
        if self._loss.name == "plackett_luce":
            losses = plackett_luce_loss(scores, batch.ranks)
        else:
            apart = margins - self._loss.margin_scale * batch.gaps
            losses = _row_means(comparison_loss(apart, self._loss.label_smoothing), row, len(batch))
        losses = losses + self._score_penalty * masked_sum(scores**2, batch.real, dim=1) / batch.real.sum(1)
        row_metrics = {
            "accuracy": _row_means((margins > 0).float(), row, len(batch)),
            "margin": _row_means(margins, row, len(batch)),
            "chosen_score": _row_means(scores[row, better], row, len(batch)),
            "rejected_score": _row_means(scores[row, worse], row, len(batch)),
        }
        if self.lm_head is not None:
            row_metrics["lm_loss"] = self._lm_loss(hidden, batch)
            losses = losses + self._loss.lm_coef * row_metrics["lm_loss"]
        return losses, row_metrics

    def _lm_loss(self, hidden: Tensor, batch: RankingBatch) -> Tensor:
        """Compute -log p of the best response (B,), in nats, mean over its tokens."""
        rows = batch.best * len(batch) + torch.arange(len(batch), device=batch.best.device)
        mask = batch.padded.response_mask[rows]
        ids = batch.padded.responses[rows][mask]
        score = scoring(temperature=1.0, suppressed_ids=(), entropy=False)
        found = chunked_scores(self.lm_head, hidden[rows, :-1][mask], ids, LM_CHUNK, score)
        logprobs = found.logprobs.new_zeros(mask.shape).masked_scatter(mask, found.logprobs)
        return -masked_sum(logprobs, mask, dim=1) / mask.sum(dim=1)


def _response_tokens(ranking: Ranking) -> int:
    return len(ranking.response_ids) * max(map(len, ranking.response_ids))


def _row_means(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Return the mean (B,) of the values of each row; `row` (N,) says whose they are, and every row has some."""
    counts = torch.bincount(row, minlength=num_rows)
    return values.new_zeros(num_rows).index_add(0, row, values) / counts
