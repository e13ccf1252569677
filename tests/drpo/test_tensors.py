"""Padding, masked statistics and log-probabilities: by hand, by loop, and with inf and nan under the mask."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from drpo.tensors import (
    PaddedBatch,
    entropy_from_logits,
    explained_variance,
    gather_logprobs,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    pad_batch,
    position_ids,
)

T, F = True, False


def random_masked(seed: int, rows: int = 7, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=generator) * 3 + 1
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[0] = True
    return x, mask


def counted(x: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The entries that count, by a plain loop."""
    return [x[i, j].item() for i in range(x.shape[0]) for j in range(x.shape[1]) if mask[i, j]]


def test_pad_batch_pads_queries_left_and_responses_right():
    batch = pad_batch([[5, 6], [7]], [[8], [9, 10, 11]], pad_id=0)
    assert batch.queries.tolist() == [[5, 6], [0, 7]]
    assert batch.query_mask.tolist() == [[T, T], [F, T]]
    assert batch.responses.tolist() == [[8, 0, 0], [9, 10, 11]]
    assert batch.response_mask.tolist() == [[T, F, F], [T, T, T]]
    assert batch.query_responses.tolist() == [[5, 6, 8, 0, 0], [0, 7, 9, 10, 11]]
    assert batch.attention_mask.tolist() == [[T, T, T, F, F], [F, T, T, T, T]]
    assert batch.queries.dtype == batch.responses.dtype == torch.int64


def test_pad_batch_to_given_lengths():
    batch = pad_batch([[5]], [[8, 9]], pad_id=3, query_length=3, response_length=4)
    assert batch.query_responses.tolist() == [[3, 3, 5, 8, 9, 3, 3]]
    assert batch.attention_mask.tolist() == [[F, F, T, T, T, F, F]]


def test_a_token_equal_to_the_pad_id_still_counts():
    batch = pad_batch([[0, 5]], [[0, 7]], pad_id=0)
    assert batch.attention_mask.tolist() == [[T, T, T, T]]


def test_pad_batch_allows_an_empty_response():
    batch = pad_batch([[5], [5]], [[], [8]], pad_id=0)
    assert batch.response_mask.tolist() == [[F], [T]]


@pytest.mark.parametrize(
    ("queries", "responses", "lengths", "message"),
    [
        ([], [], {}, "0 queries and 0 responses"),
        ([[1]], [[1], [2]], {}, "1 queries and 2 responses"),
        ([[1], []], [[1], [2]], {}, "query 1 is empty"),
        ([[1, 2]], [[1]], {"query_length": 1}, "query 0 has 2 tokens but query_length is 1"),
        ([[1]], [[1, 2]], {"response_length": 1}, "response 0 has 2 tokens but response_length is 1"),
    ],
)
def test_pad_batch_refuses(queries, responses, lengths, message):
    with pytest.raises(ValueError, match=message):
        pad_batch(queries, responses, 0, **lengths)


def test_padded_batch_refuses_shapes_that_disagree_and_masks_that_are_not_bool():
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="share one shape"):
        PaddedBatch(ids, mask[:, :2], ids, mask)
    with pytest.raises(ValueError, match="response_mask must be bool"):
        PaddedBatch(ids, mask, ids, ids)
    with pytest.raises(ValueError, match="2 queries but 1 responses"):
        PaddedBatch(ids, mask, ids[:1], mask[:1])


@pytest.mark.parametrize("indices", [[2, 0], torch.tensor([2, 0])])
def test_select_takes_rows_and_leaves_the_batch_alone(indices):
    batch = pad_batch([[1], [2, 3], [4]], [[5], [6], [7, 8]], pad_id=0)
    before = batch.query_responses.clone()
    chosen = batch.select(indices)
    assert chosen.query_responses.tolist() == [[0, 4, 7, 8], [0, 1, 5, 0]]
    assert chosen.attention_mask.tolist() == [[F, T, T, T], [F, T, T, F]]
    assert torch.equal(batch.query_responses, before)


def test_select_takes_a_slice_and_a_row_mask():
    batch = pad_batch([[1], [2], [3]], [[4], [5], [6]], pad_id=0)
    assert batch.select(slice(1, 3)).queries.tolist() == [[2], [3]]
    assert batch.select(torch.tensor([T, F, T])).responses.tolist() == [[4], [6]]


def test_to_moves_every_field():
    moved = pad_batch([[1]], [[2]], pad_id=0).to("meta")
    fields = (moved.queries, moved.query_mask, moved.responses, moved.response_mask)
    assert all(field.device.type == "meta" for field in fields)


