#!/usr/bin/env bash
# transformers on a CPU: with a padding mask, a decoding step copies all keys and values once for every query head of a group,
# though torch's CPU kernel takes them as they are, with the same result bit for bit.
#
# Versions: torch 2.13.0, transformers 5.19.0, Python 3.11.
# Behaviour: sdpa attention of transformers passes enable_gqa=True only where there is no mask, since the fast kernels of CUDA take
#   none beside it; use_gqa_in_sdpa makes exceptions for XPU and MPS, none for CPUs. A Llama of 8 query heads to 2 key heads with
#   2 padded rows copies 4 times its cache of 65 positions in every layer and step. scaled_dot_product_attention on a CPU takes mask
#   and groups together and gives equal numbers, in float32 and bfloat16.
# Output seen:
#   keys and values of the cache of a layer: 8320 numbers
#   copied for the query heads in a step: 33280 numbers
#   by the kernel without copies: equal in float32, equal in bfloat16
# Fails (exit 1) when a step copies nothing, or the kernel gives other numbers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0
cat > "$work/check.py" <<'PY'
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KEY_HEADS, WIDTH, LENGTH = 8, 2, 16, 65


class Copied(TorchDispatchMode):
    """Counts the numbers of copies whose shape is (row, key head, query head of its group, position, width)."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        group = (2, KEY_HEADS, HEADS // KEY_HEADS, LENGTH, WIDTH)
        if function is torch.ops.aten.clone.default and tuple(result.shape) == group:
            self.total += result.numel()
        return result


torch.manual_seed(0)
config = LlamaConfig(hidden_size=HEADS * WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=HEADS,
                     num_key_value_heads=KEY_HEADS, vocab_size=64, attn_implementation="sdpa")
model = LlamaForCausalLM(config).eval()
mask = torch.ones(2, LENGTH, dtype=torch.long)
mask[0, :3] = 0
ids = torch.randint(3, 64, (2, LENGTH))
with torch.no_grad():
    cache = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
    with Copied() as copied:
        model(ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
print(f"keys and values of the cache of a layer: {2 * 2 * KEY_HEADS * LENGTH * WIDTH} numbers")
print(f"copied for the query heads in a step: {copied.total} numbers")

equal = {}
for dtype in (torch.float32, torch.bfloat16):
    query = torch.randn(2, HEADS, 1, WIDTH, dtype=dtype)
    key, value = torch.randn(2, 2, KEY_HEADS, LENGTH, WIDTH, dtype=dtype)
    attends = mask.bool()[:, None, None]
    repeated = (states.repeat_interleave(HEADS // KEY_HEADS, dim=1) for states in (key, value))
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(query, *repeated, attn_mask=attends)
    equal[dtype] = torch.equal(attention(query, key, value, attn_mask=attends, enable_gqa=True), expected)
words = [f"{'equal' if same else 'other'} in {str(dtype).removeprefix('torch.')}" for dtype, same in equal.items()]
print("by the kernel without copies:", ", ".join(words))
assert copied.total == 2 * 2 * HEADS * LENGTH * WIDTH, "the copies have changed"
assert all(equal.values())
PY
"$work/venv/bin/python" "$work/check.py"
