"""A tiny Llama with its tokenizer as a GGUF file, written as llama.cpp lays such a file out."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from tiny_tokenizers import SPECIAL
from transformers import PreTrainedModel, PreTrainedTokenizerFast

OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_llama(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    leave_out: str = "",
    more: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a float32 Llama to `path`, without the tensor `leave_out`, with `more` tensors by name."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    for name, array in (_tensors(model) | (more or {})).items():
        if name != leave_out:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        match name.removeprefix("model.").split(".", 2):
            case ["layers", number, rest]:
                part = OF_LAYER[rest.removesuffix(".weight")]
                if (
                    part in heads
                ):  # llama.cpp rotates neighbouring channels, transformers the two halves of a head
                    halves = array.reshape(heads[part], 2, -1, array.shape[1])
                    array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
                tensors[f"blk.{number}.{part}.weight"] = array
            case ["embed_tokens", "weight"]:
                tensors["token_embd.weight"] = array
            case ["norm", "weight"]:
                tensors["output_norm.weight"] = array
            case ["lm_head", "weight"]:
                tensors["output.weight"] = array
    return tensors


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in learned["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
