"""A 4-bit layer in a dry run: its bytes, and those of its products, without bitsandbytes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from drpo.models.nf4_linear import NF4Linear
from launch.planning.dry_run import DryRun
from launch.planning.four_bit import SizedNF4Linear, packed_sizes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "transposed"), [((3000, 4000), False), ((4000, 3000), True), ((50, 7), False)]
)
def test_layer_holds_what_a_real_one_holds(shape, transposed, monkeypatch):
    real = NF4Linear.of(torch.randn(shape), None, transposed, CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with DryRun():
        sized = SizedNF4Linear.of(torch.empty(shape), None, transposed, CPU)
        assert [part.nbytes for part in sized.parameters()] == [part.nbytes for part in real.parameters()]
        assert sized.dense_weight().shape == shape
        assert sum(packed_sizes(nn.Sequential(sized)).values()) == shape[0] * shape[1]


def test_under_autocast_input_and_dense_weight_are_in_its_precision(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with DryRun() as dry:
        layer = SizedNF4Linear.of(torch.empty(3000, 4000), None, False, CPU)
        x = torch.empty(2, 4000)
        with dry.measured() as used, torch.autocast("cpu", torch.bfloat16):
            output = layer(x)
    assert output.dtype == torch.bfloat16
    assert used.peak == 2 * (3000 * 4000 + 2 * 3000 + 2 * 4000)


def test_products_take_a_dense_weight_for_a_moment_and_keep_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    rows, dense = 2 * 3000, 3000 * 4000
    with DryRun() as dry:
        layer = SizedNF4Linear.of(torch.empty(3000, 4000), None, False, CPU)
        x = torch.empty(2, 4000, dtype=torch.bfloat16, requires_grad=True)
        with dry.measured() as forward:
            output = layer(x)
        assert (forward.peak, forward.left) == (2 * (dense + rows), 2 * rows)
        gradient = torch.ones_like(output)
        with dry.measured() as backward:
            output.backward(gradient)
    assert (backward.peak, backward.left) == (2 * (dense + 2 * 4000), 2 * 2 * 4000)
