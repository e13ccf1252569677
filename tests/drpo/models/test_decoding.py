"""Savings in decoding change no bit of the logits, and no model for good."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

from drpo.models.adapters import add_lora
from drpo.models.decoding import head_rounded_once, keys_in_place
from drpo.models.frozen_weights import round_frozen
from drpo.models.inputs import model_inputs, unwrap_peft
from drpo.rollout.decode_cache import decode_cache
from drpo.tensors import pad_batch


def logits(model: nn.Module) -> list[Tensor]:
    """Of a prompt of two ragged rows, and of three more tokens, one at a time."""
    batch = pad_batch([[3, 4, 5, 6, 7], [8, 9]], [[], []], 0)
    mask = torch.cat([batch.attention_mask, torch.ones(2, 3, dtype=torch.bool)], dim=1)
    cache = decode_cache(model.config, capacity=8)
    inputs = model_inputs(model, batch.queries, batch.query_mask)
    found = [model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
    for step in range(3):
        positions = mask[:, : 6 + step].sum(dim=1, keepdim=True) - 1
        ids = torch.tensor([[10 + step], [13 + step]])
        inputs = {"input_ids": ids, "attention_mask": mask[:, : 6 + step].long(), "position_ids": positions}
        found.append(model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1])
    return found


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral"])
@torch.no_grad()
def test_grouped_queries_give_the_logits_of_copied_keys(name, dtype, monkeypatch):
    model = tiny_model(name, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa").to(
        dtype
    )
    copies: list[int] = []
    copy = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda states, n: copies.append(n) or copy(states, n))
    expected = logits(model)
    assert copies and set(copies) == {2}
    copies.clear()
    with keys_in_place():
        assert_equal(logits(model), expected)
    assert copies == []
    logits(model)
    assert copies


def test_transformers_own_decision_is_back_after_an_error():
    decide = sdpa_attention.use_gqa_in_sdpa
    with pytest.raises(RuntimeError, match="in between"), keys_in_place():
        assert sdpa_attention.use_gqa_in_sdpa is not decide
        raise RuntimeError("in between")
    assert sdpa_attention.use_gqa_in_sdpa is decide


def test_a_version_without_that_decision_copies_as_before(monkeypatch):
    monkeypatch.delattr(sdpa_attention, "use_gqa_in_sdpa")
    with keys_in_place():
        assert not hasattr(sdpa_attention, "use_gqa_in_sdpa")


@torch.no_grad()
def test_a_version_that_decides_by_mask_and_keys_alone_is_served(monkeypatch):
    """As that of transformers 5.0."""
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda attention_mask, key: False)
    with keys_in_place():
        assert sdpa_attention.use_gqa_in_sdpa(None, torch.zeros(1))
        assert not sdpa_attention.use_gqa_in_sdpa(None, torch.zeros(1, device="meta"))


def test_calls_that_overlap_leave_nothing_behind():
    """As in two threads: the one that came first ends first."""
    decide = sdpa_attention.use_gqa_in_sdpa
    first, second = keys_in_place(), keys_in_place()
    for context in (first, second):
        context.__enter__()
    for context in (first, second):
        context.__exit__(None, None, None)
    assert sdpa_attention.use_gqa_in_sdpa is decide


def policy(tied: bool) -> nn.Module:
    model = add_lora(
        tiny_model("llama", tie_word_embeddings=tied), r=2, alpha=4.0, target_modules=None, seed=0
    )
    round_frozen(model)
    return unwrap_peft(model)


@torch.no_grad()
def test_a_tied_head_is_rounded_once():
    model = policy(tied=True)
    head = model.get_output_embeddings()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
        with head_rounded_once(model):
            assert_equal(logits(model), expected)
            embedding = head.weight.clone()
            hidden = torch.ones(1, head.in_features)
            before = head(hidden)
            head.weight.zero_()  # what is read is the rounded copy
            assert torch.equal(head(hidden), before) and before.dtype == torch.bfloat16
        assert not head(hidden).any()
        head.weight.copy_(embedding)
        assert_equal(logits(model), expected)


@torch.no_grad()
def test_other_heads_are_left_alone():
    trained, untied, tied = tiny_model("llama", tie_word_embeddings=True), policy(False), policy(True)
    with torch.autocast("cpu", torch.bfloat16):
        for model in (trained, untied):  # autocast keeps the rounded copy; the matrix is in bf16
            with head_rounded_once(model):
                assert "forward" not in vars(model.get_output_embeddings())
    with head_rounded_once(tied):  # float32
        assert "forward" not in vars(tied.get_output_embeddings())
