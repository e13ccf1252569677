"""Log-probabilities of several responses to one prompt, with one forward over that prompt.

Chosen and rejected (or K ranked responses) share their prompt. Side by side in one sequence,

    [ query | response 1 | ... | response K ],

with a mask that hides the responses from each other and positions that start anew behind the query for each,
they get the log-probabilities that they have as K separate rows, while the query is computed once.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from drpo.models.scoring import (
    ResponseScores,
    chunked_scores,
    head_is_plain,
    model_inputs,
    response_logprobs,
    takes_position_ids,
    unwrap_peft,
)
from drpo.tensors import PaddedBatch, gather_logprobs, pad_batch, position_ids

ATTENTION_WITH_OWN_MASK = ("eager", "sdpa")  # the implementations that take any mask (B, 1, T, T)
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# How configs call the number of positions beyond which a layer drops keys, whatever the mask says.
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "keep_window_size",
    "local_attention",
)


def continuation_logprobs(
    model: nn.Module, batch: PaddedBatch, num_continuations: int, *, chunk_size: int = 1024
) -> ResponseScores:
    """`response_logprobs` (K*B, R) of K = `num_continuations` responses to each of B queries.

    Rows of `batch` are K blocks of B rows; row k*B + b holds query b, in every block the same, and its k-th
    response. Values and gradients are those of separate rows up to rounding, which costs B * (Q + K*R) positions in
    place of B * K * (Q + R). A model that cannot share prompts, or whose attention window is narrower than the
    shared row, gets separate rows. Which way is taken, and the number of head calls, depend on shapes alone.

    Raises ValueError when the rows are not K blocks, or the blocks differ in their queries.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 position, got {chunk_size}")
    if num_continuations < 1 or len(batch.responses) % num_continuations:
        raise ValueError(f"{len(batch.responses)} rows are not {num_continuations} blocks of one length")
    num_queries = len(batch.responses) // num_continuations
    for ids in (batch.queries, batch.query_mask):
        blocks = ids.view(num_continuations, num_queries, -1)
        if not torch.equal(blocks, blocks[:1].expand_as(blocks)):
            raise ValueError("the blocks of rows differ in their queries; a shared prompt needs equal ones")
    causal_lm = unwrap_peft(model)
    length = batch.responses.shape[1]
    row_length = batch.queries.shape[1] + num_continuations * (length - 1)
    if (
        num_continuations == 1
        or length == 0
        or row_length > narrowest_window(causal_lm.config)
        or not can_share_prompt(model)
    ):
        return response_logprobs(model, batch, chunk_size=chunk_size)

    ids = batch.responses.masked_fill(batch.response_mask.logical_not(), 0)
    first = batch.queries.shape[1] - 1
    if head_is_plain(causal_lm):
        hidden = _hidden(causal_lm.base_model, batch, num_continuations)
        hidden = _predicting(hidden[:, first:], num_continuations)
        return chunked_scores(causal_lm.get_output_embeddings(), hidden, ids, chunk_size=chunk_size)
    inputs = packed_inputs(causal_lm, batch, num_continuations)
    logits = causal_lm(**inputs, use_cache=False, logits_to_keep=row_length - first).logits
    return ResponseScores(gather_logprobs(_predicting(logits, num_continuations), ids), None)


def _hidden(backbone: nn.Module, batch: PaddedBatch, num_continuations: int) -> Tensor:
    return backbone(**packed_inputs(backbone, batch, num_continuations), use_cache=False).last_hidden_state


def packed_inputs(model: nn.Module, batch: PaddedBatch, num_continuations: int) -> dict[str, Tensor]:
    """Keyword inputs for the shared rows (B, Q + K*(R-1)): the last token of a response predicts nothing.

    The mask is bool for sdpa (True = attends) and additive for eager attention, which adds what it is given.
    """
    num_queries = len(batch.queries) // num_continuations
    query_length = batch.queries.shape[1]
    # Separate rows, in which positions are counted, without the last column.
    ids, mask = batch.query_responses[:, :-1], batch.attention_mask[:, :-1]
    ids = ids.masked_fill(mask.logical_not(), 0)
    positions = position_ids(mask)

    def pack(rows: Tensor) -> Tensor:
        responses = rows[:, query_length:].reshape(num_continuations, num_queries, -1)
        return torch.cat([rows[:num_queries, :query_length], responses.transpose(0, 1).flatten(1)], dim=1)

    attends = attention_pattern(query_length, ids.shape[1] - query_length, num_continuations, ids.device)
    attends = attends & pack(mask)[:, None, None, :]
    if model.config._attn_implementation == "eager":
        dtype = model.get_input_embeddings().weight.dtype
        hidden = torch.finfo(dtype).min
        attends = torch.zeros(attends.shape, dtype=dtype, device=ids.device).masked_fill(
            attends.logical_not(), hidden
        )
    return {"input_ids": pack(ids), "attention_mask": attends, "position_ids": pack(positions)}


