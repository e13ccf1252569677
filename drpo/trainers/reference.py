"""The reference policy: the base weights under LoRA, or a frozen copy that may follow the policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drpo.models.adapters import merged_state_dict
from drpo.models.scoring import adapter_disabled
from drpo.models.trunk import has_trunk, head_is_tied, recorded_trunk, resumed_from

Score = Callable[..., Any]
"A function of a model and further arguments that returns log-probs, or contains them in its result."


def can_share_trunk(policy: nn.Module, partitioned: bool) -> bool:
    """Return whether a copy of the policy can use its frozen trunk.

    Where the policy's weights are `partitioned` (ZeRO-3), a head tied to the trunk's embedding would have only a part.
    """
    return has_trunk(policy) and not (partitioned and head_is_tied(policy))


class Reference(Protocol):
    """Scorer with the reference policy's weights: score(model, *arguments).

    `trunk` is the output of the policy's frozen trunk for the same inputs (drpo.models.trunk), if available.
    """

    def apply(self, score: Score, *arguments: Any, trunk: Tensor | None = None) -> Any: ...


def policy_and_reference(
    policy: nn.Module, reference: Reference, score: Score, *arguments: Any
) -> tuple[Any, Any]:
    """Score with the policy, and without gradients with the reference; a shared trunk runs once."""
    with recorded_trunk(policy) as trunks:
        scores = score(policy, *arguments)
    with torch.no_grad():
        return scores, reference.apply(score, *arguments, trunk=trunks[-1] if trunks else None)


class AdapterOff:
    """The base weights of a LoRA policy: no second model in memory."""

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy

    def apply(self, score: Score, *arguments: Any, trunk: Tensor | None = None) -> Any:
        with adapter_disabled(self._policy), resumed_from(trunk, self._policy):
            return score(self._policy, *arguments)


class _Scored(nn.Module):
    """A model that is always called as a whole, which Engine.partition needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, score: Score, *arguments: Any) -> Any:
        return score(self.model, *arguments)


class FrozenCopy:
    """A second model without gradients; with `shares_trunk` it uses the policy's frozen trunk."""

    def __init__(self, module: nn.Module, shares_trunk: bool = False) -> None:
        self.module, self.shares_trunk = module, shares_trunk
        self.scored = _Scored(module)

    def apply(self, score: Score, *arguments: Any, trunk: Tensor | None = None) -> Any:
        with resumed_from(trunk if self.shares_trunk else None, self.module):
            return self.scored(score, *arguments)

    @torch.no_grad()
    def move_towards(self, policy: nn.Module, mix: float) -> None:
        """Set reference <- mix * policy + (1 - mix) * reference, LoRA folded in.

        The policy's weights must be gathered (Engine.whole_weights). Source: Gorbatovski et al. 2024 (TR-DPO), eq. 5.
        """
        weights = merged_state_dict(policy)
        tensors = self.module.state_dict(keep_vars=True)
        # A tied weight has several names, and must be updated once.
        for name, tensor in {id(tensor): (name, tensor) for name, tensor in tensors.items()}.values():
            target = weights[name].to(tensor.device, tensor.dtype)
            if tensor.is_floating_point() and mix < 1:
                tensor.lerp_(target, mix)
            else:
                tensor.copy_(target)