def test_position_ids_count_real_tokens_only():
    mask = torch.tensor([[F, F, T, T, T], [T, T, F, F, F], [F, T, T, F, F]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_masked_statistics_equal_a_plain_loop(seed):
    x, mask = random_masked(seed)
    entries = counted(x, mask)
    mean = sum(entries) / len(entries)
    var = sum((entry - mean) ** 2 for entry in entries) / len(entries)
    assert masked_sum(x, mask).item() == pytest.approx(sum(entries), rel=1e-5)
    assert masked_mean(x, mask).item() == pytest.approx(mean, rel=1e-5)
    assert masked_var(x, mask).item() == pytest.approx(var, rel=1e-5)
    for i in range(len(x)):
        row = counted(x[i : i + 1], mask[i : i + 1])
        assert masked_sum(x, mask, dim=1)[i].item() == pytest.approx(sum(row), rel=1e-5, abs=1e-6)


def test_masks_broadcast():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    columns = torch.tensor([T, F])
    assert masked_sum(x, columns).item() == 4.0
    assert masked_mean(x, columns).item() == 2.0  # (1 + 3) / 2, not / 1


def test_empty_masks():
    x, none = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(x, none).item() == 0.0
    for function in (masked_mean, masked_var, masked_whiten):
        with pytest.raises(ValueError, match="no True entry"):
            function(x, none)


def test_whitening_by_hand():
    # Counted entries 1, 3, 5, 7: mean 4, deviations -3 -1 1 3, var (9 + 1 + 1 + 9) / 4 = 5, std sqrt(5).
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, -99.0]])
    mask = torch.tensor([[T, T, F], [T, T, F]])
    s = math.sqrt(5)
    expected = torch.tensor([[-3 / s, -1 / s, 0.0], [1 / s, 3 / s, 0.0]])
    torch.testing.assert_close(masked_whiten(x, mask), expected)
    # With the mean kept, 4 is added back to counted entries alone.
    expected = torch.tensor([[4 - 3 / s, 4 - 1 / s, 0.0], [4 + 1 / s, 4 + 3 / s, 0.0]])
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), expected)
    # eps stands inside the root: var + eps = 5 + 4 = 9.
    expected = torch.tensor([[-1.0, -1 / 3, 0.0], [1 / 3, 1.0, 0.0]])
    torch.testing.assert_close(masked_whiten(x, mask, eps=4.0), expected)


def test_whitening_one_entry_gives_zero():
    assert masked_whiten(torch.tensor([[7.0, 1.0]]), torch.tensor([[T, F]])).tolist() == [[0.0, 0.0]]


def test_variance_is_computed_in_float64():
    # 1e4 + {0, 1, 2, 3}: the variance is 1.25. In float32, E[x^2] - E[x]^2 would lose it among 1e8.
    x = torch.tensor([[10000.0, 10001.0, 10002.0, 10003.0]])
    assert masked_var(x, torch.ones_like(x, dtype=torch.bool)).item() == 1.25


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "function", [masked_sum, masked_mean, masked_var, lambda x, m: masked_whiten(x, m).pow(3).sum()]
)
def test_nothing_leaks_from_under_the_mask(function, bad):
    x, mask = random_masked(3)
    clean = x.clone().requires_grad_()
    dirty = torch.where(mask, x, torch.tensor(bad)).requires_grad_()
    expected, got = function(clean, mask), function(dirty, mask)
    assert got.item() == expected.item() and math.isfinite(got.item())
    expected.backward()
    got.backward()
    assert torch.equal(dirty.grad, clean.grad)
    assert dirty.grad[mask.logical_not()].abs().max() == 0
    assert dirty.grad[mask].abs().max() > 0


def test_inputs_are_not_changed():
    x, mask = random_masked(4)
    x_before, mask_before = x.clone(), mask.clone()
    for function in (masked_sum, masked_mean, masked_var, masked_whiten):
        function(x, mask)
    explained_variance(x, x + 1, mask)
    assert torch.equal(x, x_before) and torch.equal(mask, mask_before)


def test_explained_variance_by_hand():
    # Returns 0, 2, 4: var 8/3. Residuals G - V = -1, 1, 0: mean 0, var 2/3. So 1 - (2/3) / (8/3) = 0.75.
    returns = torch.tensor([[0.0, 2.0, 4.0, math.nan]])
    values = torch.tensor([[1.0, 1.0, 4.0, 50.0]])
    mask = torch.tensor([[T, T, T, F]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(0.75)
    assert explained_variance(returns + 9, returns, mask).item() == pytest.approx(
        1.0
    )  # a shift costs nothing
    assert explained_variance(torch.full_like(returns, 5.0), returns, mask).item() == pytest.approx(0.0)
    assert math.isnan(explained_variance(values, torch.ones_like(values), mask).item())


def test_gather_logprobs_equals_numpy():
    logits = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0)) * 5
    ids = torch.randint(0, 9, (3, 4), generator=torch.Generator().manual_seed(1))
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=-1, keepdims=True)
    expected = [[math.log(p[i, j, ids[i, j].item()]) for j in range(4)] for i in range(3)]
    got = gather_logprobs(logits, ids)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_bfloat16_logits_are_scored_in_float32():
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(2)).bfloat16()
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(gather_logprobs(logits, ids), gather_logprobs(logits.float(), ids))
    assert torch.equal(entropy_from_logits(logits), entropy_from_logits(logits.float()))


def test_entropy_by_hand():
    # Probabilities 1/2, 1/4, 1/4: H = 1/2 log 2 + 2 * 1/4 * log 4 = 1.5 log 2.
    # Uniform over 4: log 4. Certain: 0.
    logits = torch.tensor([[2.0, 1.0, 1.0, -math.inf], [1.0] * 4, [0.0] + [-math.inf] * 3])
    logits[0, :3] = torch.tensor([0.5, 0.25, 0.25]).log()
    expected = torch.tensor([1.5 * math.log(2), math.log(4), 0.0])
    torch.testing.assert_close(entropy_from_logits(logits), expected)


@pytest.mark.parametrize("suppressed", [-math.inf, torch.finfo(torch.float32).min])
def test_entropy_of_suppressed_tokens_has_a_clean_gradient(suppressed):
    allowed = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
    entropy_from_logits(torch.cat([allowed, torch.tensor([suppressed, suppressed])])).backward()
    # dH/dz_v = -p_v (log p_v + H)
    p = np.exp([0.3, -1.0, 2.0])
    p /= p.sum()
    entropy = -(p * np.log(p)).sum()
    np.testing.assert_allclose(allowed.grad.numpy(), -p * (np.log(p) + entropy), rtol=1e-5)
