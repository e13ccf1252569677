"""Random tiny causal LMs of every family that the tests cover (hidden size 32, 2 or 3 layers)."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from drpo.config import ConfigError
from drpo.models.probes import check_policy

VOCAB_SIZE = 61

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, dict] = {
    "gpt_neox": _SIZES,
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": {**_GROUPED, "sliding_window": 6},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "dropout": 0.0,
    },
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}

# Beside those above, what docs/models.md says something about.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MORE: dict[str, dict] = {
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 6},
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "smollm3": _GROUPED,
    "qwen3_moe": {**_GROUPED, "head_dim": 8, **_EXPERTS, "mlp_only_layers": [0]},  # the first layer is dense
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
}

# Attention beside recurrent or convolutional layers.
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
HYBRIDS: dict[str, dict] = {
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {
        **_GROUPED,
        "head_dim": 8,
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "falcon_h1": {**_GROUPED, **_MAMBA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "bamba": {**_GROUPED, **_MAMBA, "attn_layer_indices": [1], "mamba_d_head": 16},
}

# What keeps its state elsewhere than in the cache that is given, or lets padding into it.
_RECURRENT = {"hidden_size": 32, "num_hidden_layers": 2}
REFUSED: dict[str, dict] = {
    "mamba": {**_RECURRENT, "state_size": 8},
    "mamba2": {**_RECURRENT, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "rwkv": {**_RECURRENT, "attention_hidden_size": 32},
    "recurrent_gemma": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "lru_width": 32,
    },
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def tiny_model(model_type: str, seed: int = 0, vocab_size: int = VOCAB_SIZE, **overrides) -> PreTrainedModel:
    """A float32 model without dropout, its weights large enough to make predictions far from uniform."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **{**{**ARCHITECTURES, **MORE, **HYBRIDS, **REFUSED}[model_type], **overrides},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.eval()
    with suppress(ConfigError):
        check_policy(model)  # as loading does: whoever counts calls finds the probe done
    return model


def move_weights(model: nn.Module, seed: int) -> None:
    """Change the trained weights about as much as an optimizer step at a large rate does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
