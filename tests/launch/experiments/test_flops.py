"""Operations of a forward, counted by hand and by torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from launch.experiments.flops import Shape, forward_flops, matmul_rate


def test_forward_of_one_token_by_hand():
    # Width 2, one layer, MLP of 3: 4 * 4 + 2 * 6 = 28 weights; attention 4 * 1 * 2; head 2 * 5 on a response token.
    assert forward_flops(Shape(2, 1, 3, 5), prompt=0, response=1, outputs=5) == 2 * 28 + 8 + 2 * 10
    assert forward_flops(Shape(2, 1, 3, 5), prompt=1, response=0, outputs=5) == 2 * 28 + 8


def test_forward_is_what_torch_counts():
    shape = Shape(width=16, num_layers=3, intermediate=40, vocabulary=50)
    config = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40, vocab_size=50
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(11)[None])
    # The model's head reads all 11 tokens. Rotary frequencies, a product of 4 by 11 numbers, are not counted by us.
    expected = forward_flops(shape, prompt=0, response=11, outputs=50)
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)


def test_rate_of_products_is_a_rate():
    assert 1e8 < matmul_rate(torch.float32) < 1e16