def attention_pattern(
    query_length: int, response_length: int, num_continuations: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Which position (row) attends to which (column), (T, T) bool, T = Q + K*R: what stands before it in the query
    and in its own response."""
    block = torch.arange(num_continuations, device=device).repeat_interleave(response_length) + 1
    block = torch.cat([block.new_zeros(query_length), block])
    before = torch.ones(len(block), len(block), dtype=torch.bool, device=device).tril()
    return before & ((block[None, :] == 0) | (block[None, :] == block[:, None]))


def _predicting(x: Tensor, num_continuations: int) -> Tensor:
    """What predicts each response token, (K*B, R, D), from the last query column and all after it (B, 1 + K*(R-1), D).

    The first token of every response is predicted by the last token of the query.
    """
    num_queries, _, size = x.shape
    of_query = x[:, None, :1].expand(-1, num_continuations, -1, -1)
    of_responses = x[:, 1:].reshape(num_queries, num_continuations, -1, size)
    return torch.cat([of_query, of_responses], dim=2).transpose(0, 1).flatten(0, 1)


def narrowest_window(config: PreTrainedConfig) -> float:
    """The longest row in which windowed (sliding, chunked) attention hides nothing; inf without windows."""
    text = config.get_text_config()
    windows = [getattr(text, name, None) for name in WINDOWS]
    return min((window for window in windows if window), default=float("inf"))


_SHARING: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def can_share_prompt(model: nn.Module) -> bool:
    """Whether `continuation_logprobs` may pack: attention alone mixes positions, by the mask and positions given.

    False for ALiBi and the like (positions taken from the mask), recurrent and convolutional layers, and attention
    kernels that take no mask of their own. Then a probe, once per model and attention implementation: the hidden
    states of two tiny packed rows must be those of separate rows.
    """
    causal_lm = unwrap_peft(model)
    implementation = causal_lm.config._attn_implementation
    known = _SHARING.setdefault(causal_lm, {})
    if implementation not in known:
        known[implementation] = _may_share(causal_lm) and _probe(causal_lm.base_model)
    return known[implementation]


def _may_share(causal_lm: nn.Module) -> bool:
    text = causal_lm.config.get_text_config()
    return (
        causal_lm.base_model is not causal_lm
        and causal_lm.config._attn_implementation in ATTENTION_WITH_OWN_MASK
        and takes_position_ids(causal_lm.base_model)
        and not getattr(causal_lm, "_is_stateful", False)
        and not getattr(text, "alibi", False)
        and set(getattr(text, "layer_types", None) or ()) <= MASKED_LAYERS
    )


@torch.no_grad()
def _probe(backbone: nn.Module) -> bool:
    """Whether packing two ragged rows moves the hidden states by far less than another query does.

    The allowance is for rounding: 1% of that in float32, 10% in half precision.
    """
    weight = backbone.get_input_embeddings().weight
    batch, other = _probe_batch(0), _probe_batch(1)
    batch, other = batch.to(weight.device), other.to(weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        try:
            packed = _hidden(backbone, batch, 2)
        except (
            Exception
        ):  # Models without such inputs may say so in any way; real faults show in separate rows.
            return False
        packed = _predicting(packed[:, batch.queries.shape[1] - 1 :], 2)
        separate, elsewhere = (
            backbone(
                **model_inputs(backbone, rows.query_responses[:, :-1], rows.attention_mask[:, :-1]),
                use_cache=False,
            ).last_hidden_state[:, batch.queries.shape[1] - 1 :]
            for rows in (batch, other)
        )
    packed, separate, elsewhere = (x.float()[batch.response_mask] for x in (packed, separate, elsewhere))
    allowed = 0.01 if weight.dtype == torch.float32 else 0.1
    return bool((packed - separate).norm() <= allowed * (elsewhere - separate).norm())


def _probe_batch(first: int) -> PaddedBatch:
    """Two queries with two responses each, ragged, of ids below 16; `first` changes the queries alone."""
    queries = [[first, 3, 5, 4], [first, 6]]
    return pad_batch(queries * 2, [[7, 8, 9], [10, 11], [12, 13], [14, 15, 7, 8]], 0)
