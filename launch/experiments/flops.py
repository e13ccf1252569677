"""Floating-point operations of a transformer's work, and the rate at which this machine multiplies matrices.

python launch/experiments/flops.py result.json [float32 | bfloat16]     writes the rate in FLOP/s
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import torch

SIZES = {"cpu": 2048, "cuda": 8192}
"Rows and columns of the matrices; smaller ones are multiplied more slowly."
NUM_PRODUCTS = 12


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer with two matrices in its MLP, as GPT-NeoX has."""

    width: int
    num_layers: int
    intermediate: int
    vocabulary: int


def forward_flops(shape: Shape, prompt: int, response: int, outputs: int) -> float:
    """Return the operations of the matrix products of one row's forward.

        2 T L (4 d^2 + 2 d f) + 4 L T^2 d + 2 R d V,   T = prompt + response, R = response

    d is the width, f that of the MLP, L the layers, V = `outputs` what the head gives at each response token: the
    vocabulary, or 1. Attention counts all T^2 pairs. A backward takes twice as many.
    Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B, with the head on response tokens only.
    """
    tokens, width = prompt + response, shape.width
    weights = shape.num_layers * (4 * width**2 + 2 * width * shape.intermediate)
    attention = 4 * shape.num_layers * tokens**2 * width
    return float(2 * tokens * weights + attention + 2 * response * width * outputs)


def matmul_rate(dtype: torch.dtype) -> float:
    """Return the highest rate, in FLOP/s, of several products of large matrices on this device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(NUM_PRODUCTS):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(matmul_rate(getattr(torch, sys.argv[2]))))
