"""4-bit layers in a dry run: their sizes, without bitsandbytes and without numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drpo.models.nf4_linear import BLOCK, SCALES_BLOCK, NF4Linear


class SizedNF4Linear(NF4Linear):
    """A layer with the memory of an NF4Linear: packed weight and scales, and a dense W during every product.

    For few rows bitsandbytes has kernels that need no dense W, so sampling may take less.
    """

    @classmethod
    def of(
        cls, weight: Tensor, bias: nn.Parameter | None, transposed: bool, device: torch.device
    ) -> SizedNF4Linear:
        shape = tuple(weight.T.shape if transposed else weight.shape)
        num_blocks = shape[0] * -(-shape[1] // BLOCK)
        num_bytes = (num_blocks * BLOCK // 2, num_blocks, 4 * (-(-num_blocks // SCALES_BLOCK) + 1))
        # By way of a floating-point type: bytes as such would be real, as ids are.
        parts = tuple(torch.empty(size, dtype=torch.float8_e4m3fn).view(torch.uint8) for size in num_bytes)
        return cls(shape, parts, bias, transposed, weight.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _Product.apply(x, bias, self)

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (self.out_features, self.in_features)
        return torch.empty(shape[::-1] if self.transposed else shape, dtype=dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: SizedNF4Linear) -> Tensor:
        ctx.shape = (layer.out_features, layer.in_features)
        return nn.functional.linear(x, torch.empty(ctx.shape, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None, None


def packed_sizes(model: nn.Module) -> dict[int, int]:
    """Return the number of weights that each parameter of a 4-bit layer holds, by the parameter's id."""
    sizes: dict[int, int] = {}
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            sizes |= {id(layer.scales): 0, id(layer.scale_statistics): 0}
            sizes[id(layer.weight)] = layer.out_features * layer.in_features
    return sizes
