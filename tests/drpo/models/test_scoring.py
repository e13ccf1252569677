from __future__ import annotations

import pytest
import torch
from logit_rows import logit_rows
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model

from drpo.models.scoring import head_is_plain, response_logprobs
from drpo.tensors import PaddedBatch, pad_batch

PAD = 2
LENGTHS = [(3, 5), (12, 1), (20, 9), (1, 7)]
CAPPED = {"gemma2"}


def ragged_rows(lengths=LENGTHS, seed=0) -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()

    return [draw(q) for q, _ in lengths], [draw(r) for _, r in lengths]


def ragged_batch(**lengths) -> PaddedBatch:
    return pad_batch(*ragged_rows(), PAD, **lengths)


def alone(model, query: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities by the model's own full logits on one unpadded row, token by token."""
    logits = model(torch.tensor([query + response])).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    return torch.stack([logprobs[len(query) + t - 1, token] for t, token in enumerate(response)])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_row_in_a_padded_batch_scores_as_alone(model_type):
    model = tiny_model(model_type)
    queries, responses = ragged_rows()
    batch = pad_batch(queries, responses, PAD, query_length=23, response_length=11)
    with torch.no_grad():
        logprobs = response_logprobs(model, batch, chunk_size=7).logprobs
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            expected = alone(model, query, response)
            assert len(response) == 1 or expected.std() > 0.1, "a flat model would prove nothing"
            torch.testing.assert_close(logprobs[row, : len(response)], expected, atol=1e-5, rtol=0)
    assert logprobs.dtype == torch.float32 and torch.isfinite(logprobs).all()


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox"])
def test_eager_attention_is_exact_under_padding_too(model_type):
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    queries, responses = ragged_rows()
    with torch.no_grad():
        logprobs = response_logprobs(model, ragged_batch()).logprobs
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            expected = alone(model, query, response)
            torch.testing.assert_close(logprobs[row, : len(response)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_pad_ids_are_never_fed(model_type):
    model = tiny_model(model_type)
    queries, responses = ragged_rows()
    with torch.no_grad():
        outside = response_logprobs(model, pad_batch(queries, responses, VOCAB_SIZE + 5))
        inside = response_logprobs(model, pad_batch(queries, responses, PAD))
    assert torch.equal(outside.logprobs, inside.logprobs)


@pytest.mark.parametrize("model_type", ["gpt_neox", "opt", "gemma2"])
@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_gradients_equal_those_of_the_full_logits(model_type, chunk_size):
    model = tiny_model(model_type)
    queries, responses = ragged_rows()
    batch = pad_batch(queries, responses, PAD)
    weights = torch.randn(batch.responses.shape, generator=torch.Generator().manual_seed(1))

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = sum(
        (alone(model, query, response, temperature=0.7) * weights[row, : len(response)]).sum()
        for row, (query, response) in enumerate(zip(queries, responses, strict=True))
    )
    expected_gradients = gradients(expected)
    logprobs = response_logprobs(model, batch, temperature=0.7, chunk_size=chunk_size).logprobs
    got = gradients((logprobs * weights)[batch.response_mask].sum())
    assert got.keys() == expected_gradients.keys() and len(got) > 10
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(got[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logits_of_a_whole_batch_never_exist(model_type):
    model = tiny_model(model_type)
    batch = ragged_batch()
    head_is_plain(model)
    with logit_rows(VOCAB_SIZE) as rows:
        logprobs = response_logprobs(model, batch, chunk_size=5).logprobs
    num_positions = batch.responses.numel()
    if model_type in CAPPED:
        assert rows == [num_positions + len(batch.responses)], "the response columns and one more"
    else:
        assert max(rows) == 5 and sum(rows) == num_positions
        with logit_rows(VOCAB_SIZE) as rows:
            logprobs.sum().backward()
        assert max(rows) == 5 and sum(rows) == num_positions, "recomputed chunk by chunk"


@pytest.mark.parametrize("grad", [True, False])
def test_the_head_is_called_once_whatever_the_number_of_chunks(grad):
    """ZeRO-3 gathers weights at every call: processes with batches of other shapes must make the same calls."""
    model = tiny_model("gpt_neox")
    head_is_plain(model)
    head, calls = model.get_output_embeddings(), []
    head.register_forward_hook(lambda *args: calls.append(args))
    for chunk_size in (3, 1000):
        calls.clear()
        with torch.set_grad_enabled(grad):
            logprobs = response_logprobs(model, ragged_batch(), chunk_size=chunk_size).logprobs
        if grad:
            logprobs.sum().backward()
        assert len(calls) == 1
    hidden = torch.randn(2, 32)
    assert torch.equal(head(hidden), hidden @ head.weight.T), "and is left as it was"
    assert "forward" not in vars(head)


def test_a_forward_that_a_wrapper_put_on_the_head_stays():
    model = tiny_model("gpt_neox")
    expected = response_logprobs(model, ragged_batch()).logprobs
    head = model.get_output_embeddings()
    head.forward = lambda hidden: type(head).forward(head, hidden) * 2
    wrapped = head.forward
    doubled = response_logprobs(model, ragged_batch(), chunk_size=4).logprobs
    assert head.forward is wrapped
    torch.testing.assert_close(
        doubled, response_logprobs(tiny_model("gpt_neox"), ragged_batch(), temperature=0.5).logprobs
    )
    assert not torch.allclose(doubled, expected)


def test_plain_heads_are_told_from_capped_and_scaled_ones():
    assert [name for name in ARCHITECTURES if not head_is_plain(tiny_model(name))] == ["gemma2"]
    # A cap of 1e4 changes these logits by less than float32 resolves, and is found all the same.
    assert not head_is_plain(tiny_model("gemma2", final_logit_softcapping=1e4))
    assert head_is_plain(tiny_model("gemma2", final_logit_softcapping=None))


def test_temperature_suppressed_ids_and_entropy():
    model = tiny_model("llama")
    query, response = [5, 9, 14], [7, 8, 30, 1]
    batch = pad_batch([query], [response], PAD)
    with torch.no_grad():
        logits = model(torch.tensor([query + response])).logits[0].double()
        scores = response_logprobs(
            model,
            batch,
            temperature=0.5,
            suppressed_ids=[PAD, 11, VOCAB_SIZE + 3],
            entropy=True,
            chunk_size=3,
        )
    for t, token in enumerate(response):
        weights = torch.exp(2 * logits[len(query) + t - 1])
        weights[[PAD, 11]] = 0
        probs = weights / weights.sum()
        entropy = -sum(p * torch.log(p) for p in probs if p > 0)
        assert scores.logprobs[0, t].item() == pytest.approx(torch.log(probs[token]).item(), abs=1e-5)
        assert scores.entropy[0, t].item() == pytest.approx(entropy.item(), abs=1e-5)


def test_entropy_is_only_computed_when_asked_for():
    assert response_logprobs(tiny_model("llama"), ragged_batch()).entropy is None


def test_a_suppressed_token_in_a_response_scores_finite():
    batch = pad_batch([[3, 4]], [[5, PAD]], PAD)
    logprobs = response_logprobs(tiny_model("gpt2"), batch, temperature=0.3, suppressed_ids=[PAD]).logprobs
    assert torch.isfinite(logprobs).all() and logprobs[0, 1] < -1e30


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rollout_and_training_scores_agree_bit_for_bit_under_bf16_autocast(model_type, checkpointing):
    model = tiny_model(model_type)
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = ragged_batch()
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        old = response_logprobs(model, batch, chunk_size=8).logprobs
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        new = response_logprobs(model, batch, chunk_size=8).logprobs
    assert new.requires_grad and old.dtype == torch.float32
    assert torch.equal(old, new)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_bf16_scores_do_not_depend_on_the_micro_batch(model_type):
    model = tiny_model(model_type)
    batch = pad_batch(*ragged_rows(LENGTHS * 2), PAD)
    with torch.autocast("cpu", torch.bfloat16):
        whole = response_logprobs(model, batch).logprobs
        rows = [5, 0, 6]
        part = response_logprobs(model, batch.select(rows)).logprobs
    real = batch.response_mask[rows]
    assert torch.equal(whole[rows][real], part[real])


def test_rejects_bad_settings():
    with pytest.raises(ValueError, match="temperature"):
        response_logprobs(tiny_model("gpt2"), ragged_batch(), temperature=0.0)
    with pytest.raises(ValueError, match="chunk_size"):
        response_logprobs(tiny_model("gpt2"), ragged_batch(), chunk_size=0)
