from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from drpo.rollout.decode_cache import PreallocatedLayer, decode_cache


def states(num_rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, num_rows, 3, length, 4, generator=generator)
    return keys, values


def test_appending_and_selecting_equal_transformers_own_layer():
    ours, theirs = PreallocatedLayer(capacity=9), DynamicLayer()
    num_rows = 4
    for step, rows in enumerate([None, [2, 0, 2, 3, 1], None, [4, 1], [0]]):
        new = states(num_rows, 5 if step == 0 else 1, seed=step)
        for mine, reference in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, reference)
        if rows is not None:
            ours.reorder_cache(torch.tensor(rows))
            theirs.reorder_cache(torch.tensor(rows))
            num_rows = len(rows)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length() == 5 + step


def test_a_step_writes_in_place():
    layer = PreallocatedLayer(capacity=8)
    keys, _ = layer.update(*states(2, 5, seed=0))
    grown, _ = layer.update(*states(2, 1, seed=1))
    assert grown.data_ptr() == keys.data_ptr()


def test_a_layer_that_was_never_written_can_be_selected_from():
    PreallocatedLayer(capacity=8).reorder_cache(torch.tensor([0]))


@pytest.mark.parametrize("model_type", ["gpt_neox", "gemma2", "mistral", "bloom"])
def test_attention_layers_of_every_kind_are_preallocated(model_type):
    cache = decode_cache(tiny_model(model_type).config, capacity=8)
    assert isinstance(cache, DynamicCache)
    assert [type(layer) for layer in cache.layers] == [PreallocatedLayer] * 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gemma2", "qwen3", "gpt2"])
def test_buffers_in_the_precision_of_autocast_change_no_logit(model_type, attention):
    model = tiny_model(model_type).eval()
    model.set_attn_implementation(attention)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    logits = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for name, cache in {"own": decode_cache(model.config, 6), "theirs": DynamicCache()}.items():
            first = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:]
            second = model(first.argmax(-1), past_key_values=cache, use_cache=True).logits
            logits[name] = torch.cat([first, second])
            if name == "own":
                assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
    assert torch.equal(logits["own"], logits["theirs"])
