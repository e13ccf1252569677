"""LoRA through PEFT: adding an adapter, and the weights with the adapter folded in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from drpo.config import ConfigError

ROUTERS = {"router", "gate"}
"What transformers calls the layers that choose experts. Their choice has no gradient."


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

    `target_modules` None takes every linear layer but the output embedding and the routers of experts, `within` only
    those whose names begin so; modules named in `trained_whole` are trained in full beside the adapter. Experts that
    are one fused parameter are no linear layers and stay as they are. What is trained is float32, whatever the base.
    Raises ImportError without peft, ConfigError when one of `target_modules` names no such layer, or PEFT cannot adapt
    one.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("model.lora needs the package peft: pip install -e '.[peft]'") from error
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
        absent = [
            target
            for target in target_modules
            if not any(f".{name}".endswith(f".{target}") for name in linear)
        ]
        if absent:
            raise ConfigError(
                "model.lora.target_modules: no linear layer "
                + ("among model.trainable_layers " if within else "")
                + f"is named {', '.join(absent)}; the names are "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
                + (" (fused experts get no adapter)" if _has_fused_experts(model) else "")
            )
        endings = tuple(f".{target}" for target in target_modules)
        linear = [name for name in linear if f".{name}".endswith(endings)]
    else:
        linear = [name for name in linear if not ROUTERS & set(name.split("."))]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=linear,
        modules_to_save=list(trained_whole) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with torch.random.fork_rng(devices=[]), _targets_as_given(model):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.target_modules: PEFT cannot adapt one of these layers: {error}"
        ) from error
    if (
        model.is_gradient_checkpointing
    ):  # PEFT lets the embedding's output require gradients, through a frozen trunk too
        model.disable_input_require_grads()
    if strange := {name for name, _ in _lora_layers(adapted)} ^ set(linear):
        raise ConfigError(f"model.lora: PEFT put adapters on other layers than asked: {sorted(strange)[:5]}")
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT leaves modules_to_save in the precision of the base
            parameter.data = parameter.data.float()
    return adapted


@contextmanager
def _targets_as_given(model: PreTrainedModel) -> Iterator[None]:
    """Keep PEFT from taking the names of dense layers for those of experts that earlier versions of transformers had.

    It does so by the model's type (peft.utils.transformers_weight_conversion): a dense first layer or shared experts
    would lose their adapters to the fused ones.
    """
    if not _has_fused_experts(model) or hasattr(
        model.config, "mamba_num_heads"
    ):  # PEFT guards Mamba by type too
        yield
        return
    model.config.model_type = ""
    try:
        yield
    finally:
        del model.config.model_type  # the class has it


def _has_fused_experts(model: nn.Module) -> bool:
    return any(parameter.dim() == 3 and "experts" in name for name, parameter in model.named_parameters())


def _lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    return [(name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)]


def merged_state_dict(model: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Weights of the plain transformers model, LoRA folded in; those of a model without an adapter as they are.

    W + (alpha / r) B A is float32, whatever the base is: in bfloat16 the sum would lose most of a small update. Folded
    weights go to `device`, by default where they were. Nothing is changed in place, so training can go on exactly.
    """
    if not hasattr(model, "get_base_model"):
        return model.state_dict()
    weights = {}
    for name, tensor in model.get_base_model().state_dict().items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain_name = name.replace(".base_layer.", ".")
        for adapter in model.active_adapters:
            plain_name = plain_name.replace(f".modules_to_save.{adapter}.", ".")
        weights[plain_name] = tensor
    for name, layer in _lora_layers(model):
        weight = weights[f"{name}.weight"]
        delta = sum(_delta(layer, adapter) for adapter in model.active_adapters)
        weights[f"{name}.weight"] = (weight.float() + delta.to(weight.device)).to(device or weight.device)
    return weights


def _delta(layer: nn.Module, adapter: str) -> Tensor:
    """(alpha / r) B A in float32; PEFT's own product is in the adapter's precision."""
    product = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
    return layer.scaling[adapter] * (product.T if layer.fan_in_fan_out else product)
