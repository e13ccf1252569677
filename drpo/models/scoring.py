"""Log-probabilities of given responses; `shared_prompt` is the same for several responses to one prompt.

The backbone runs once on queries and responses; the LM head runs only on the R positions that predict
response tokens, a chunk of positions at a time, so the logits of a whole batch never exist at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drpo.models.answers import answer
from drpo.models.inputs import model_inputs, unwrap_peft
from drpo.models.probes import check_policy
from drpo.tensors import PaddedBatch, entropy_from_logits, gather_logprobs

Entropy = bool | Literal["detached"]
"""Whether the entropy is computed too; detached: without a graph, which would hold a softmax over the vocabulary."""


class ResponseScores(NamedTuple):
    """Scores `logprobs` (B, R) and, on request, `entropy` (B, R) in nats; float32, unspecified under padding."""

    logprobs: Tensor
    entropy: Tensor | None = None


Scoring = Callable[[Tensor, Tensor], ResponseScores]
"Scores ids (...) under logits (..., V)."


def response_logprobs(
    model: nn.Module,
    batch: PaddedBatch,
    *,
    temperature: float = 1.0,
    suppressed_ids: Sequence[int] = (),
    entropy: Entropy = False,
    chunk_size: int = 1024,
) -> ResponseScores:
    """Compute the log-probability of each response token: log softmax(logits / temperature)[token].

    Logits are float32, those of `suppressed_ids` the smallest finite number. At most `chunk_size` positions
    of them exist at a time: with gradients on, several chunks are recomputed one by one in the backward pass.
    Values at padded positions are finite but mean nothing.

    A model whose logits are more than its head on the backbone's output (soft-capping, logit scales) runs
    in full, with the logits of all response positions at once.

    Raises ValueError on a temperature that is not positive or a chunk_size below 1, ConfigError for a model whose
    outputs depend on padding or that has fewer positions than a row has tokens.

    Args:
        model: a causal language model.
        batch: queries and responses, (B, Q) and (B, R).
        temperature: divides the logits.
        suppressed_ids: ids that the policy never samples.
        entropy: whether the entropy is computed too, and whether with gradients.
        chunk_size: positions per chunk.
    """
    score = scoring(temperature, suppressed_ids, entropy)
    causal_lm = unwrap_peft(model)
    check_policy(model, on_any_device=True)  # probed at loading, except in half precision
    length = batch.responses.shape[1]
    ids = batch.responses.masked_fill(batch.response_mask.logical_not(), 0)
    if not head_is_plain(causal_lm):
        inputs = model_inputs(causal_lm, batch.query_responses, batch.attention_mask)
        logits = causal_lm(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        return score(logits, ids)

    backbone, head = causal_lm.base_model, causal_lm.get_output_embeddings()
    inputs = model_inputs(backbone, batch.query_responses, batch.attention_mask)
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    first = batch.queries.shape[1] - 1
    hidden = hidden[:, first : first + length].flatten(0, 1)
    scores = chunked_scores(head, hidden, ids.reshape(-1), chunk_size, score)
    return ResponseScores(*(None if column is None else column.view_as(ids) for column in scores))


def scoring(temperature: float, suppressed_ids: Sequence[int], entropy: Entropy) -> Scoring:
    """Return the function that scores ids under logits. Raises ValueError on a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive to score tokens, got {temperature}")
    return functools.partial(_score, temperature=temperature, suppressed_ids=suppressed_ids, entropy=entropy)


