#!/usr/bin/env bash
# transformers reads a Llama from GGUF without its rotary scaling: another model, no warning.
#
# Versions: torch 2.13.0, transformers 5.19.0, gguf 0.19.0, Python 3.11.
# Behaviour: a GGUF file says how the rotary embedding is scaled in the keys <arch>.rope.scaling.type and .factor (linear,
#   YaRN), or by a tensor rope_freqs.weight (Llama 3.1 and later). from_pretrained(gguf_file=...) maps neither: the config
#   that comes out has rope_type "default", and logits are those of the unscaled model.
# Output seen:
#   rope_parameters read: {'rope_theta': 10000.0, 'rope_type': 'default'}
#   largest difference to the model that was written: 12.3 (its logits go up to 10.8); to the same weights unscaled: 0.0
# Fails (exit 1) when transformers reads the scaling, refuses the file, or warns.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0
cat > "$work/check.py" <<'PY'
import sys
import warnings

import gguf
import numpy as np
import torch
from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.5)
torch.manual_seed(0)
scaled = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}))
plain = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
plain.load_state_dict(scaled.state_dict())

writer = gguf.GGUFWriter(f"{folder}/scaled.gguf", "llama")
writer.add_context_length(256)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(48)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_rope_dimension_count(16)
writer.add_rope_freq_base(1e4)
writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(4.0)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_vocab_size(64)
names = {"embed_tokens": "token_embd", "norm": "output_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
         "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "lm_head": "output"}
for name, tensor in scaled.state_dict().items():
    part, array = name.split(".")[-2], tensor.numpy()
    if part in ("q_proj", "k_proj"):  # llama.cpp keeps the two halves of a head interleaved
        array = np.ascontiguousarray(array.reshape(2, 2, 8, 32).swapaxes(1, 2)).reshape(32, 32)
    writer.add_tensor(("blk.0." if "layers" in name else "") + names[part] + ".weight", array)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    read = LlamaForCausalLM.from_pretrained(folder, gguf_file="scaled.gguf", quantization_config=GgufConfig(dequantize=True))
ids = torch.arange(40)[None] % 64
with torch.no_grad():
    written, unscaled, found = (model.eval()(ids).logits for model in (scaled, plain, read))
print("rope_parameters read:", dict(sorted(read.config.rope_parameters.items())))
print(f"largest difference to the model that was written: {(found - written).abs().max():.1f} "
      f"(its logits go up to {written.abs().max():.1f}); to the same weights unscaled: {(found - unscaled).abs().max():.1f}")
assert read.config.rope_parameters["rope_type"] == "default", "the scaling is read"
assert torch.allclose(found, unscaled, atol=1e-4) and not torch.allclose(found, written, atol=0.1)
assert not [w for w in told if "rope" in str(w.message).lower()], "it warns"
PY
"$work/venv/bin/python" "$work/check.py" "$work"
