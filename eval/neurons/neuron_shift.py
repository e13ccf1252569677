"""Shift of MLP neurons by training: the change in each neuron's contribution along a probe direction.

Yang et al. 2024 (arXiv 2411.06424). With value vectors v_i and mean activations a_i, neuron i contributes
p_i = a_i (v_i . w) / |w| to the projection of its MLP's output on the probe direction w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drpo.config import ConfigError
from eval.neurons.mlp_neurons import mlp_output_projections, value_vectors

GROUPS = {"TP": "TP-", "TN": "TN+", "AP": "AP+", "AN": "AN-"}
"""The group of the neurons of each kind that moved away from the probe direction."""
NUM_TOP = 10


@torch.no_grad()
def align(model: nn.Module, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Compute projection and cosine of every value vector with the probe direction w, each (L, d_mlp) float64.

        alignment = v . w / |w|,   cosine = v . w / (|v| |w|)   (0 for a zero value vector)

    `direction` (d,). Raises ConfigError when d is not the width of the MLP's output, ValueError when w is zero or
    not finite.
    """
    direction = direction.double()
    norm = direction.norm()
    if not (norm > 0 and norm.isfinite()):
        raise ValueError(f"the probe direction has norm {norm.item()}; it needs a finite one above 0")
    alignments, cosines = [], []
    for projection in mlp_output_projections(model):
        values = value_vectors(projection).double()
        if direction.shape != values.shape[1:]:
            raise ConfigError(
                f"the probe direction has shape {tuple(direction.shape)}, but the MLPs of "
                f"{type(model).__name__} write vectors of {values.shape[1]} numbers"
            )
        dots = values @ (direction / norm).to(values.device)
        lengths = values.norm(dim=1)
        alignments.append(dots.cpu())
        cosines.append(torch.where(lengths > 0, dots / lengths, 0).cpu())
    return torch.stack(alignments), torch.stack(cosines)


def kind_masks(cosines: Tensor, activations: Tensor) -> dict[str, Tensor]:
    """Mark the four kinds of neurons (L, d_mlp), by the signs of cosine and mean activation before training.

    T: the value vector points toward the probe direction (cosine > 0), A: away from it (cosine < 0). P: mean
    activation >= 0, N: below 0. A neuron with cosine 0 has no kind: it cannot change the projection.
    """
    if cosines.shape != activations.shape:
        shapes = f"cosines have shape {tuple(cosines.shape)}, activations {tuple(activations.shape)}"
        raise ValueError(f"{shapes}; both are (L, d_mlp)")
    toward, away, positive, negative = cosines > 0, cosines < 0, activations >= 0, activations < 0
    masks = (toward & positive, toward & negative, away & positive, away & negative)
    return dict(zip(GROUPS, masks, strict=True))


@dataclass(frozen=True, eq=False)
class NeuronShift:
    """Every neuron before and after training; all arrays (L, d_mlp) float64, CPU."""

    cosines: Tensor
    """Cosine of the value vector, before training, with the probe direction."""
    alignments: Tensor
    """Its projection v . w / |w|."""
    alignments_after: Tensor
    """The projection of the value vector after training."""
    before: Tensor
    """Mean activation before training."""
    after: Tensor
    """Mean activation after training."""

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in self.__dataclass_fields__}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"before and after must be the same architecture and size, got arrays {shapes}")

    @property
    def projections_before(self) -> Tensor:
        """Projections before training, p = a v . w / |w|."""
        return self.before * self.alignments

    @property
    def projections_after(self) -> Tensor:
        """Projections with the activation after training and the value vector before it."""
        return self.after * self.alignments

    @property
    def reductions(self) -> Tensor:
        """(a_before - a_after) v . w / |w|: above 0 the change of activation moves away from the probe direction."""
        return (self.before - self.after) * self.alignments

    @property
    def value_reductions(self) -> Tensor:
        """a_after (v_before - v_after) . w / |w|: the part of the reductions that is due to the value vectors."""
        return self.after * (self.alignments - self.alignments_after)

    def group_masks(self) -> dict[str, Tensor]:
        """Mark the neurons that moved away from the probe direction (reduction > 0), by group.

        TP-: TP, activation fell. TN+: TN, more negative. AP+: AP, activation rose. AN-: AN, less negative.
        """
        kinds, away = kind_masks(self.cosines, self.before), self.reductions > 0
        return {GROUPS[kind]: mask & away for kind, mask in kinds.items()}


