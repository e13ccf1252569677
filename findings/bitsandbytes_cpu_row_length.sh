#!/usr/bin/env bash
# bitsandbytes on CPUs: 4-bit weights whose rows are not whole blocks come back with scales of other weights.
#
# Versions: bitsandbytes 0.50.2, torch 2.13.0, numpy 2.4.6, Python 3.11, on x86.
# Behaviour: quantize_4bit cuts a matrix into blocks of 64 weights, across the ends of rows, with one scale a block. dequantize_4bit of
#   the same package, on a CPU, gives code[index] * scale where rows have 64 or 128 weights. Where they have 80 or 96, some weights get
#   the scale of another block, with no error: they are off by far more than rounding.
# Output seen: columns, largest |dequantize_4bit - code[index] * scale|
#   64 exact
#   80 wrong
#   96 wrong
#   128 exact
# Fails (exit 1) when any of these changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
cat > "$work/check.py" <<'PY'
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

torch.manual_seed(0)
found = {}
for columns in (64, 80, 96, 128):
    weight = torch.randn(4, columns)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    pairs = packed.flatten().long()
    index = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: weight.numel()]
    scale = state.absmax.repeat_interleave(64)[: weight.numel()]
    expected = (state.code[index] * scale).view(4, columns)
    worst = float((dequantize_4bit(packed, state) - expected).abs().max())
    found[columns] = "exact" if worst < 1e-5 else "wrong"
    print(columns, found[columns])
assert found == {64: "exact", 80: "wrong", 96: "wrong", 128: "exact"}, found
PY
"$work/venv/bin/python" "$work/check.py" 2>/dev/null
