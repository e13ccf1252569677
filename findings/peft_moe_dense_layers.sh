#!/usr/bin/env bash
# peft on a mixture of experts: a target that names a dense layer's projection gives that layer no adapter.
#
# Versions: torch 2.13.0, transformers 5.19.0, peft 0.21.2, Python 3.11.
# Behaviour: for model types whose experts transformers 5 holds as fused parameters, peft rewrites target modules that end in
#   gate_proj, up_proj or down_proj to the fused experts. A layer that is dense (mlp_only_layers of Qwen3-MoE; first layers of
#   DeepSeek-V3 are alike) has modules of these very names, given in full here, and is left without an adapter.
# Output seen:
#   asked for: model.layers.0.mlp.down_proj, .gate_proj, .up_proj and model.layers.1.self_attn.q_proj
#   modules with an adapter: ['model.layers.1.mlp.experts', 'model.layers.1.self_attn.q_proj']
# Fails (exit 1) when the dense layer gets the adapters that were asked for, or peft refuses.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0 peft==0.21.2 accelerate==1.15.0
cat > "$work/check.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model(
    "qwen3_moe", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0])
model = AutoModelForCausalLM.from_config(config)
dense = [f"model.layers.0.mlp.{part}" for part in ("down_proj", "gate_proj", "up_proj")]
assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in dense)
asked = [*dense, "model.layers.1.self_attn.q_proj"]
adapted = get_peft_model(model, LoraConfig(r=2, target_modules=asked))
found = sorted({n.split(".lora_A")[0].removeprefix("base_model.model.").removesuffix(".base_layer")
                for n, _ in adapted.named_parameters() if ".lora_A" in n})
print("asked for: model.layers.0.mlp.down_proj, .gate_proj, .up_proj and model.layers.1.self_attn.q_proj")
print("modules with an adapter:", found)
assert not set(dense) & set(found), "the dense layer has its adapters"
PY
"$work/venv/bin/python" "$work/check.py" 2>/dev/null
