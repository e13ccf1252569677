"""FSDP2: every weight cut over the processes by torch's `fully_shard`; what accelerate leaves to its callers."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from drpo.config import ConfigError

FSDP_MODULE = "torch.distributed.fsdp"
"Where the hooks of `fully_shard` are defined."
CONFIG = "the accelerate config (launch/accelerate/fsdp2.yaml is a right one)"


def check_version() -> None:
    """Raise ConfigError if `accelerate launch` was asked for the FSDP of before `fully_shard`."""
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"{CONFIG}: fsdp_version must be 2, got {version}")


def check_plugin(plugin: Any) -> None:
    """Raise ConfigError, naming the key of the accelerate config, for settings that would fail or be wrong later."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    wrong = {
        # Only the main process would read weights, and the models that are not trained would be empty elsewhere.
        "fsdp_cpu_ram_efficient_loading must be false": plugin.cpu_ram_efficient_loading,
        "fsdp_offload_params must be false; zero3.yaml can offload": isinstance(
            plugin.cpu_offload, CPUOffloadPolicy
        ),
        "fsdp_activation_checkpointing must be false; the recipe has model.gradient_checkpointing": (
            plugin.activation_checkpointing
        ),
    }
    for rule, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"{CONFIG}: {rule}")


def check_recipe(recipe: Any) -> None:
    """Raise ConfigError for settings that FSDP2 does not allow."""
    shared, hosted = "models cannot share frozen weights", "models are on the devices, in pieces"
    for key, why in (
        ("model.lora.r", shared),
        ("model.trainable_layers", shared),
        ("kl.offload_reference", hosted),
        ("reward.offload", hosted),
    ):
        if functools.reduce(lambda section, name: getattr(section, name, None), key.split("."), recipe):
            raise ConfigError(
                f"{key} does not work under FSDP, where {why}; drop it, or take multi_gpu.yaml, zero2.yaml or "
                "zero3.yaml"
            )


def layer_classes(module: nn.Module) -> list[str]:
    """Return the names of the classes of transformer layers in `module`, each of which is gathered on its own."""
    named = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return sorted(named & {type(part).__name__ for part in module.modules()})


def shard_frozen(module: nn.Module) -> None:
    """Cut the layers of a frozen model, each gathered for its own forward; embeddings and heads stay whole."""
    from torch.distributed.fsdp import fully_shard

    classes = layer_classes(module)
    for part in list(module.modules()):
        if type(part).__name__ in classes:
            fully_shard(part, reshard_after_forward=True)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return all values of a tensor that may be cut over the processes, which must then call this together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Give `module` plain whole weights within this context, without FSDP's hooks: a model as before `fully_shard`.

    All processes must enter it together. Changes of the weights are lost at its end.
    """
    from torch.distributed.tensor import DTensor

    cut = [
        (part._parameters, name, weight)
        for part in module.modules()
        for name, weight in part._parameters.items()
        if isinstance(weight, DTensor)
    ]
    whole = {}
    for _, _, weight in cut:
        if id(weight) not in whole:  # a tied weight stays one
            whole[id(weight)] = nn.Parameter(whole_tensor(weight.detach()), weight.requires_grad)
    hooks = [(registered, _taken(registered)) for part in module.modules() for registered in _hooks_of(part)]
    try:
        for parameters, name, weight in cut:
            parameters[name] = whole[id(weight)]
        yield
    finally:
        for parameters, name, weight in cut:
            parameters[name] = weight
        for registered, taken in hooks:  # in front, where fully_shard puts what gathers before a forward
            others = dict(registered)
            registered.clear()
            registered.update(taken | others)


def _hooks_of(part: nn.Module) -> tuple[dict[int, Any], ...]:
    return part._forward_pre_hooks, part._forward_hooks, part._state_dict_pre_hooks


def _taken(registered: dict[int, Any]) -> dict[int, Any]:
    """Remove FSDP's hooks from a module's table, and return them."""
    keys = [key for key, hook in registered.items() if _is_of_fsdp(hook)]
    return {key: registered.pop(key) for key in keys}


def _is_of_fsdp(hook: Any) -> bool:
    return getattr(getattr(hook, "hook", hook), "__module__", "").startswith(FSDP_MODULE)
