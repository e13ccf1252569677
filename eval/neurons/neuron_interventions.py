"""Causal check of neuron groups: continuations of the policy before training with changed activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import nn

from drpo.config import Section, setting
from eval.neurons.neuron_edits import patched, scaled, tuning_free_factors
from eval.neurons.neuron_shift import NeuronShift

BEFORE = "before"
EDITED = "before, edited without training"

Continuations = list[list[int]]
WrittenSummary = dict[str, dict[str, dict[str, float]]]
"Policy -> measurement -> mean, change and half_width."


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
        continuations[EDITED] = continue_prompts()
    return continuations


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean of the non-nan values, and the half-width 1.96 s / sqrt(n) of its 95% interval."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if len(known) < 2:
        return (float(known[0]) if len(known) else float("nan")), float("nan")
    return float(known.mean()), float(1.96 * known.std(ddof=1) / np.sqrt(len(known)))


def written_summary(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> WrittenSummary:
    """Summarise policy -> measurement -> mean, and mean change from `before` on the same prompts with half-width.

    `measured` contains one number per prompt, nan where it is missing.
    """
    summary: WrittenSummary = {policy: {} for policy in measured}
    for policy, columns in measured.items():
        for name, values in columns.items():
            change, half = mean_and_half(np.subtract(values, measured[BEFORE][name]))
            summary[policy][name] = {"mean": mean_and_half(values)[0], "change": change, "half_width": half}
    return summary


def written_markdown(summary: WrittenSummary) -> str:
    """Format the summary as a table: mean, and change from `before` with its 95% interval."""
    names = list(summary[BEFORE])
    lines = ["| policy | " + " | ".join(names) + " |", "| --- " * (1 + len(names)) + "|"]
    for policy, columns in summary.items():
        cells = []
        for cell in columns.values():
            change = f" ({cell['change']:+.3f} ± {cell['half_width']:.3f})" if policy != BEFORE else ""
            cells.append(f"{cell['mean']:.3f}{change}")
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
