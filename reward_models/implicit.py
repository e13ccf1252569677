"""The implicit reward of a preference-trained policy, as a RewardFn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.config import ConfigError
from drpo.engine import Engine
from drpo.microbatches import same_query_batches
from drpo.models.shared_prompt import continuation_logprobs
from drpo.rewards import Completion
from drpo.tensors import masked_sum, pad_batch


@dataclass(eq=False)
class ImplicitReward:
    """r(x, y) = beta * sum_t (log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)), up to a function of the prompt.

    So scores of responses to one prompt can be compared, and those to different prompts cannot. The stop token counts.
    Policy and reference read the ids of one tokenizer.
    Source: Rafailov et al. 2023 (DPO), eq. 5 and 7.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    batch_size: int
    beta: float

    @torch.no_grad()
    def __call__(self, completions: Sequence[Completion]) -> Tensor:
        """Return the scores (B,), float32; a prompt that several rows share is computed once.

        Raises ValueError for completions without tokens, ConfigError for log-probs that are not finite.
        """
        if not all(completion.query_ids for completion in completions):
            raise ValueError(
                "implicit rewards are scores of tokens, and a completion has none; encode its texts"
            )
        ids = [(completion.query_ids, completion.response_ids) for completion in completions]
        lengths = [(len(query), len(response)) for query, response in ids]
        batches = same_query_batches([query for query, _ in ids], lengths, self.batch_size)
        scores = torch.empty(len(ids))
        with self.engine.frozen_autocast():
            for rows, num_continuations in batches:
                batch = pad_batch(*zip(*(ids[row] for row in rows), strict=True), self.tokenizer.pad_token_id)
                batch = batch.to(self.engine.device)
                logprobs, reference = (
                    continuation_logprobs(model, batch, num_continuations).logprobs.double()
                    for model in (self.policy, self.reference)
                )
                log_ratios = masked_sum(logprobs - reference, batch.response_mask, dim=1)
                scores[rows] = (self.beta * log_ratios).float().cpu()
        if not scores.isfinite().all():
            raise ConfigError(
                "the log-probs of a response are not finite; check both policies and their precision"
            )
        return scores
