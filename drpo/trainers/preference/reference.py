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
from drpo.models.trunk import has_trunk, head_is_tied, recorded_trunk, resumed_from, share_trunk
from drpo.models.vocabulary import check_same_vocabulary
from drpo.trainers.preference.recipe import PreferenceRecipe

Score = Callable[..., Tensor]
"A function of a model and further arguments."


class Reference(Protocol):
    """Scores with the reference policy's weights: score(model, *arguments).

    `trunk` is the policy's frozen trunk's output for what is scored (drpo.models.trunk), where it is at hand.
    """

    def apply(self, score: Score, *arguments: Any, trunk: Tensor | None = None) -> Tensor: ...


def policy_and_reference(
    policy: nn.Module, reference: Reference, score: Score, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Scores of the policy, and without gradients of the reference; a trunk that both stand on runs once."""
    with recorded_trunk(policy) as trunks:
        scores = score(policy, *arguments)
    with torch.no_grad():
        return scores, reference.apply(score, *arguments, trunk=trunks[-1] if trunks else None)


class AdapterOff:
    """The base weights of a LoRA policy: no second model in memory."""

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy

    def apply(self, score: Score, *arguments: Any, trunk: Tensor | None = None) -> Tensor:
        with adapter_disabled(self._policy), resumed_from(trunk, self._policy):
            return score(self._policy, *arguments)


class FrozenCopy:
    """A second model without gradients; with `shares_trunk` it stands on the policy's frozen trunk."""

    def __init__(self, module: nn.Module, shares_trunk: bool = False) -> None:
        self.module, self._shares_trunk = module, shares_trunk

    def apply(self, score: Score, *arguments: Any, trunk: Tensor | None = None) -> Tensor:
        with resumed_from(trunk if self._shares_trunk else None, self.module):
            return score(self.module, *arguments)

    @torch.no_grad()
    def move_towards(self, policy: nn.Module, mix: float) -> None:
        """reference <- mix * policy + (1 - mix) * reference, LoRA folded in; Gorbatovski et al. 2024 (TR-DPO), eq. 5.

        The policy's weights must be whole (Engine.whole_weights).
        """
        weights = merged_state_dict(policy)
        own = self.module.state_dict(keep_vars=True)
        # A tied weight has several names, and must take the step once.
        for name, tensor in {id(tensor): (name, tensor) for name, tensor in own.items()}.values():
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
    model, path = recipe.model, recipe.reference.path
    if recipe.reference_is_adapter_off:
        if recipe.reference.cache_dir is not None or recipe.orders_by_reference:
            policy.to(engine.device)  # it scores before training, which would move it
        return AdapterOff(policy)
    source = replace(model, lora=LoraConfig(), gradient_checkpointing=False)
    if path is not None:
        check_same_vocabulary(tokenizer, path, "reference.path")
        source = replace(
            source, path=path, architecture={}, tokenizer=None, vocab_size=None, trainable_layers=None
        )
    # A reference that takes small steps needs float32: in bfloat16 they would be rounded away.
    takes_small_steps = recipe.reference.sync_mix < 1
    if takes_small_steps:
        source = replace(source, dtype="float32")
    key = "model.path" if path is None else "reference.path"
    copy = load_policy(source, tokenizer, recipe.seed, key)
    copy = engine.place(copy, as_trained=not takes_small_steps)
    dtypes = {module.get_input_embeddings().weight.dtype for module in (copy, policy)}
    # A head tied to the shared embedding would need the policy's weights, of which ZeRO-3 leaves each process a part.
    whole = not (engine.partitions_weights and head_is_tied(policy))
    shares_trunk = has_trunk(policy) and path is None and len(dtypes) == 1 and whole
    if shares_trunk:
        share_trunk(
            copy, policy.to(engine.device)
        )  # it may score before training, which would move the policy
    return FrozenCopy(copy, shares_trunk)
