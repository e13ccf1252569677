"""Sample from a causal language model by inverse CDF, so that a row's text is independent of its batch.

Token t of row i is the inverse CDF of the model's filtered softmax at uniforms[i, t]. The sampler draws no random
numbers: the batch of a row, its size and the number of processes change the text only where they change the
logits (by float rounding).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from drpo.config import Section, key, refuse_changed, setting
from drpo.models.decoding import head_rounded_once, keys_in_place
from drpo.models.inputs import takes_position_ids, unwrap_peft
from drpo.models.positions import check_lengths
from drpo.models.probes import check_policy
from drpo.models.scoring import suppress
from drpo.random_streams import Stream, stream
from drpo.rollout.decode_cache import decode_cache
from drpo.tensors import position_ids

_BLOCK = 256


@dataclass(frozen=True)
class SamplingConfig(Section):
    """Settings for choosing the next token."""

    temperature: float = setting(1.0, ge=0)
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_k: int = setting(0, ge=0)
    """Keep the k most likely tokens (and ties with the last of them); 0 keeps all."""
    top_p: float = setting(1.0, gt=0, le=1)
    """Keep the fewest most likely tokens whose probabilities (after top-k) sum to this; 1 keeps all."""

    def check(self) -> None:
        if self.temperature == 0:
            refuse_changed(self, ("top_k", "top_p"), f"does not apply to {key('temperature')}=0 (greedy)")


def draw_uniforms(seed: int, episodes: Sequence[int], length: int) -> Tensor:
    """Draw uniforms in [0, 1), float64 (len(episodes), length); a row depends on seed and episode alone.

    Counter-based: no state to checkpoint, the same numbers on every rank and in every batch. A longer
    `length` only appends numbers.
    """
    rows = [stream(seed, Stream.SAMPLING, episode).random(length) for episode in episodes]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)


@dataclass(frozen=True)
class Vocabulary:
    """Token ids with a role in sampling."""

    pad_id: int
    stop_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...]


@dataclass(frozen=True)
class Generated:
    """New tokens of each context, in order, and their log-probabilities on request."""

    tokens: list[list[int]]
    logprobs: list[list[float]] | None = None
    "In nats, under the distribution that was sampled from: temperature, filters and suppressed ids applied."


@torch.no_grad()
def sample(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    uniforms: Tensor,
    sampling: SamplingConfig,
    vocabulary: Vocabulary,
    batch_size: int,
    logprobs: bool = False,
) -> Generated:
    """Sample new tokens for each context, in the order of `contexts`, a sampled stop token included.

    Batches run with the longest contexts first; equal contexts are computed once, and rows that have ended leave the
    batch.

    Raises ValueError on an empty context or arguments of unequal length, FloatingPointError on logits that
    are not finite, ConfigError for a model that does not decode exactly (`check_policy`)
    or has fewer positions than a row has tokens.

    Args:
        model: a causal language model.
        contexts: token ids of each row.
        max_new_tokens: tokens after which each row ends without a stop token; 0 gives an empty list.
        uniforms: [i, t] chooses the t-th new token of row i, float64 (rows, at least max(max_new_tokens)).
        sampling: temperature and filters.
        vocabulary: ids that end a row, and ids that are never sampled.
        batch_size: rows decoded together.
        logprobs: whether to return log-probabilities.
    """
    _check(contexts, max_new_tokens, uniforms, batch_size)
    results: list[tuple[list[int], list[float]]] = [([], []) for _ in contexts]
    order = sorted(
        (row for row, budget in enumerate(max_new_tokens) if budget > 0),
        key=lambda row: (len(contexts[row]), tuple(contexts[row])),
        reverse=True,
    )
    causal_lm = unwrap_peft(model)
    check_policy(model)
    lengths = [len(context) + budget - 1 for context, budget in zip(contexts, max_new_tokens, strict=True)]
    check_lengths(causal_lm, lengths, "sampling", "give shorter prompts or fewer new tokens")
    with _evaluation_mode(model), keys_in_place(), head_rounded_once(causal_lm):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [contexts[row] for row in rows]
            budgets = [max_new_tokens[row] for row in rows]
            sampled = _sample_batch(causal_lm, batch, budgets, uniforms[rows], sampling, vocabulary, logprobs)
            for row, result in zip(rows, sampled, strict=True):
                results[row] = result
    tokens = [ids for ids, _ in results]
    return Generated(tokens, [numbers for _, numbers in results] if logprobs else None)


def _check(
    contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], uniforms: Tensor, batch_size: int
) -> None:
    if not len(contexts) == len(max_new_tokens) == len(uniforms):
        raise ValueError(
            f"{len(contexts)} contexts, {len(max_new_tokens)} max_new_tokens and {len(uniforms)} rows of "
            "uniforms; give one of each per row"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for row, (context, budget) in enumerate(zip(contexts, max_new_tokens, strict=True)):
        if len(context) == 0:
            raise ValueError(f"context {row} is empty; the first token needs a token to be predicted from")
        if not 0 <= budget <= uniforms.shape[1]:
            raise ValueError(
                f"max_new_tokens[{row}] is {budget}; it must lie between 0 and the {uniforms.shape[1]} "
                "uniforms that each row has"
            )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode within this context: in training mode, gradient checkpointing would drop the cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _sample_batch(
    causal_lm: nn.Module,
    contexts: list[Sequence[int]],
    budgets: list[int],
    uniforms: Tensor,
    sampling: SamplingConfig,
    vocabulary: Vocabulary,
    with_logprobs: bool,
) -> list[tuple[list[int], list[float]]]:
    """Sample the rows of one batch: their tokens, and the log-probabilities of these on request."""
    device = causal_lm.get_input_embeddings().weight.device
    width, longest = max(map(len, contexts)), max(budgets)
    prompts = list(dict.fromkeys(map(tuple, contexts)))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    first = torch.tensor([width - len(prompt) for prompt in prompts]).unsqueeze(1)
    attention_mask = (torch.arange(width + longest) >= first).to(device)
    positions = position_ids(attention_mask)
    attention_mask = attention_mask.long()
    padded = len(set(map(len, contexts))) > 1
    cache = decode_cache(causal_lm.config, capacity=width + longest)
    parameters = inspect.signature(causal_lm.forward).parameters
    fixed_inputs = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in parameters:
        fixed_inputs["logits_to_keep"] = 1
    with_positions = takes_position_ids(causal_lm)

    def forward(ids: Tensor, start: int, end: int) -> Tensor:
        inputs = {"input_ids": ids, **fixed_inputs}
        if padded:
            inputs["attention_mask"] = attention_mask[:, :end]
        if with_positions:
            inputs["position_ids"] = positions[:, start:end]
        return causal_lm(**inputs).logits[:, -1]

    logits = forward(ids.to(device), 0, width)
    prompt_rows = {prompt: row for row, prompt in enumerate(prompts)}
    live = list(range(len(contexts)))  # rows that are still in the batch, ended or not
    indices = torch.tensor([prompt_rows[tuple(context)] for context in contexts], device=device)
    if len(prompts) < len(contexts):
        cache.reorder_cache(indices)
    attention_mask, positions, logits = attention_mask[indices], positions[indices], logits[indices]
    last_positions = [len(context) + budget - 1 for context, budget in zip(contexts, budgets, strict=True)]
    positions = torch.minimum(positions, torch.tensor(last_positions, device=device).unsqueeze(1))
    uniforms = uniforms.to(device)

    results: list[list[int]] = [[] for _ in contexts]
    running = set(live)
    scored: list[tuple[list[int], Tensor]] = []  # at each step: the rows in the batch, and their log-probs
    for step in range(longest):
        tokens, logprobs = sample_tokens(logits, uniforms[:, step], sampling, vocabulary.suppressed_ids)
        if with_logprobs:
            scored.append((live, logprobs))
        for row, token in zip(live, tokens.tolist(), strict=True):  # the only host sync of a step
            if row not in running:
                continue
            if token < 0:
                raise FloatingPointError(
                    f"the logits of new token {step} after a context of {len(contexts[row])} tokens are not "
                    "finite: the weights or the inputs of the model have diverged"
                )
            results[row].append(token)
            if token in vocabulary.stop_ids or len(results[row]) == budgets[row]:
                running.remove(row)
        if not running:
            break
        if len(running) <= 0.875 * len(live):  # selecting copies the cache, so a few ended rows may stay
            indices = torch.tensor([i for i, row in enumerate(live) if row in running], device=device)
            live = [row for row in live if row in running]
            cache.reorder_cache(indices)
            attention_mask, positions = attention_mask[indices], positions[indices]
            uniforms, tokens = uniforms[indices], tokens[indices]
        logits = forward(tokens.unsqueeze(1), width + step, width + step + 1)
    numbers: list[list[float]] = [[] for _ in contexts]
    for rows, logprobs in scored:
        for row, value in zip(rows, logprobs.tolist(), strict=True):
            if len(numbers[row]) < len(results[row]):  # an ended row may stay
                numbers[row].append(value)
    return list(zip(results, numbers, strict=True))


def sample_tokens(
    logits: Tensor, uniforms: Tensor, sampling: SamplingConfig, suppressed_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Sample tokens (B,) int64: the smallest v whose CDF exceeds u, for the filtered softmax of logits (B, V).

    `uniforms` (B,) float64. Filters apply in the order suppressed ids, temperature, top-k, top-p, and the
    rest is renormalised. A row of logits with nan or +inf gives -1. The second result is the log-probability (B,)
    float32 of each token in the filtered softmax.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = suppress(logits.float(), suppressed_ids)
        if sampling.temperature == 0:
            best, tokens = logits.max(dim=-1)
            return tokens.masked_fill(best.isfinite().logical_not(), -1), torch.zeros_like(best)
        logits = logits / sampling.temperature
        if 0 < sampling.top_k < logits.shape[-1]:
            smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probs = torch.softmax(logits, dim=-1)
        if sampling.top_p < 1:
            probs = _keep_nucleus(probs, sampling.top_p)
        tokens = _inverse_cdf(probs, uniforms)
        chosen = probs.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
        return tokens, (chosen / probs.sum(dim=-1)).log()


def _keep_nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Set probabilities (B, V) to 0 outside the fewest most likely tokens that sum to at least `top_p`."""
    sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
    sum_before = sorted_probs.cumsum(dim=-1, dtype=torch.float64) - sorted_probs
    dropped = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, sum_before >= top_p)
    return probs.masked_fill(dropped, 0)


def _inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Find the smallest index whose cumulative sum exceeds u * total, in float64; -1 where probs (B, V) are nan.

    The sums run over blocks first and then inside the chosen block: a plain cumulative sum over a large
    vocabulary costs more than the LM head.
    """
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    cdf = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = cdf[:, -1]
    target = uniforms * total
    block = _first_above(cdf, target)
    mass_before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp(min=0).unsqueeze(1)).squeeze(1), 0)
    inside = blocks[torch.arange(len(blocks), device=probs.device), block].cumsum(dim=-1, dtype=torch.float64)
    token = block * _BLOCK + _first_above(inside, target - mass_before)
    return token.masked_fill(total.isfinite().logical_not(), -1)


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """Find the index (B,) of the first entry of each row of `cdf` (B, N) above `target` (B,).

    A target that was rounded up to the total selects the last entry with mass.
    """
    below_total = torch.nextafter(cdf[:, -1], torch.zeros_like(target))
    target = torch.minimum(target, below_total).unsqueeze(1)
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp(max=cdf.shape[1] - 1)
