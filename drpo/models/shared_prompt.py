"""Log-probabilities of several responses to one prompt, with a single forward over that prompt.

Chosen and rejected (or K ranked responses) share their prompt. Side by side in one sequence,

    [ query | response 1 | ... | response K ],

with a mask that hides the responses from each other and positions that restart after the query for each,
they get the log-probabilities of K separate rows, while the query is computed once. There is no padding
between them, and the LM head runs on real response positions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from drpo.models.answers import answer
from drpo.models.frozen_weights import is_half, own_precision
from drpo.models.inputs import model_inputs, takes_position_ids, unwrap_peft
from drpo.models.scalar_head import ScalarModel, token_hidden, token_values
from drpo.models.scoring import (
    Entropy,
    ResponseScores,
    chunked_scores,
    head_is_plain,
    response_logprobs,
    scoring,
)
from drpo.tensors import PaddedBatch, pad_batch, position_ids

ATTENTION_WITH_OWN_MASK = ("eager", "sdpa")  # the implementations that take any mask (B, 1, T, T)
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Config keys for the number of positions beyond which a layer drops keys in addition to the mask.
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
    model: nn.Module,
    batch: PaddedBatch,
    num_continuations: int,
    *,
    temperature: float = 1.0,
    suppressed_ids: Sequence[int] = (),
    entropy: Entropy = False,
    chunk_size: int = 1024,
) -> ResponseScores:
    """Compute `response_logprobs` (K*B, R) of K responses to each of B queries.

    Rows of `batch` are K blocks of B rows; row k*B + b holds query b, in every block the same, and its k-th
    response. Values and gradients are those of separate rows up to rounding, which costs B * (Q + K*R) positions in
    place of B * K * (Q + R). A model that cannot share prompts, or whose attention window is narrower than the
    shared row, gets separate rows. ZeRO-3: in both cases the backbone and the head are called once each.

    Raises ValueError when the rows are not K blocks, or the blocks differ in their queries, and as
    `response_logprobs` does.

    Args:
        model: a causal language model.
        batch: queries and responses, (K*B, Q) and (K*B, R).
        num_continuations: K.
        temperature: divides the logits.
        suppressed_ids: ids that the policy never samples.
        entropy: whether the entropy is computed too, and whether with gradients.
        chunk_size: positions per chunk of the LM head.
    """
    options = {"temperature": temperature, "suppressed_ids": suppressed_ids, "entropy": entropy}
    _check_blocks(batch, num_continuations)
    if not _packs(model, batch, num_continuations):
        return response_logprobs(model, batch, **options, chunk_size=chunk_size)
    causal_lm, packed, score = unwrap_peft(model), pack_rows(batch, num_continuations), scoring(**options)
    ids, head = batch.responses[batch.response_mask], causal_lm.get_output_embeddings()
    if head_is_plain(causal_lm):
        hidden = _hidden(causal_lm.base_model, packed)[packed.predicting]
        scores = chunked_scores(head, hidden, ids, chunk_size, score)
    else:
        # The model's changes to its logits are elementwise, so the head may get fewer positions.
        hook = head.register_forward_pre_hook(lambda module, args: (args[0][packed.predicting][None],))
        try:
            logits = causal_lm(**packed_inputs(causal_lm, packed), use_cache=False).logits
        finally:
            hook.remove()
        scores = score(logits[0], ids)
    return ResponseScores(*(None if column is None else _in_rows(column, batch) for column in scores))


def continuation_values(model: nn.Module, batch: PaddedBatch, num_continuations: int) -> Tensor:
    """Compute `token_values` (K*B, R) of a scalar model for K responses to each of B queries.

    Rows, costs and errors are those of `continuation_logprobs`; 0 on padding where prompts are shared.
    """
    _check_blocks(batch, num_continuations)
    if not _packs(model, batch, num_continuations):
        return token_values(model, batch)
    scalar_model, packed = unwrap_peft(model), pack_rows(batch, num_continuations)
    return _in_rows(scalar_model.head(_hidden(scalar_model.backbone, packed)[packed.predicting]), batch)


def continuation_hidden(model: nn.Module, batch: PaddedBatch, num_continuations: int) -> Tensor:
    """Compute `token_hidden` (K*B, R+1, H) of a scalar model for K responses to each of B queries.

    Rows, costs and errors are those of `continuation_logprobs`; 0 on padding where prompts are shared.
    """
    _check_blocks(batch, num_continuations)
    longer = _with_one_more_token(batch)  # the state before it is the one after the last token
    if not _packs(model, longer, num_continuations):
        return token_hidden(model, batch)
    packed = pack_rows(longer, num_continuations)
    states = _hidden(unwrap_peft(model).backbone, packed)[packed.predicting]
    rows = states.new_zeros(*longer.responses.shape, states.shape[-1])
    return rows.masked_scatter(longer.response_mask[:, :, None], states)


def _with_one_more_token(batch: PaddedBatch) -> PaddedBatch:
    responses = torch.cat([batch.responses, torch.zeros_like(batch.responses[:, :1])], dim=1)
    mask = torch.cat([batch.response_mask[:, :1], batch.response_mask], dim=1)
    return PaddedBatch(batch.queries, batch.query_mask, responses, mask)


def _check_blocks(batch: PaddedBatch, num_continuations: int) -> None:
    if num_continuations == 1:
        return
    if num_continuations < 1 or len(batch.responses) % num_continuations:
        raise ValueError(f"{len(batch.responses)} rows are not {num_continuations} blocks of one length")
    num_queries = len(batch.responses) // num_continuations
    for ids in (batch.queries, batch.query_mask):
        blocks = ids.view(num_continuations, num_queries, -1)
        if not torch.equal(blocks, blocks[:1].expand_as(blocks)):
            raise ValueError("the blocks of rows differ in their queries; a shared prompt needs equal ones")


def _packs(model: nn.Module, batch: PaddedBatch, num_continuations: int) -> bool:
    """Return whether the rows of a batch are packed; ZeRO-3: the probe comes first, as all processes take part."""
    length = batch.responses.shape[1]
    row_length = batch.queries.shape[1] + num_continuations * (length - 1)
    return num_continuations > 1 and shares_rows(model, row_length) and length > 0


def shares_rows(model: nn.Module, row_length: int) -> bool:
    """Return whether a model takes shared rows of a length, which its windows of attention may limit."""
    return can_share_prompt(model) and row_length <= narrowest_window(_backbone(unwrap_peft(model)).config)


def _in_rows(values: Tensor, batch: PaddedBatch) -> Tensor:
    """Place the numbers of real response tokens in rows (K*B, R), 0 on padding."""
    return values.new_zeros(batch.responses.shape).masked_scatter(batch.response_mask, values)


class PackedRows(NamedTuple):
    """B rows of up to T real tokens, padded on the right: a query, then its responses one after the other.

    The last token of each response predicts nothing and is not in the row.
    """

    ids: Tensor
    """(B, T) int64, 0 on padding."""
    sources: Tensor
    """(B, T) int64: the position in the K*B separate rows (Q+R wide), end to end, that each one is a copy of."""
    positions: Tensor
    """(B, T) int64, restarting after the query for each response."""
    attends: Tensor
    """(B, T, T) bool: which position (row) attends to which (column)."""
    predicting: tuple[Tensor, Tensor]
    """Row and column that predict each real response token, in the order of `responses[response_mask]`."""


def pack_rows(batch: PaddedBatch, num_continuations: int) -> PackedRows:
    """Pack a batch of K blocks of B rows into B shared rows, T the longest of them."""
    num_queries, query_length = len(batch.queries) // num_continuations, batch.queries.shape[1]

    def side_by_side(rows: Tensor) -> Tensor:
        """Join separate rows (K*B, Q + R-1) to (B, Q + K*(R-1))."""
        responses = rows[:, query_length:].unflatten(0, (num_continuations, num_queries))
        return torch.cat([rows[:num_queries, :query_length], responses.transpose(0, 1).flatten(1)], dim=1)

    # A response token is an input when another one follows it.
    fed = torch.cat([batch.query_mask, batch.response_mask[:, 1:]], dim=1)
    mask = side_by_side(fed)
    order = mask.logical_not().long().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
    block = torch.arange(num_continuations, device=order.device).repeat_interleave(
        fed.shape[1] - query_length
    )
    block = torch.cat([block.new_full((query_length,), -1), block])[order]
    separate = torch.arange(batch.query_responses.numel(), device=order.device)
    sources = side_by_side(separate.view_as(batch.query_responses)[:, :-1]).gather(1, order)
    is_real = mask.gather(1, order)

    place = mask.cumsum(dim=1) - 1  # new place of a real column
    of_query = place[:, None, query_length - 1 : query_length].expand(-1, num_continuations, -1)
    of_responses = place[:, query_length:].unflatten(1, (num_continuations, fed.shape[1] - query_length))
    column = torch.cat([of_query, of_responses], dim=2).transpose(0, 1).flatten(0, 1)
    row = torch.arange(num_queries, device=order.device).repeat(num_continuations)[:, None].expand_as(column)
    return PackedRows(
        ids=batch.query_responses.flatten()[sources].masked_fill(is_real.logical_not(), 0),
        sources=sources,
        positions=side_by_side(position_ids(fed)).gather(1, order),
        attends=attention_pattern(block),  # padding follows all real columns
        predicting=(row[batch.response_mask], column[batch.response_mask]),
    )


def packed_states(states: Tensor | None, batch: PaddedBatch, num_continuations: int) -> Tensor | None:
    """Take the states (B, T, H) of shared rows from those of separate rows, (K*B, Q+R, H).

    Without states None; with K = 1 the rows themselves.
    """
    if states is None or num_continuations == 1:
        return states
    return states.flatten(0, 1)[pack_rows(batch, num_continuations).sources]


def shared_states(
    compute: Callable[[PackedRows], Tensor], batch: PaddedBatch, num_continuations: int
) -> Tensor:
    """Compute states (K*B, Q+R, H) of all real tokens from shared rows, 0 on padding.

    `compute` gives the states (B, T, H) of shared rows; the last token of each response has a place in these.
    """
    longer = _with_one_more_token(batch)
    packed = pack_rows(longer, num_continuations)
    states = compute(packed)
    rows = states.new_zeros(*longer.query_responses.shape, states.shape[-1])
    rows.flatten(0, 1)[packed.sources.flatten()] = states.flatten(0, 1)
    blocks = rows.unflatten(0, (num_continuations, -1))
    query_length = batch.queries.shape[1]
    blocks[1:, :, :query_length] = blocks[:1, :, :query_length]
    return rows[:, :-1].masked_fill(batch.attention_mask.logical_not().unsqueeze(2), 0)


def attention_pattern(block: Tensor) -> Tensor:
    """Return which position (row) attends to which (column), (B, T, T) bool.

    Each attends to itself and the earlier positions of the query (-1) and of its own response; `block` (B, T) is the
    response that each position belongs to.
    """
    before = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool, device=block.device).tril()
    return before & ((block[:, None, :] == -1) | (block[:, None, :] == block[:, :, None]))


def packed_inputs(model: nn.Module, packed: PackedRows) -> dict[str, Tensor]:
    """Return keyword inputs; the mask (B, 1, T, T) is bool for sdpa and additive for eager attention."""
    attends = packed.attends[:, None]
    if model.config._attn_implementation == "eager":
        dtype = model.get_input_embeddings().weight.dtype
        attends = torch.zeros_like(attends, dtype=dtype).masked_fill(
            attends.logical_not(), torch.finfo(dtype).min
        )
    return {"input_ids": packed.ids, "attention_mask": attends, "position_ids": packed.positions}


def _hidden(backbone: nn.Module, packed: PackedRows) -> Tensor:
    return backbone(**packed_inputs(backbone, packed), use_cache=False).last_hidden_state


def narrowest_window(config: PreTrainedConfig) -> float:
    """Return the longest row in which windowed (sliding, chunked) attention hides nothing; inf without windows."""
    text = config.get_text_config()
    windows = [getattr(text, name, None) for name in WINDOWS]
    return min((window for window in windows if window), default=float("inf"))


def can_share_prompt(model: nn.Module) -> bool:
    """Return whether `continuation_logprobs` may pack: only attention mixes positions, by the given mask.

    False for ALiBi and the like (positions taken from the mask), recurrent and convolutional layers, and attention
    kernels that take no custom mask. Then a probe decides, once per model and attention implementation: the hidden
    states of two tiny packed rows must be those of separate rows.
    """
    plain = unwrap_peft(model)
    backbone = _backbone(plain)
    implementation = backbone.config._attn_implementation

    def find() -> bool:
        is_stateful = getattr(plain, "_is_stateful", False)
        return backbone is not plain and not is_stateful and _may_share(backbone) and _probe(backbone)

    return answer(plain, ("shared prompt", implementation), find)


def _backbone(model: nn.Module) -> nn.Module:
    return model.backbone if isinstance(model, ScalarModel) else model.base_model


def _may_share(backbone: nn.Module) -> bool:
    text = backbone.config.get_text_config()
    return (
        backbone.config._attn_implementation in ATTENTION_WITH_OWN_MASK
        and takes_position_ids(backbone)
        and not getattr(text, "alibi", False)
        and set(getattr(text, "layer_types", None) or ()) <= MASKED_LAYERS
    )


@torch.no_grad()
def _probe(backbone: nn.Module) -> bool:
    """Return whether packing two ragged rows moves the hidden states by far less than another query does.

    The tolerance for rounding is 1% of the latter in float32, 10% in half precision.
    """
    device = backbone.get_input_embeddings().weight.device
    batch, other = (_probe_batch(first).to(device) for first in (0, 1))

    def separate(batch: PaddedBatch) -> Tensor:
        inputs = model_inputs(backbone, batch.query_responses, batch.attention_mask)
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        return hidden[:, batch.queries.shape[1] - 1 : -1][batch.response_mask].float()

    with own_precision(backbone):
        packed = pack_rows(batch, 2)
        try:
            shared = _hidden(backbone, packed)[packed.predicting].float()
        except Exception:  # models without such inputs may raise any; real faults show in separate rows
            return False
        expected, elsewhere = separate(batch), separate(other)
    allowed = 0.1 if is_half(backbone) else 0.01
    return bool((shared - expected).norm() <= allowed * (elsewhere - expected).norm())


def _probe_batch(first: int) -> PaddedBatch:
    """Make two queries with two responses each, ragged, of ids below 16; `first` changes the queries alone."""
    queries = [[first, 3, 5, 4], [first, 6]]
    return pad_batch(queries * 2, [[7, 8, 9], [10, 11], [12, 13], [14, 15, 7, 8]], 0)
