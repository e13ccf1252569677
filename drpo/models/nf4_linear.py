"""A linear layer whose frozen weight takes 4 bits: NF4 with double quantisation, through bitsandbytes.

Blocks of 64 weights of a row share a scale, their largest magnitude; a weight is the nearest of 16 values times the
scale. The scales, less their mean, take 8 bits each, with a float32 scale for every 256 of them. Source: Dettmers et
al. 2023 (QLoRA), section 3.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

BLOCK = 64
"Weights that share a scale."
SCALES_BLOCK = 256
"Scales that share a scale."


class NF4Linear(nn.Module):
    """y = x W^T + b with W in 4 bits, computed in the precision of autocast or else of x; W gets no gradient.

    All that W needs is in parameters of bytes: a cast of the module to another precision does not change W, and a
    checkpoint contains it.

    Args:
        shape: (outputs, inputs) of W.
        parts: bytes of `weight`, `scales` and `scale_statistics`.
        bias: (outputs,) or None.
        transposed: whether the layer that it replaces keeps its weight as (inputs, outputs).
        dtype: precision of the weight that it replaces.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        parts: tuple[Tensor, Tensor, Tensor],
        bias: nn.Parameter | None,
        transposed: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.transposed, self.dense_dtype = transposed, dtype
        # Two weights a byte; 8-bit scales; the float32 scales of the scales, then the mean of the scales.
        self.weight, self.scales, self.scale_statistics = (
            nn.Parameter(part, requires_grad=False) for part in parts
        )
        self.bias = bias
        self.stand_in: Tensor | None = None
        "A dense weight that forwards use in place of W, while there is one."

    @classmethod
    def of(
        cls, weight: Tensor, bias: nn.Parameter | None, transposed: bool, device: torch.device
    ) -> NF4Linear:
        """Quantise a weight (outputs, inputs), or (inputs, outputs) if it is `transposed`, on a device."""
        from bitsandbytes.functional import quantize_4bit

        matrix = (weight.T if transposed else weight).detach().to(device)
        shape = tuple(matrix.shape)
        # bitsandbytes lets blocks run over the ends of rows, which its CPU kernel (0.50.2) then reads wrongly.
        whole_blocks = nn.functional.pad(matrix, (0, _padding(shape[1]))).contiguous()
        packed, state = quantize_4bit(
            whole_blocks, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        statistics = torch.cat([state.state2.absmax, state.offset.reshape(1)]).view(torch.uint8)
        return cls(shape, (packed, state.absmax, statistics), bias, transposed, weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.stand_in is not None:
            weight = self.stand_in.T if self.transposed else self.stand_in
            return nn.functional.linear(x, weight.to(x.dtype), bias)
        return self.product(x, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b, in the precision of x."""
        from bitsandbytes import matmul_4bit

        if padding := _padding(self.in_features):
            x = nn.functional.pad(x, (0, padding))
        return matmul_4bit(x, self.weight, self._state(x.dtype), bias=bias)

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return W as forwards use it, in the shape of the weight that it replaces."""
        from bitsandbytes.functional import dequantize_4bit

        matrix = dequantize_4bit(self.weight, self._state(dtype))[:, : self.in_features]
        return (matrix.T if self.transposed else matrix).contiguous()

    def _state(self, dtype: torch.dtype):
        from bitsandbytes.functional import QuantState

        statistics = self.scale_statistics.view(torch.float32)
        of_scales = QuantState(
            statistics[:-1],
            code=_scale_values(self.weight.device),
            blocksize=SCALES_BLOCK,
            dtype=torch.float32,
        )
        return QuantState(
            self.scales,
            shape=torch.Size((self.out_features, self.in_features + _padding(self.in_features))),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=statistics[-1],
            state2=of_scales,
        )


def _padding(num_inputs: int) -> int:
    return -num_inputs % BLOCK


@functools.cache
def _scale_values(device: torch.device) -> Tensor:
    """Return the 256 values of an 8-bit scale."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)
