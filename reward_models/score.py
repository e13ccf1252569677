"""A trained reward model as a RewardFn for the online loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from drpo.config import ConfigError
from drpo.data.chat import ChatTemplate
from drpo.data.encode import encode_query, encode_response
from drpo.data.in_template import encode_in_template
from drpo.data.records import Chat
from drpo.data.stop import ending_with
from drpo.engine import Engine
from drpo.microbatches import same_query_batches
from drpo.models.frozen_weights import share_frozen
from drpo.models.loading import ModelConfig, load_scalar_model
from drpo.models.positions import position_limit
from drpo.models.probes import check_scalar_model
from drpo.models.tokenizer import load_tokenizer
from drpo.models.trunk import has_trunk, resumed_from, same_trunk, share_trunk
from drpo.rewards import Completion
from drpo.tensors import PaddedBatch, pad_batch
from reward_models.model import RewardModel


@dataclass(eq=False)
class RewardModelScorer:
    """RewardFn that scores completions with a reward model.

    It reads token ids where it shares the policy's tokenizer and chat template, else text, with the turns of a
    conversation rendered by its own template.
    """

    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    batch_size: int
    shares_tokenizer: bool
    shares_template: bool
    key: str
    offloaded: bool = False
    shares_trunk: bool = False

    @classmethod
    def load(
        cls,
        path: str,
        engine: Engine,
        batch_size: int,
        dtype: str,
        policy_tokenizer_path: str | None,
        key: str = "reward.path",
        offload: bool = False,
    ) -> RewardModelScorer:
        """Load from a folder that reward_models.train wrote, or any *ForSequenceClassification with one label.

        Args:
            path: folder or hub id of the reward model.
            engine: places the model and gives the precision of its forwards.
            batch_size: rows per forward.
            dtype: precision of the weights.
            policy_tokenizer_path: tokenizer of the policy; None scores texts from any source.
            key: recipe key of `path`, for errors.
            offload: keep the model in the host's memory while it does not score.
        """
        model = load_scalar_model(path, ModelConfig(dtype=dtype), RewardModel, key=key)
        tokenizer = load_tokenizer(path, key)
        shared = same_template = False
        if policy_tokenizer_path is not None:
            policy_tokenizer = load_tokenizer(policy_tokenizer_path)
            shared = tokenizer.get_vocab() == policy_tokenizer.get_vocab()
            same_template = tokenizer.chat_template == policy_tokenizer.chat_template
        placed = engine.place(model, as_trained=False, on_host=offload)
        with engine.on_device(placed), engine.frozen_autocast():
            check_scalar_model(placed, key)  # known since loading, but for half precision
        return cls(placed, tokenizer, engine, batch_size, shared, same_template, key, offload)

    @property
    def max_tokens(self) -> int | None:
        """Number of positions of a model that reads the policy's tokens; None without a limit, or for texts."""
        return position_limit(self.model) if self.shares_tokenizer else None

    def share_weights(self, policy: nn.Module, critic: nn.Module | None) -> None:
        """Use the frozen weights of policy and critic, and the policy's frozen trunk, in place of equal ones.

        Where training casts the policy's weights to bf16 the trunk stays, as it would change the scores. Under ZeRO-3
        nothing is shared, and the model is cut over the processes too, which then must score equally often. A model
        that is kept on the host shares nothing either.
        """
        self.engine.partition(self.model, self.offloaded)
        if self.engine.partitions_weights or self.offloaded:
            return
        shares_tokens = self.shares_tokenizer and not self.engine.casts_weights
        with self.engine.frozen_autocast():
            self.shares_trunk = has_trunk(policy) and shares_tokens and same_trunk(self.model, policy)
            if self.shares_trunk:
                share_trunk(self.model, policy)
        for owner in (policy, critic):
            if owner is not None:
                share_frozen(self.model, owner)

    def share_with(self, other: RewardModelScorer) -> None:
        """Use the frozen weights of another reward model in place of equal ones, under the rules of `share_weights`."""
        if not (self.engine.partitions_weights or self.offloaded or other.offloaded):
            share_frozen(self.model, other.model)

    @torch.no_grad()
    def score_from_trunk(
        self, completions: Sequence[Completion], parts: Sequence[PaddedBatch], trunks: Sequence[Tensor]
    ) -> Tensor:
        """Return the scores (B,), float32, of `__call__`, computed from the shared trunk's output for the same tokens.

        The trunk runs again if the model reads other tokens than those of `parts` (a stop token of its own).
        """
        if any(self._ids(c) != (list(c.query_ids), list(c.response_ids)) for c in completions):
            return self(completions)
        scores = []
        for part, trunk in zip(parts, trunks, strict=True):
            with self.engine.frozen_autocast(), resumed_from(trunk, self.model):
                scores.append(self.model.score(part).float().cpu())
        return torch.cat(scores)

    @torch.no_grad()
    def __call__(self, completions: Sequence[Completion]) -> Tensor:
        """Return the scores (B,), float32; a prompt that several rows share is computed once.

        Rows are batched by length, so that a batch has little padding. ZeRO-3: all processes must take equally many
        batches, so every row has its prompt there.
        """
        return self.score_ids([self._ids(completion) for completion in completions])

    @torch.no_grad()
    def score_ids(self, ids: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Return the scores (B,), float32, of prompts and responses in the model's own tokens, batched as above."""
        lengths = [(len(query), len(response)) for query, response in ids]
        apart = self.engine.partitions_weights
        queries = [(row,) if apart else query for row, (query, _) in enumerate(ids)]
        scores = torch.empty(len(ids))
        with self.engine.on_device(self.model), self.engine.frozen_autocast():
            for rows, num_continuations in same_query_batches(queries, lengths, self.batch_size):
                batch = pad_batch(*zip(*(ids[row] for row in rows), strict=True), self.tokenizer.pad_token_id)
                batch = batch.to(self.engine.device)
                scores[rows] = self.model.score(batch, num_continuations).float().cpu()
        return scores

    def _ids(self, completion: Completion) -> tuple[list[int], list[int]]:
        chat, ended = completion.record.chat, completion.ended
        if not completion.query_ids:  # a text from any source, tokenized the model's own way
            ended = True  # as a judge of texts takes it; at other tokens than the stop token the head never learned
            reads_chat = self._was_trained_on_chat
            if reads_chat is None:
                reads_chat = self.tokenizer.chat_template is not None
        else:
            reads_chat = chat is not None
            self._check_trained_on(reads_chat)
        if self.shares_tokenizer and (chat is None or self._shares_rendering(chat)):
            return completion.query_ids, self.own_stop(completion.response_ids, completion.ended, reads_chat)
        return self.text_ids(completion, ended, reads_chat)

    def own_stop(self, response_ids: Sequence[int], ended: bool, reads_chat: bool) -> list[int]:
        """Return a response with the stop token of the model's training in place of the one that ended it."""
        response = list(response_ids)
        if ended:
            response[-1] = (self._in_template[1] if reads_chat else self.tokenizer).eos_token_id
        return response

    def text_ids(self, completion: Completion, ended: bool, reads_chat: bool) -> tuple[list[int], list[int]]:
        """Encode texts by the model's own tokenizer, and as a conversation by its chat template if `reads_chat`."""
        chat = completion.record.chat
        if reads_chat:
            template, tokenizer = self._in_template
            messages = None if chat is None else chat.messages
            prompt, response = completion.record.shared_prompt, completion.response
            return encode_in_template(tokenizer, template, prompt, response, ended, messages)
        response = encode_response(self.tokenizer, completion.response)
        if not ended:
            response = response[:-1]
        return encode_query(self.tokenizer, completion.prompt), response

    @property
    def _was_trained_on_chat(self) -> bool | None:
        """Whether `reward_models.train` trained it on a chat template; None for a model from elsewhere."""
        return getattr(self.model.config, "chat_template", None)

    def check_reads(self, chat: bool) -> None:
        """Raise ConfigError when the model cannot read the prompts: conversations if `chat`, else plain texts."""
        self._check_trained_on(chat)
        if chat:
            _ = self._in_template

    def _check_trained_on(self, reads_chat: bool) -> None:
        if self._was_trained_on_chat not in (None, reads_chat):
            raise ConfigError(
                f"{self.key}: this reward model was trained with data.chat_template={not reads_chat}, and the "
                f"policy's prompts are made with {reads_chat}: give both the same"
            )

    def _shares_rendering(self, chat: Chat) -> bool:
        arguments = self.model.config.chat_template_kwargs if self._was_trained_on_chat else chat.arguments
        return self.shares_template and dict(chat.arguments) == arguments

    @functools.cached_property
    def _in_template(self) -> tuple[ChatTemplate, PreTrainedTokenizerBase]:
        """Chat template of the model, and its tokenizer with the stop token of the model's training.

        The stop token is the saved eos token, or for a model from elsewhere the template's end of turn.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{self.key}: the prompts are conversations, and this reward model's tokenizer has no chat template "
                "to render them with; take a reward model that has one, or the policy's tokenizer"
            )
        if self._was_trained_on_chat:
            eos, arguments = self.tokenizer.eos_token, self.model.config.chat_template_kwargs
            return ChatTemplate(self.tokenizer, arguments, eos), self.tokenizer
        template = ChatTemplate(self.tokenizer)
        ending = template.stop_token
        tokenizer = self.tokenizer if ending is None else ending_with(self.tokenizer, ending)
        return template, tokenizer
