"""The reference policy of preference training: a frozen copy that may follow the policy, or its base weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drpo.engine import Engine
from drpo.models.adapters import merged_state_dict
from drpo.models.loading import LoraConfig, load_policy
from drpo.models.scoring import adapter_disabled
from drpo.trainers.preference_recipe import PreferenceRecipe

Score = Callable[..., Tensor]
"A function of a model and further arguments."


class Reference(Protocol):
    """Scores with the reference policy's weights: score(model, *arguments)."""

    def apply(self, score: Score, *arguments: Any) -> Tensor: ...


class AdapterOff:
    """The base weights of a LoRA policy: no second model in memory."""

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy

    def apply(self, score: Score, *arguments: Any) -> Tensor:
        with adapter_disabled(self._policy):
            return score(self._policy, *arguments)


class FrozenCopy:
    """A second model without gradients."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def apply(self, score: Score, *arguments: Any) -> Tensor:
        return score(self.module, *arguments)

    @torch.no_grad()
    def move_towards(self, policy: nn.Module, mix: float) -> None:
        """reference <- mix * policy + (1 - mix) * reference, LoRA folded in; Gorbatovski et al. 2024 (TR-DPO), eq. 5.

        The policy's weights must be whole (Engine.whole_weights).
        """
        weights = merged_state_dict(policy)
        for name, tensor in self.module.state_dict().items():
            target = weights[name].to(tensor.device, tensor.dtype)
            if tensor.is_floating_point() and mix < 1:
                tensor.lerp_(target, mix)
            else:
                tensor.copy_(target)


def starting_reference(
    recipe: PreferenceRecipe, engine: Engine, tokenizer, policy: nn.Module
) -> AdapterOff | FrozenCopy:
    """The reference as training starts: the policy at reference.path, else the policy itself.

    Raises ConfigError when reference.path holds no policy for this tokenizer.
    """
    model, path, moves = recipe.model, recipe.reference.path, recipe.reference_moves
    if path is None and model.lora.r and not moves:
        return AdapterOff(policy)
    source = replace(model, lora=LoraConfig(), gradient_checkpointing=False)
    if path is not None:
        source = replace(source, path=path, architecture={}, tokenizer=None, vocab_size=None)
    copy = load_policy(source, tokenizer, recipe.seed)
    # A reference that takes small steps needs float32: in bfloat16 they would be rounded away.
    return FrozenCopy(engine.place(copy, as_trained=not moves))
