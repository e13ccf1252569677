"""A 4-bit linear layer against the 16 values of NF4, block by block, and against dense products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from drpo.models.nf4_linear import NF4Linear

CODE = [  # Dettmers et al. 2023 (QLoRA), appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]
CPU = torch.device("cpu")


def matrix(*shape: int, seed: int = 0) -> Tensor:
    """Rows of different sizes, so that the scales of the blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)


def layer_of(weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> NF4Linear:
    return NF4Linear.of(weight, None if bias is None else nn.Parameter(bias, False), transposed, CPU)


@pytest.mark.parametrize("shape", [(64, 64), (48, 20), (33, 7), (300, 96)])
def test_each_weight_is_the_nearest_of_sixteen_values_times_its_blocks_scale(shape):
    weight = matrix(*shape)
    found = layer_of(weight).dense_weight()
    blocks = [
        (exact.tolist(), values.tolist())
        for row in range(shape[0])
        for exact, values in zip(weight[row].split(64), found[row].split(64), strict=True)
    ]
    scales = [max(map(abs, exact)) for exact, _ in blocks]
    mean = sum(scales) / len(scales)
    for number, (block, values) in enumerate(blocks):
        # 8 bits a scale: less the mean, relative to the largest of 256; their values are at most 0.0141 apart.
        group = scales[number // 256 * 256 :][:256]
        allowed = 0.0071 * max(abs(each - mean) for each in group) + 1e-6
        held = max(map(abs, values))
        assert held == pytest.approx(scales[number], abs=allowed)
        for exact, value in zip(block, values, strict=True):
            nearest = min(CODE, key=lambda code: abs(code - exact / scales[number]))
            assert value == pytest.approx(nearest * held, abs=1e-6)


def test_a_weight_takes_4_bits_and_the_scales_a_64th_of_a_byte_and_a_bit_more():
    layer = layer_of(matrix(512, 1024))
    num_weights = 512 * 1024
    num_bytes = sum(part.nbytes for part in layer.parameters())
    assert num_bytes == num_weights / 2 + num_weights / 64 + 4 * num_weights / (64 * 256) + 4


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_output_and_gradient_are_those_of_the_dense_weight_that_it_returns(transposed):
    weight, bias = matrix(20, 48), torch.linspace(-1, 1, 48 if transposed else 20)
    layer = layer_of(weight, bias, transposed)
    dense = layer.dense_weight()
    assert dense.shape == weight.shape and not torch.equal(dense, weight)
    if not transposed:
        dense = dense.T
    x = torch.randn(3, 5, dense.shape[0], generator=torch.Generator().manual_seed(1)).requires_grad_()
    output = layer(x)
    torch.testing.assert_close(output, x @ dense + bias, rtol=0, atol=1e-5)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(output, x, upstream)
    torch.testing.assert_close(gradient, upstream @ dense.T, rtol=0, atol=1e-5)


def test_with_and_without_gradients_in_training_and_evaluation_outputs_are_equal_bit_for_bit():
    layer, x = layer_of(matrix(64, 64)), torch.randn(2, 3, 64)  # sizes that bitsandbytes has a fast path for
    expected = layer(x.clone().requires_grad_()).detach()
    before = [part.clone() for part in layer.parameters()]
    for training in (True, False):
        with torch.no_grad():
            assert torch.equal(layer.train(training)(x), expected)
    assert all(torch.equal(part, kept) for part, kept in zip(layer.parameters(), before, strict=True))


def test_it_computes_in_the_precision_of_autocast_or_of_its_input():
    layer, x = layer_of(matrix(20, 48), torch.zeros(20)), torch.randn(3, 48)
    assert layer(x).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0, atol=0.1)


def test_a_cast_of_the_module_and_a_checkpoint_leave_the_weight_as_it_is():
    layer = layer_of(matrix(48, 64), torch.ones(48))
    expected = layer.dense_weight()
    state = {name: part.clone() for name, part in layer.state_dict().items()}
    assert torch.equal(layer.bfloat16().dense_weight(), expected)
    other = layer_of(matrix(48, 64, seed=1), torch.zeros(48))
    assert not torch.equal(other.dense_weight(), expected)
    other.load_state_dict(state)
    assert torch.equal(other.dense_weight(), expected)
    assert not any(part.requires_grad for part in layer.parameters())
