"""Add LoRA adapters through PEFT, and fold them into the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from drpo.config import ConfigError
from drpo.fully_sharded import whole_tensor
from drpo.models.nf4_linear import NF4Linear

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
    """Wrap the model with a fresh LoRA adapter, which starts as the identity: W + (alpha / r) B A.

    Trained weights are float32, also on a bfloat16 base. Experts that are one fused parameter are not linear layers
    and get no adapter. Raises ImportError without peft, ConfigError when one of `target_modules` names no linear layer,
    or one that PEFT cannot adapt.

    Args:
        model: a transformers model.
        r: rank of the update.
        alpha: scale of the update, alpha / r.
        target_modules: names of linear layers; None takes all but the output embedding and the routers of experts.
        seed: seed of the fresh weights.
        trained_whole: names of modules that are trained in full, in addition to the adapter.
        within: prefixes that restrict the layers to those whose names begin so; empty for no restriction.
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
        names = tuple(f".{name}" for name in linear)
        absent = [target for target in target_modules if not any(n.endswith(f".{target}") for n in names)]
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
        raise ConfigError(f"model.lora.target_modules: PEFT cannot adapt a layer: {error}") from error
    if model.is_gradient_checkpointing:  # PEFT lets the embedding's output require gradients, trunk or not
        model.disable_input_require_grads()
    if extra := {name for name, _ in _lora_layers(adapted)} ^ set(linear):
        raise ConfigError(f"model.lora: PEFT put adapters on other layers than asked: {sorted(extra)[:5]}")
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT leaves modules_to_save in the precision of the base
            parameter.data = parameter.data.float()
    return adapted


@contextmanager
def _targets_as_given(model: PreTrainedModel) -> Iterator[None]:
    """Keep PEFT from converting names of dense layers to those of fused experts, within this context.

    It converts by the model's type (peft.utils.transformers_weight_conversion), for models saved by earlier versions of
    transformers: a dense first layer or shared experts would lose their adapters to the fused ones.
    """
    # PEFT guards Mamba by type too.
    if not _has_fused_experts(model) or hasattr(model.config, "mamba_num_heads"):
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
    """Return the weights of the plain transformers model, with LoRA folded in if it has an adapter.

    Folded weights and those of 4-bit layers are those of `merged_weights`; they go to `device`, by default the one they
    were on.
    """
    if not hasattr(model, "get_base_model"):
        return model.state_dict()
    made = {f"{name}.weight" for name, _ in _lora_layers(model)} | {
        f"{name}.weight".replace(".base_layer.", ".") for name in _layers_in_4bit(model.get_base_model())
    }
    weights = merged_weights(model)
    return {name: weight.to(device or weight.device) if name in made else weight for name, weight in weights}


def merged_weights(
    model: nn.Module, whole: Callable[[Sequence[Tensor]], AbstractContextManager] = nullcontext
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the plain transformers model by name, one at a time, with LoRA folded in.

    W + (alpha / r) B A is float32 for every base: in bfloat16 the sum would lose most of a small update. Of a 4-bit
    base W is what the forwards used, the dequantised weight, in float32. Nothing is changed in place, so training can
    continue exactly. `whole` returns a context in which the parameters that it gets have all their values; it is
    entered for one weight and its adapter at a time.
    """
    has_adapter = hasattr(model, "get_base_model")
    base = model.get_base_model() if has_adapter else model
    layers = (
        {f"{name}.base_layer.weight": layer for name, layer in _lora_layers(model)} if has_adapter else {}
    )
    adapters = model.active_adapters if has_adapter else []
    in_4bit = _layers_in_4bit(base)
    for name, weight in base.state_dict(keep_vars=True).items():
        owner, _, key = name.rpartition(".")
        if ".lora_" in name or ".original_module." in name:
            continue
        if owner in in_4bit and key in ("scales", "scale_statistics"):
            continue
        plain_name = name.replace(".base_layer.", ".") if has_adapter else name
        for adapter in adapters:
            plain_name = plain_name.replace(f".modules_to_save.{adapter}.", ".")
        layer = layers.get(name)
        parts = (
            []
            if layer is None
            else [part[a].weight for a in adapters for part in (layer.lora_A, layer.lora_B)]
        )
        with whole([weight, *parts]), torch.no_grad():
            is_packed = owner in in_4bit and key == "weight"
            merged = in_4bit[owner].dense_weight() if is_packed else whole_tensor(weight.detach())
            if layer is not None:
                delta = sum(_delta(layer, adapter) for adapter in adapters)
                merged = merged.float() + delta.to(merged.device)
            yield plain_name, merged


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Make a LoRA model one plain model within this context, W + (alpha / r) B A in the precision of W.

    Each forward then computes one product a layer in place of three. The memory of the adapted layers is needed
    twice, that of 4-bit ones as dense layers too, and W comes back bit for bit.
    """
    layers = [layer for _, layer in _lora_layers(model)]
    bases = [layer.get_base_layer() for layer in layers]
    kept = [base.weight.data for base in bases]
    try:
        for layer, base in zip(layers, bases, strict=True):
            with torch.no_grad():
                delta = sum(_delta(layer, adapter) for adapter in model.active_adapters)
                if isinstance(base, NF4Linear):
                    base.stand_in = (base.dense_weight() + delta).to(base.dense_dtype)
                else:
                    base.weight.data = (base.weight.float() + delta).to(base.weight.dtype)
        with model.disable_adapter():
            yield
    finally:
        for base, weight in zip(bases, kept, strict=True):
            base.weight.data = weight
            if isinstance(base, NF4Linear):
                base.stand_in = None


def _layers_in_4bit(model: nn.Module) -> dict[str, NF4Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}


def _delta(layer: nn.Module, adapter: str) -> Tensor:
    """Return (alpha / r) B A in float32; PEFT's own product is in the adapter's precision."""
    product = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
    return layer.scaling[adapter] * (product.T if layer.fan_in_fan_out else product)
