#!/usr/bin/env bash
# transformers' cache of a hybrid model: batch_select_indices moves the keys and values, and leaves the recurrent states.
#
# Versions: torch 2.13.0, transformers 5.19.0, Python 3.11.
# Behaviour: DynamicCache.batch_select_indices, with which rows of a batch are dropped or reordered while decoding, acts on the
#   attention part of a LinearAttentionAndFullAttentionLayer (Falcon-H1) alone. Its convolution and state-space states stay
#   with the old rows, without an error, so the next step of a row continues another row's state. reorder_cache moves all.
# Output seen:
#   next-token logits after the rows change places, off by at most: 0.000 with reorder_cache, 5.565 with batch_select_indices
# Fails (exit 1) when batch_select_indices moves the states too, or refuses.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0
cat > "$work/check.py" <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

torch.manual_seed(0)
config = AutoConfig.for_model(
    "falcon_h1", vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
    mamba_chunk_size=8)
model = AutoModelForCausalLM.from_config(config).eval()
with torch.no_grad():
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.copy_(torch.randn(weight.shape) * 0.3)
    rows, following = torch.tensor([[5, 6, 7, 8], [20, 21, 22, 23]]), torch.tensor([[9], [24]])
    expected = model(torch.cat([rows, following], dim=1), use_cache=False).logits[[1, 0], -1]
    worst = {}
    for method in ("reorder_cache", "batch_select_indices"):
        cache = DynamicCache(config=config)
        model(rows, past_key_values=cache, use_cache=True)
        swapped = torch.tensor([1, 0])
        getattr(cache, method)(swapped)
        found = model(following[swapped], past_key_values=cache, use_cache=True).logits[:, -1]
        worst[method] = float((found - expected).abs().max())
print(f"next-token logits after the rows change places, off by at most: {worst['reorder_cache']:.3f} with reorder_cache, "
      f"{worst['batch_select_indices']:.3f} with batch_select_indices")
assert worst["reorder_cache"] < 1e-3, worst
assert worst["batch_select_indices"] > 1e-2, worst
PY
"$work/venv/bin/python" "$work/check.py" 2>/dev/null
