"""Tensor operations that all maths shares: padding, masked statistics and log-probabilities.

One layout everywhere: queries left-padded, responses right-padded, side by side, so that the response
positions are the last R columns. Masks are bool, True = counts. Masked entries never affect a result or a
gradient, not even inf or nan: they are replaced before the arithmetic, never multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Queries and responses of B episodes: queries (B, Q) left-padded, responses (B, R) right-padded.

    Ids are int64, masks bool (True = a real token). Raises ValueError when shapes or mask types disagree.
    """

    queries: Tensor
    query_mask: Tensor
    responses: Tensor
    response_mask: Tensor

    def __post_init__(self) -> None:
        queries, responses = (self.queries, self.query_mask), (self.responses, self.response_mask)
        for name, (ids, mask) in (("query", queries), ("response", responses)):
            if ids.dim() != 2 or ids.shape != mask.shape:
                shapes = f"ids {tuple(ids.shape)}, {name}_mask {tuple(mask.shape)}"
                raise ValueError(f"{name} ids and mask must share one shape (rows, length), got {shapes}")
            if mask.dtype != torch.bool:
                raise ValueError(f"{name}_mask must be bool (True = a real token), got {mask.dtype}")
        if len(self.queries) != len(self.responses):
            raise ValueError(
                f"{len(self.queries)} queries but {len(self.responses)} responses; give one of each per row"
            )

    @property
    def query_responses(self) -> Tensor:
        """Queries and responses side by side, (B, Q+R) int64."""
        return torch.cat([self.queries, self.responses], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """True on every real token of `query_responses`, (B, Q+R) bool."""
        return torch.cat([self.query_mask, self.response_mask], dim=1)

    def to(self, device: torch.device | str) -> PaddedBatch:
        """Return the batch on `device`."""
        return self._each(lambda tensor: tensor.to(device))

    def select(self, indices: Tensor | Sequence[int] | slice) -> PaddedBatch:
        """Select the rows at `indices` (int64, a bool row mask or a slice), padding width unchanged."""
        if not isinstance(indices, slice | Tensor):
            indices = torch.tensor(indices, dtype=torch.long, device=self.queries.device)
        return self._each(lambda tensor: tensor[indices])

    def _each(self, function: Callable[[Tensor], Tensor]) -> PaddedBatch:
        return PaddedBatch(*(function(getattr(self, field.name)) for field in fields(self)))


def pad_batch(
    query_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    pad_id: int,
    query_length: int | None = None,
    response_length: int | None = None,
) -> PaddedBatch:
    """Left-pad the queries and right-pad the responses.

    The masks come from the lengths of the rows, so a token that happens to equal `pad_id` still counts.
    Raises ValueError on no rows, unequal numbers of rows, an empty query or a row longer than its length.

    Args:
        query_ids: B rows of ids, none empty, since the first response token is predicted from its query.
        response_ids: B rows of ids, which may be empty.
        pad_id: fills the rest of a row.
        query_length, response_length: Q and R; None for the longest row.
    """
    if not query_ids or len(query_ids) != len(response_ids):
        raise ValueError(
            f"got {len(query_ids)} queries and {len(response_ids)} responses; "
            "give at least one row, and one of each per row"
        )
    for row, ids in enumerate(query_ids):
        if len(ids) == 0:
            raise ValueError(
                f"query {row} is empty; the first response token needs a token to be predicted from"
            )
    queries, query_mask = _pad(query_ids, pad_id, query_length, left=True, name="query")
    responses, response_mask = _pad(response_ids, pad_id, response_length, left=False, name="response")
    return PaddedBatch(queries, query_mask, responses, response_mask)


def _pad(
    rows: Sequence[Sequence[int]], pad_id: int, length: int | None, left: bool, name: str
) -> tuple[Tensor, Tensor]:
    lengths = [len(ids) for ids in rows]
    width = max(lengths) if length is None else length
    padded = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, ids in enumerate(rows):
        if lengths[row] > width:
            raise ValueError(
                f"{name} {row} has {lengths[row]} tokens but {name}_length is {width}; truncate it first"
            )
        columns = slice(width - lengths[row], width) if left else slice(0, lengths[row])
        padded[row, columns] = torch.tensor(list(ids), dtype=torch.long)
        mask[row, columns] = True
    return padded, mask


def position_ids(attention_mask: Tensor) -> Tensor:
    """Count positions over real tokens only, (B, T) int64: cumsum(mask) - 1, and 0 on padding.

    Models with learned positions need this under left padding.
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).masked_fill(attention_mask.logical_not(), 0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `x` where `mask` is True, over all entries or along `dim`; an empty mask sums to 0."""
    return torch.where(mask, x, 0).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average `x` where `mask` is True; raise ValueError on an empty mask."""
    mask = mask.broadcast_to(x.shape)
    count = int(mask.sum())
    if count == 0:
        raise ValueError(f"the mean of nothing: the mask of shape {tuple(mask.shape)} has no True entry")
    return masked_sum(x, mask) / count


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Compute the population variance where `mask` is True, (1/n) sum (x - mean)^2, in the dtype of `x`.

    Computed in float64. Raises ValueError on an empty mask.
    """
    return _masked_moments(x, mask)[2].to(x.dtype)


def _masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counted = torch.where(mask, x, 0).double()
    mean = masked_mean(counted, mask)
    return counted, mean, masked_mean((counted - mean) ** 2, mask)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the entries where `mask` is True to unit variance: (x - mean) / sqrt(var + eps).

    With `shift_mean=False` the mean is added back afterwards. Masked entries of the result are 0.
    mean and var are the masked mean and population variance. Raises ValueError on an empty mask.
    """
    counted, mean, var = _masked_moments(x, mask)
    whitened = (counted - mean) * torch.rsqrt(var + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0).to(x.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Compute the returns' variance that the critic explains: 1 - Var(returns - values) / Var(returns).

    1 is perfect, 0 no better than a constant; nan when the returns do not vary. Raises ValueError on an
    empty mask.
    """
    var = _masked_moments(returns, mask)[2]
    residual = _masked_moments(returns.double() - values.double(), mask)[2]
    return torch.where(var > 0, 1 - residual / var, torch.nan).to(returns.dtype)


def gather_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute log-probabilities (B, R), float32, of `ids` (B, R) under `logits` (B, R, V): log softmax(logits)."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Compute the softmax entropy over the last axis in nats, float32: -sum_v p_v log p_v; logits may be -inf."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    probs = logprobs.exp()
    return -(probs * logprobs.masked_fill(probs == 0, 0)).sum(dim=-1)
