"""LoRA through PEFT: adding an adapter, and the weights with the adapter folded in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from drpo.config import ConfigError


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    target_modules: list[str] | None,
    seed: int,
    trained_whole: tuple[str, ...] = (),
    within: tuple[str, ...] = (),
) -> nn.Module:
    """The model in a PEFT wrapper with a fresh LoRA adapter, which starts as the identity: W + (alpha / r) B A.

    `target_modules` None takes every linear layer but the output embedding, `within` only those whose names begin
    so; modules named in `trained_whole` are trained in full beside the adapter. Raises ImportError without peft,
    ConfigError when no module matches.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("model.lora needs the package peft: pip install 'drpo[peft]'") from error
    output_embedding = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output_embedding
        and name.split(".")[0] not in trained_whole
        and (not within or name.startswith(within))
    ]
    if target_modules is not None:
        endings = tuple(f".{target}" for target in target_modules)
        linear = [name for name in linear if f".{name}".endswith(endings)]
        if not linear:
            raise ConfigError(
                f"model.lora.target_modules: no linear layer is named {', '.join(target_modules)}; the names are "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in _linear_names(model)}))}"
            )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=linear,
        modules_to_save=list(trained_whole) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the plain transformers model, LoRA folded in; those of a model without an adapter as they are.

    Nothing is changed in place, so training can go on exactly.
    """
    if not hasattr(model, "get_base_model"):
        return model.state_dict()
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    weights = {}
    for name, tensor in base.state_dict().items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain_name = name.replace(".base_layer.", ".")
        for adapter in model.active_adapters:
            plain_name = plain_name.replace(f".modules_to_save.{adapter}.", ".")
        weights[plain_name] = tensor
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"]
        delta = sum(layer.get_delta_weight(adapter).float() for adapter in model.active_adapters)
        weights[f"{name}.weight"] = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    return weights
