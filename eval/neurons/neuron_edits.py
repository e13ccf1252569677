"""Temporary changes of MLP activations: patching, scaling, tuning-free editing, and continuations under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from drpo.config import Section, setting
from drpo.decimals import decimal_floor
from drpo.models.inputs import unwrap_peft
from eval.neurons.mlp_neurons import Hook, mlp_output_projections, num_neurons, pre_hooks
from eval.neurons.neuron_shift import NeuronShift, kind_masks

BEFORE = "before"

Continuations = list[list[int]]
Positions = Literal["all", "last"] | Tensor


@dataclass(frozen=True)
class EditConfig(Section):
    """Tuning-free editing (section `edit` of a recipe)."""

    alpha: float = setting(0.05, ge=0, le=1)
    """Neurons toward the probe direction are scaled by 1 - alpha, those away from it by 1 + alpha."""
    fraction: float = setting(0.5, ge=0, le=1)
    """Share of each kind of neuron that is scaled: largest |cosine| where dampened, smallest where strengthened."""
    skip_most_active: float = setting(0.0, ge=0, le=1)
    """Share of all neurons, those of the largest |mean activation|, that is left alone."""


def intervene(
    model: nn.Module, shift: NeuronShift, edit: EditConfig, continue_prompts: Callable[[], Continuations]
) -> dict[str, Continuations]:
    """Sample continuations of the policy before training under each intervention, by the intervention's name.

    Interventions: each group of neurons, and all four together, patched to the mean activations after training; and
    tuning-free editing. Groups without neurons are omitted. Patching changes the positions that emit the
    continuation: the last prompt token and every new token. Editing scales all positions.
    """
    groups = {name: mask for name, mask in shift.group_masks().items() if mask.any()}
    if groups:
        groups["all four"] = sum(groups.values()) > 0
    continuations = {}
    for name, mask in groups.items():
        with patched(model, shift.after, mask, "last"):
            continuations[f"{BEFORE}, {name} patched"] = continue_prompts()
    with scaled(model, tuning_free_factors(shift.cosines, shift.before, **asdict(edit))):
        continuations[f"{BEFORE}, edited without training"] = continue_prompts()
    return continuations


@contextmanager
def patched(
    model: nn.Module, values: Tensor, neuron_mask: Tensor, positions: Positions = "all"
) -> Iterator[None]:
    """Set the activations of the neurons in `neuron_mask` to `values`, both (L, d_mlp), within this context.

    `positions` selects the positions, in every forward of the context, of an input (B, T):

    - "all": all T columns, including the prompt and padding;
    - "last": column T-1 only. In cached generation these are the last prompt token and then each new token:
      the positions over which `mean_activations` averages;
    - a bool tensor (B, T), True = patched. Forwards of another shape raise ValueError.

    A patched neuron has the same value in every row and position; other activations are unchanged. The hooks are
    removed afterwards, even after an error. Raises ValueError on wrong shapes or a mask that is not bool.
    """
    _check(model, positions, values=values, neuron_mask=neuron_mask)
    if neuron_mask.dtype != torch.bool:
        raise ValueError(f"neuron_mask must be bool (True = patched), got {neuron_mask.dtype}")

    def patch(layer: int, activations: Tensor) -> Tensor:
        mask = neuron_mask[layer].to(activations.device)
        return torch.where(mask, values[layer].to(activations), activations)

    with _changing(model, neuron_mask, patch, positions):
        yield


@contextmanager
def scaled(model: nn.Module, factors: Tensor, positions: Positions = "all") -> Iterator[None]:
    """Multiply activations by `factors` (L, d_mlp) within this context; all else is as in `patched`."""
    _check(model, positions, factors=factors)

    def scale(layer: int, activations: Tensor) -> Tensor:
        return activations * factors[layer].to(activations)

    with _changing(model, factors != 1, scale, positions):
        yield


def tuning_free_factors(
    cosines: Tensor,
    activations: Tensor,
    alpha: float = 0.05,
    fraction: float = 0.5,
    skip_most_active: float = 0.0,
) -> Tensor:
    """Compute factors (L, d_mlp) for `scaled` that move a policy away from the probe direction without training.

    With the kinds TP, TN, AP, AN of `neuron_shift.kind_masks`: the `fraction` of TP and of AN with the largest
    |cos| gets 1 - alpha, the `fraction` of AP and of TN with the smallest |cos| gets 1 + alpha, all others 1; each
    kind is selected separately, over all layers.

    Yang et al. 2024 (arXiv 2411.06424), tuning-free editing: alpha 0.05, half of each kind; for GPT-2 the top 20% by
    activation are excluded first. Raises ValueError when the shapes differ or a share is outside [0, 1].

    Args:
        cosines: Cosines of the value vectors with the probe direction (L, d_mlp).
        activations: Mean activations (L, d_mlp).
        alpha: Change of the factors, in [0, 1].
        fraction: Share of each kind that is scaled.
        skip_most_active: Share of all neurons, those with the largest |activation|, that keeps factor 1 and is
            excluded from the selection.
    """
    for name, share in (("alpha", alpha), ("fraction", fraction), ("skip_most_active", skip_most_active)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    by_activation = activations.abs().flatten().argsort(descending=True, stable=True)
    selectable = torch.ones(activations.numel(), dtype=torch.bool)
    selectable[by_activation[: decimal_floor(skip_most_active * activations.numel())]] = False
    factors = torch.ones(activations.numel(), dtype=torch.float64)
    for kind, mask in kind_masks(cosines, activations).items():
        dampened = kind in ("TP", "AN")
        neurons = (mask.flatten() & selectable).nonzero().squeeze(1)
        order = cosines.flatten()[neurons].abs().argsort(descending=dampened, stable=True)
        chosen = neurons[order[: decimal_floor(fraction * len(neurons))]]
        factors[chosen] = 1 - alpha if dampened else 1 + alpha
    return factors.view_as(activations)


@contextmanager
def _changing(
    model: nn.Module, neuron_mask: Tensor, change: Callable[[int, Tensor], Tensor], positions: Positions
) -> Iterator[None]:
    """Apply `change` to the layers with neurons in `neuron_mask` (L, d_mlp), at `positions`, within this context."""
    shape: list[int] = []  # (B, T) of the current forward: OPT's MLPs see (B * T, d_mlp)

    def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shape[:] = inputs[0].shape

    def change_at(layer: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        activations = inputs[0].reshape(*shape, -1)
        mask = _position_mask(positions, shape).to(activations.device).unsqueeze(-1)
        return torch.where(mask, change(layer, activations), activations).view_as(inputs[0])

    hooks: list[tuple[nn.Module, Hook]] = [(unwrap_peft(model).get_input_embeddings(), remember)]
    for layer, projection in enumerate(mlp_output_projections(model)):
        if neuron_mask[layer].any():
            hooks.append((projection, partial(change_at, layer)))
    with pre_hooks(hooks):
        yield


def _position_mask(positions: Positions, shape: list[int]) -> Tensor:
    """Return the mask of the positions, (B, T) or (T,), in a forward of shape (B, T)."""
    if isinstance(positions, Tensor):
        if list(positions.shape) != shape:
            raise ValueError(
                f"positions cover {tuple(positions.shape)} (rows, columns), but this forward has {tuple(shape)}; give "
                "positions of its shape, or 'all' or 'last'"
            )
        return positions
    first = shape[1] - 1 if positions == "last" else 0
    return torch.arange(shape[1]) >= first


def _check(model: nn.Module, positions: Positions, **arrays: Tensor) -> None:
    expected = num_neurons(model)
    for name, array in arrays.items():
        shape = tuple(array.shape)
        if shape != expected:
            raise ValueError(
                f"{name} has shape {shape}; this model has {expected} (layers, neurons of a layer)"
            )
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.dim() != 2:
            kind = f"{positions.dtype} {tuple(positions.shape)}"
            raise ValueError(f"positions must be bool (rows, columns), got {kind}")
    elif positions not in ("all", "last"):
        raise ValueError(f"positions must be 'all', 'last' or a bool mask, got {positions!r}")
