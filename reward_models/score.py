"""A trained reward model as a RewardFn for the online loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drpo.data.encode import encode_query, encode_response
from drpo.engine import Engine
from drpo.models.loading import ModelConfig, load_scalar_model
from drpo.models.tokenizer import load_tokenizer
from drpo.models.trunk import has_trunk, resumed_from, same_trunk, share_trunk
from drpo.rewards import Completion
from drpo.tensors import PaddedBatch, pad_batch
from reward_models.model import RewardModel


class RewardModelScorer:
    """Scores completions with a reward model, on ids where it shares the policy's tokenizer, else on text."""

    def __init__(
        self, model: RewardModel, tokenizer, engine: Engine, batch_size: int, shares_tokenizer: bool
    ) -> None:
        self._model, self._tokenizer, self._engine = model, tokenizer, engine
        self._batch_size, self._shares_tokenizer = batch_size, shares_tokenizer

    @classmethod
    def load(
        cls,
        path: str,
        engine: Engine,
        batch_size: int,
        dtype: str,
        policy_tokenizer_path: str | None,
        key: str = "reward.path",
    ) -> RewardModelScorer:
        """From a folder that reward_models.train wrote, or any *ForSequenceClassification with one label.

        Without the path of the policy's tokenizer it scores texts, whoever wrote them.
        """
        model = load_scalar_model(path, ModelConfig(dtype=dtype), RewardModel, key=key)
        tokenizer = load_tokenizer(path)
        shared = (
            policy_tokenizer_path is not None
            and tokenizer.get_vocab() == load_tokenizer(policy_tokenizer_path).get_vocab()
        )
        return cls(engine.place(model, as_trained=False), tokenizer, engine, batch_size, shared)

    def share_trunk(self, policy: nn.Module) -> bool:
        """Use the policy's frozen trunk in place of an equal one of its own; whether it does.

        It does not where training casts the policy's weights to bf16, which would change the scores.
        """
        if (
            not has_trunk(policy)
            or not self._shares_tokenizer
            or self._engine.casts_weights
            or not same_trunk(self._model, policy)
        ):
            return False
        share_trunk(self._model, policy)
        return True

    @torch.no_grad()
    def score_from_trunk(
        self, completions: Sequence[Completion], parts: Sequence[PaddedBatch], trunks: Sequence[Tensor]
    ) -> Tensor:
        """(B,) float32: the scores of `__call__`, from what the shared trunk made of the same tokens.

        Should the model see other tokens than those of `parts` (it has a stop token of its own), the trunk runs anew.
        """
        if any(self._ids(c) != (list(c.query_ids), list(c.response_ids)) for c in completions):
            return self(completions)
        scores = []
        for part, trunk in zip(parts, trunks, strict=True):
            with self._engine.autocast(), resumed_from(trunk, self._model):
                scores.append(self._model.score(part).float().cpu())
        return torch.cat(scores)

    @torch.no_grad()
    def __call__(self, completions: Sequence[Completion]) -> Tensor:
        """(B,) float32. Rows are scored in order of length, so a batch has little padding."""
        ids = [self._ids(completion) for completion in completions]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row][0]) + len(ids[row][1]))
        scores = torch.empty(len(ids))
        for first in range(0, len(order), self._batch_size):
            rows = order[first : first + self._batch_size]
            batch = pad_batch(
                [ids[r][0] for r in rows], [ids[r][1] for r in rows], self._tokenizer.pad_token_id
            )
            with self._engine.autocast():
                scores[rows] = self._model.score(batch.to(self._engine.device)).float().cpu()
        return scores

    def _ids(self, completion: Completion) -> tuple[list[int], list[int]]:
        if self._shares_tokenizer:
            response = list(completion.response_ids)
            if completion.ended:  # whatever stopped it: the model was trained on this token
                response[-1] = self._tokenizer.eos_token_id
            return completion.query_ids, response
        response = encode_response(self._tokenizer, completion.response)
        if not completion.ended:
            response = response[:-1]
        return encode_query(self._tokenizer, completion.prompt), response
