"""Model-based numbers of single responses: their log-ratio to the reference policy, and their rewards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from drpo.data.chat import ChatTemplate
from drpo.data.encode import encode_queries, encode_responses
from drpo.data.in_template import encode_in_template
from drpo.data.records import Chat, Message, Record
from drpo.kl import sequence_kl
from drpo.models.positions import check_lengths
from drpo.models.scoring import response_logprobs
from drpo.rewards import Completion, RewardFn
from drpo.tensors import PaddedBatch, masked_sum, pad_batch
from eval.completions.rows import CompletionRow
from eval.progress import Say


@torch.no_grad()
def response_nlls(
    policy: nn.Module,
    tokenizer: Any,
    rows: Sequence[CompletionRow],
    batch_size: int,
    chat: ChatTemplate | None = None,
    say: Say = warnings.warn,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Compute each response's negative log-likelihood given its prompt (n,), in nats, and its token count (n,).

        nll = - sum_t log pi(y_t | x, y_<t)

    Texts are encoded by the policy's own tokenizer; the stop token counts where the response ended, and an empty
    response that did not end has 0 tokens.

    Args:
        policy: Causal language model.
        tokenizer: Tokenizer of the policy.
        rows: Prompts and responses, n of them. Prompts are not truncated.
        batch_size: Responses per forward pass.
        chat: The policy's chat template, applied to the turns that the rows contain, else to those parsed from the
            texts; None encodes the texts as they are.
        say: Receives a note where rotary positions are extrapolated.

    Raises ConfigError when a prompt with its response exceeds the position table, DataError when the template
    rejects a prompt.
    """
    if chat is None:
        queries = encode_queries(tokenizer, [row.prompt for row in rows])
        responses = _encoded(tokenizer, rows)
    else:
        texts = [(row.prompt, row.response, row.ended, row.messages) for row in rows]
        pairs = [encode_in_template(tokenizer, chat, *text) for text in texts]
        queries, responses = [query for query, _ in pairs], [response for _, response in pairs]
    nlls = np.zeros(len(rows))
    models = {"perplexity_policy": policy}
    for indices, batch in _batches(models, tokenizer, queries, responses, batch_size, say):
        logprobs = response_logprobs(policy, batch).logprobs.double()
        nlls[indices] = -masked_sum(logprobs, batch.response_mask, dim=1).cpu().numpy()
    return nlls, np.array([len(ids) for ids in responses], dtype=np.int64)


@torch.no_grad()
def response_kls(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    rows: Sequence[CompletionRow],
    batch_size: int,
    suppressed_ids: Sequence[int] = (),
    say: Say = warnings.warn,
) -> NDArray[np.float64]:
    """Estimate KL(policy || reference) of each response (n,), in nats, over the whole response.

        k1 = sum_t log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)

    The mean is unbiased for responses that the policy sampled at temperature 1 from all ids but `suppressed_ids`.

    Args:
        policy: Causal language model that sampled the responses.
        reference: Reference policy with the same tokenizer.
        tokenizer: Tokenizer of both policies.
        rows: Prompts and responses, n of them; the token ids that they contain are used if any, else the texts'.
        batch_size: Responses per forward pass.
        suppressed_ids: Ids that have probability 0 under both policies.
        say: Receives notes on lengths, see `response_nlls`, which raises the same errors.

    Source: Schulman 2020; `drpo.kl.sequence_kl`.
    """
    # The ids that were sampled, if the row has them: encoding the texts may give others.
    responses = [
        row.meta.get("response_ids") or ids for row, ids in zip(rows, _encoded(tokenizer, rows), strict=True)
    ]
    encoded = encode_queries(tokenizer, [row.prompt for row in rows])
    queries = [row.meta.get("query_ids") or ids for row, ids in zip(rows, encoded, strict=True)]
    kls = np.zeros(len(rows))
    models = {"policy": policy, "kl_reference": reference}
    for indices, batch in _batches(models, tokenizer, queries, responses, batch_size, say):
        logprobs, ref_logprobs = (
            response_logprobs(model, batch, suppressed_ids=suppressed_ids).logprobs.double()
            for model in (policy, reference)
        )
        kls[indices] = sequence_kl(logprobs, ref_logprobs, batch.response_mask).cpu().numpy()
    if not np.isfinite(kls).all():
        raise FloatingPointError(
            "the log-probs of a response are not finite; check the model and its precision"
        )
    return kls


def _encoded(tokenizer: Any, rows: Sequence[CompletionRow]) -> list[list[int]]:
    """Encode the responses, with the stop token where one was sampled."""
    encoded = encode_responses(tokenizer, [row.response for row in rows])
    return [ids if row.ended else ids[:-1] for row, ids in zip(rows, encoded, strict=True)]


def _batches(
    models: Mapping[str, nn.Module],
    tokenizer: Any,
    queries: Sequence[list[int]],
    responses: Sequence[list[int]],
    batch_size: int,
    say: Say,
) -> Iterator[tuple[list[int], PaddedBatch]]:
    """Yield batches of row indices and tokens on the models' device, sorted by length, without empty responses.

    `models` maps the recipe key that names a model to the model.
    """
    lengths = [len(query) + len(response) for query, response in zip(queries, responses, strict=True)]
    for key, model in models.items():
        for note in check_lengths(model, lengths, key, "choose another model, or cut the prompts"):
            say(note)
    device = next(next(iter(models.values())).parameters()).device
    order = sorted((i for i, ids in enumerate(responses) if ids), key=lengths.__getitem__)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = pad_batch(
            [queries[i] for i in indices], [responses[i] for i in indices], tokenizer.pad_token_id
        )
        yield indices, batch.to(device)


def reward_scores(reward_fn: RewardFn, rows: Sequence[CompletionRow]) -> NDArray[np.float64]:
    """Score each response (n,) from texts. Raises ValueError unless there is one finite number for each."""
    completions = [
        text_completion(row.prompt, row.response, row.ended, row.reference, row.messages) for row in rows
    ]
    scores = np.array([float(score) for score in reward_fn(completions)])
    if len(scores) != len(rows):
        raise ValueError(f"the reward function returned {len(scores)} scores for {len(rows)} responses")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ValueError(
            f"the reward function gave {len(bad)} scores that are not finite, the first to prompt "
            f"{rows[bad[0]].prompt_id}"
        )
    return scores


def text_completion(
    prompt: str, response: str, ended: bool, reference: str | None, messages: Sequence[Message] | None
) -> Completion:
    """Make the completion that a reward function takes, from texts alone, without token ids.

    Args:
        prompt: Text of the prompt.
        response: Text of the response.
        ended: Whether the response is complete.
        reference: The dataset's own response, if any.
        messages: Chat turns that the policies were prompted with. A model with a chat template reads these, since it
            was trained on prompts in this format; with None it reads the text of the prompt.
    """
    chat = None if messages is None else Chat(tuple(messages), prompt)
    return Completion(prompt, response, ended, [], [], Record(prompt, completion=reference, chat=chat))
