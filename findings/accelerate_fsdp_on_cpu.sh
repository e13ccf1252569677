#!/usr/bin/env bash
# accelerate with FSDP2 on CPUs: two processes train whole copies under DDP, without a word.
#
# Versions: torch 2.13.0, accelerate 1.15.0, Python 3.11.
# Behaviour: torch's fully_shard runs on CPUs with gloo: each of two processes holds half of a module. With FSDP asked for by the
#   environment that `accelerate launch --use_fsdp` sets and by an FSDP plugin, Accelerator takes two CPU processes for MULTI_CPU,
#   wraps the module in DistributedDataParallel, and each process holds all of it. There is no error and no warning.
# Output seen:
#   by fully_shard: 32 of 64 weights
#   by accelerate: 64 of 64 weights, MULTI_CPU, DistributedDataParallel
# Fails (exit 1) when accelerate cuts the weights, or refuses.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0
cat > "$work/check.py" <<'PY'
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def held(module):
    return sum(getattr(weight.data, "_local_tensor", weight.data).numel() for weight in module.parameters())


accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
model = nn.Linear(8, 8, bias=False)
prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
cut = fully_shard(nn.Linear(8, 8, bias=False), mesh=init_device_mesh("cpu", (2,)))
if accelerator.is_main_process:
    print(f"by fully_shard: {held(cut)} of 64 weights")
    kind, wrapper = accelerator.distributed_type.value, type(prepared).__name__
    print(f"by accelerate: {held(prepared)} of 64 weights, {kind}, {wrapper}")
assert accelerator.num_processes == 2 and held(cut) == 32
assert held(prepared) == 64, "accelerate cuts the weights"
torch.distributed.destroy_process_group()
PY
ACCELERATE_USE_CPU=true ACCELERATE_USE_FSDP=true FSDP_VERSION=2 \
    "$work/venv/bin/torchrun" --standalone --nproc_per_node 2 "$work/check.py" 2>/dev/null