def chunked_scores(
    head: nn.Module, hidden: Tensor, ids: Tensor, chunk_size: int, score: Scoring | None = None
) -> ResponseScores:
    """Score ids, as (N,), under the logits that a head gives for hidden states, a chunk at a time.

    With gradients on, several chunks are recomputed one by one in the backward pass. ZeRO-3: all processes must call
    the same modules for batches of any shape, so the head is called once as a module for any number of chunks.
    Raises ValueError on a chunk_size below 1.

    Args:
        head: from hidden states (N, H) to logits (N, V).
        hidden: (N, H).
        ids: (N,) int64.
        chunk_size: positions per chunk.
        score: scores ids under logits; None for their log-probabilities alone.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 position, got {chunk_size}")
    score = score or _score
    if len(ids) <= chunk_size:
        return score(head(hidden), ids)
    logits_of = head.forward

    def score_chunk(hidden: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(column for column in score(logits_of(hidden), ids) if column is not None)

    def score_all(hidden: Tensor) -> tuple[Tensor, ...]:
        run = score_chunk
        if torch.is_grad_enabled():
            run = functools.partial(checkpoint, score_chunk, use_reentrant=False, preserve_rng_state=False)
        pairs = zip(hidden.split(chunk_size), ids.split(chunk_size), strict=True)
        chunks = [run(*pair) for pair in pairs]
        return tuple(torch.cat(columns) for columns in zip(*chunks, strict=True))

    with forward_replaced(head, score_all):
        return ResponseScores(*head(hidden))


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Make calls of `module`, hooks included, run `forward` in place of its own within this context."""
    earlier = vars(module).get("forward")  # some wrappers put one on the instance
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if earlier is not None:
            module.forward = earlier


def _score(
    logits: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    suppressed_ids: Sequence[int] = (),
    entropy: Entropy = False,
) -> ResponseScores:
    logits = logits.float() if temperature == 1.0 else logits.float() / temperature
    logits = suppress(logits, suppressed_ids)
    logprobs = gather_logprobs(logits, ids)
    if not entropy:
        return ResponseScores(logprobs)
    return ResponseScores(logprobs, entropy_from_logits(logits.detach() if entropy == "detached" else logits))


def suppress(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Set the logits (..., V) of `ids` to the smallest finite number in a copy; ids >= V have no logit."""
    existing = _on_device(tuple(ids), logits.shape[-1], logits.device)
    if not len(existing):
        return logits
    return logits.index_fill(-1, existing, torch.finfo(logits.dtype).min)


@functools.lru_cache(maxsize=16)
def _on_device(ids: tuple[int, ...], num_logits: int, device: torch.device) -> Tensor:
    """Return the ids below `num_logits`; cached, since a copy to a GPU would block at every token."""
    return torch.tensor([token for token in ids if token < num_logits], dtype=torch.long, device=device)


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Make a PEFT model exactly its base model within this context: the reference policy of a LoRA run.

    Raises TypeError on a model without an adapter.
    """
    if not hasattr(model, "disable_adapter"):
        raise TypeError(
            f"{type(model).__name__} has no adapter to switch off; use LoRA (model.lora.r > 0), or a frozen copy of "
            "the model as the reference"
        )
    with model.disable_adapter():
        yield


def head_is_plain(causal_lm: nn.Module) -> bool:
    """Return whether the logits are the output embedding of the backbone's last hidden state, and nothing else.

    A probe finds out, once per model: the head's input must be the backbone's output, and a known ramp put
    in place of the head's output must be returned as the logits (soft-capping and logit scales change it).
    """
    return answer(causal_lm, "plain head", lambda: _probe_head(causal_lm))


@torch.no_grad()
def _probe_head(causal_lm: nn.Module) -> bool:
    backbone, head = getattr(causal_lm, "base_model", causal_lm), causal_lm.get_output_embeddings()
    if backbone is causal_lm or head is None:
        return False
    head_io = {}

    def replace_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        head_io["input"] = args[0]
        ramp = torch.linspace(-100, 100, output.shape[-1], dtype=torch.float32, device=output.device)
        head_io["output"] = ramp.to(output.dtype).expand_as(output)
        return head_io["output"]

    ids = torch.zeros(1, 2, dtype=torch.long, device=causal_lm.get_input_embeddings().weight.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    hook = head.register_forward_hook(replace_output)
    try:
        logits = causal_lm(**model_inputs(causal_lm, ids, mask), use_cache=False).logits
    finally:
        hook.remove()
    outputs = backbone(**model_inputs(backbone, ids, mask), use_cache=False)
    hidden = getattr(outputs, "last_hidden_state", None)
    return (
        hidden is not None
        and "input" in head_io
        and hidden.shape == head_io["input"].shape
        and torch.allclose(hidden.float(), head_io["input"].float(), rtol=1e-3, atol=1e-5)
        and torch.equal(logits.float(), head_io["output"].float())
    )
