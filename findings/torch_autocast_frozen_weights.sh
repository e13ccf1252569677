#!/usr/bin/env bash
# torch autocast keeps the bf16 copies of trained weights only: a frozen float32 weight is rounded anew in every forward.
#
# Versions: torch 2.13.0, Python 3.11.
# Behaviour: within one autocast context four forwards of a linear layer round its weight once where it requires a gradient, also
#   under no_grad, and four times where it does not. So freezing what a LoRA run does not train makes its forwards slower: a tied
#   embedding, which is the LM head too, is rounded at every generated token.
# Output seen:
#   trained: rounded 1 time in 4 forwards
#   trained, under no_grad: rounded 1 time in 4 forwards
#   frozen: rounded 4 times in 4 forwards
# Fails (exit 1) when these numbers change.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
cat > "$work/check.py" <<'PY'
import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Rounded(TorchDispatchMode):
    """Counts conversions of a (6, 5) float32 matrix to bf16."""

    times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and tuple(result.shape) == (6, 5):
            self.times += result.dtype == torch.bfloat16
        return result


found = {}
for name, trained, gradients in (
    ("trained", True, contextlib.nullcontext),
    ("trained, under no_grad", True, torch.no_grad),
    ("frozen", False, contextlib.nullcontext),
):
    layer = torch.nn.Linear(5, 6, bias=False).requires_grad_(trained)
    with Rounded() as rounded, gradients(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            layer(torch.ones(2, 5))
    found[name] = rounded.times
    print(f"{name}: rounded {rounded.times} time{'s' * (rounded.times > 1)} in 4 forwards")
assert list(found.values()) == [1, 1, 4], "autocast's cache has changed"
PY
"$work/venv/bin/python" "$work/check.py"
