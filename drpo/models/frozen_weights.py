"""Frozen weights that cost little: matrices in bf16 where autocast would round them, equal weights in memory once."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from drpo.models.inputs import unwrap_peft

MATRICES = (nn.Linear, Conv1D)
"Layers whose product autocast computes in bf16. Subclasses may compute otherwise, as the scalar head does."


def round_frozen(module: nn.Module) -> None:
    """Hold the frozen matrices of linear layers in bf16.

    Under bf16 autocast the outputs stay the same bit for bit: autocast rounds these weights in every forward. A weight
    that another layer uses too (a tied embedding) stays as it is. The module then runs under autocast only.
    """
    used_elsewhere = ids_used_elsewhere(module)
    for layer in module.modules():
        if type(layer) in MATRICES:
            for weight in layer.parameters(recurse=False):
                if not weight.requires_grad and id(weight) not in used_elsewhere:
                    weight.data = weight.data.to(torch.bfloat16)


def ids_used_elsewhere(module: nn.Module) -> set[int]:
    """Return the ids of the parameters that belong to other layers than plain linear ones, tied ones among them."""
    return {
        id(weight)
        for layer in module.modules()
        if type(layer) not in MATRICES
        for weight in layer.parameters(recurse=False)
    }


def is_half(model: nn.Module) -> bool:
    """Return whether any weights, but those of heads, which are always float32, are in half precision."""
    dtypes = {
        weight.dtype for weight in model.parameters() if weight.is_floating_point()
    }  # 4-bit ones are not
    return not dtypes <= {torch.float32, torch.float64}


def own_precision(model: nn.Module) -> AbstractContextManager:
    """Return a context for forwards in the precision of the model's weights, whatever surrounds it."""
    weights = list(model.parameters())
    rounded = any(weight.dtype == torch.bfloat16 for weight in weights)
    return torch.autocast(weights[0].device.type, torch.bfloat16, enabled=rounded)


def share_frozen(model: nn.Module, source: nn.Module) -> None:
    """Replace frozen weights of `model` by those of `source` with the same place and numbers: one copy in memory.

    Under LoRA policy and critic then have one base, and a reward model shares it with a critic that started from it.
    Both models must be on one device, their weights whole.
    """
    owned = _frozen_weights(source)
    for name, (layer, key, weight) in _frozen_weights(model).items():
        if name in owned:
            other = owned[name][2]
            if weight.dtype == other.dtype and torch.equal(weight, other):
                setattr(layer, key, other)


def _frozen_weights(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """Return module, attribute and parameter of the frozen weights by their name in a plain backbone."""
    return {
        f"{path}.{key}".replace(".base_layer.", "."): (layer, key, weight)
        for path, layer in unwrap_peft(model).base_model.named_modules()
        for key, weight in layer.named_parameters(recurse=False)
        if not weight.requires_grad
    }
