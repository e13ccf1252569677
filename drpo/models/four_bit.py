"""Hold the frozen linear layers of a LoRA model in 4 bits (`model.load_in_4bit`)."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from drpo.config import ConfigError
from drpo.models.adapters import ROUTERS
from drpo.models.frozen_weights import MATRICES, ids_used_elsewhere
from drpo.models.inputs import unwrap_peft
from drpo.models.nf4_linear import NF4Linear

CHOSEN = "drpo_hold_in_4bit"  # set on the layers, which are dense until their device is known

NOT_CUT = (
    "model.load_in_4bit does not work under ZeRO-3, which cuts weights over the processes; set it to false, or take "
    "multi_gpu.yaml or zero2.yaml"
)


def check_run(partitions_weights: bool) -> None:
    """Raise ConfigError without bitsandbytes, or where the launcher cuts weights over the processes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.load_in_4bit needs the package bitsandbytes: pip install -e '.[bnb]', or set it to false"
        )
    if partitions_weights:
        raise ConfigError(NOT_CUT)


def choose_layers(model: nn.Module) -> None:
    """Mark the layers of a LoRA model that `quantise` replaces: its frozen linear layers, with or without an adapter.

    The output embedding, routers of experts, heads, outputs of Mamba mixers and weights that another layer uses too
    stay as they are. Raises ConfigError when no layer is left.
    """
    plain: PreTrainedModel = unwrap_peft(model)
    used_elsewhere, output_embedding = ids_used_elsewhere(plain), plain.get_output_embeddings()
    chosen = [
        layer
        for name, layer in plain.named_modules()
        if type(layer) in MATRICES
        and layer is not output_embedding
        and not layer.weight.requires_grad
        and id(layer.weight) not in used_elsewhere
        and not {*ROUTERS, "original_module"} & set(name.split("."))
        and ".lora_" not in name
        and not _feeds_a_fused_kernel(plain, name)
    ]
    if not chosen:
        raise ConfigError(
            f"model.load_in_4bit: {type(plain).__name__} has no frozen linear layer; set it to false"
        )
    for layer in chosen:
        setattr(layer, CHOSEN, True)


def _feeds_a_fused_kernel(model: nn.Module, name: str) -> bool:
    """Return whether a layer is the output of a Mamba mixer, whose kernel on GPUs reads the dense weight itself."""
    parent, _, key = name.rpartition(".")
    return key == "out_proj" and hasattr(model.get_submodule(parent), "A_log")


def quantise(module: nn.Module, device: torch.device, layer_class: type[NF4Linear] = NF4Linear) -> None:
    """Replace the layers that `choose_layers` marked by 4-bit ones on the device, one at a time."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if getattr(layer, CHOSEN, False):
                transposed = type(layer) is Conv1D
                setattr(parent, name, layer_class.of(layer.weight, layer.bias, transposed, device))