def noise_gross(first: Tensor, second: Tensor, alignments: Tensor) -> float:
    """Estimate the gross sum due to sampling alone, from mean activations over two halves of one policy's samples.

        sum_i |(a1_i - a2_i) alignment_i| / (2 sqrt 2)

    Half of a symmetric difference counts as gross. Means over halves differ by sqrt(2) more than means over two
    samples of the whole size, such as those before and after training, whose shared prompts lower the noise further.
    All (L, d_mlp).
    """
    return float(((first - second) * alignments).abs().sum()) / (2 * 2**0.5)


def summarise(shift: NeuronShift) -> dict[str, Any]:
    """Compute counts and sums by group, over all neurons, and by layer, as JSON values.

    Of each kind: `gross`, the sum of the reductions above 0 (its group) over `count` neurons; `opposing`, the sum of
    those below 0 over `opposing_count` neurons; `net` = gross + opposing; `share` of all gross. The nets of the four
    sum to the net of all neurons, which is the change of the summed projections by the activations alone;
    `value_vectors` is what the changed value vectors add to it. `balance` = net / gross: 1 when all neurons pull the
    same way, 0 when they cancel.
    """
    reductions = shift.reductions
    layers = {
        "gross": reductions.clamp(min=0).sum(dim=1).tolist(),
        "opposing": reductions.clamp(max=0).sum(dim=1).tolist(),
        "net": reductions.sum(dim=1).tolist(),
    }
    groups: dict[str, dict[str, float]] = {}
    for kind, mask in kind_masks(shift.cosines, shift.before).items():
        reductions_of_kind = torch.where(mask, reductions, 0)
        gross, opposing = reductions_of_kind.clamp(min=0), reductions_of_kind.clamp(max=0)
        groups[GROUPS[kind]] = {
            "neurons": int(mask.sum()),
            "count": int((gross > 0).sum()),
            "gross": float(gross.sum()),
            "opposing_count": int((opposing < 0).sum()),
            "opposing": float(opposing.sum()),
            "net": float(reductions_of_kind.sum()),
        }
        layers[GROUPS[kind]] = gross.sum(dim=1).tolist()
    total = {column: sum(group[column] for group in groups.values()) for column in groups["TP-"]}
    total["neurons"] = reductions.numel()
    total_gross = total["gross"] or float("nan")  # shares of nothing are undefined
    for group in groups.values():
        group["share"] = group["gross"] / total_gross
    total["balance"] = total["net"] / total_gross
    total["value_vectors"] = float(shift.value_reductions.sum())
    top = {"away from": _top_neurons(shift, reductions), "toward": _top_neurons(shift, -reductions)}
    return {"shape": list(reductions.shape), "groups": groups, "total": total, "layers": layers, "top": top}


def _top_neurons(shift: NeuronShift, size: Tensor) -> list[dict[str, Any]]:
    """Return the NUM_TOP neurons with the largest positive `size`."""
    kinds = kind_masks(shift.cosines, shift.before)
    largest = size.flatten().argsort(descending=True, stable=True)[:NUM_TOP].tolist()
    places = [divmod(index, size.shape[1]) for index in largest]
    return [
        {
            "layer": place[0],
            "neuron": place[1],
            "kind": next(kind for kind, mask in kinds.items() if mask[place]),
            "cosine": float(shift.cosines[place]),
            "before": float(shift.before[place]),
            "after": float(shift.after[place]),
            "reduction": float(shift.reductions[place]),
        }
        for place in places
        if size[place] > 0
    ]
