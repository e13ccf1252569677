"""Random tiny causal LMs of every family that the tests cover (hidden size 32, 2 layers)."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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


def tiny_model(model_type: str, seed: int = 0, vocab_size: int = VOCAB_SIZE, **overrides) -> PreTrainedModel:
    """A float32 model without dropout, its weights large enough to make predictions far from uniform."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **{**ARCHITECTURES[model_type], **overrides},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()
