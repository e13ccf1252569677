"""Output of a neuron shift: arrays by neuron, the summary as JSON and Markdown, a plot by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.neurons.neuron_edits import BEFORE
from eval.neurons.neuron_shift import NeuronShift

GROUP_ROW = (
    "| {name} | {neurons} | {count} | {gross:.4g} | {share} | {opposing_count} | {opposing:.4g} | {net:.4g} |"
)
NEURON_ROW = "| {layer} | {neuron} | {kind} | {cosine:.3f} | {before:.4g} | {after:.4g} | {reduction:.4g} |"
WrittenSummary = dict[str, dict[str, dict[str, float]]]
"Policy -> measurement -> mean, change and half_width."


def save_arrays(shift: NeuronShift, path: Path) -> None:
    """Write an .npz of arrays (L, d_mlp); `group` contains "TP-", ..., or "" for neurons outside the groups."""
    group = np.full(tuple(shift.before.shape), "", dtype="<U3")
    for name, mask in shift.group_masks().items():
        group[mask.numpy()] = name
    derived = ("projections_before", "projections_after", "reductions", "value_reductions")
    names = (*NeuronShift.__dataclass_fields__, *derived)
    np.savez_compressed(path, group=group, **{name: getattr(shift, name).numpy() for name in names})


def load_arrays(path: Path) -> NeuronShift:
    """Read the NeuronShift of a file by `save_arrays`."""
    with np.load(path) as arrays:
        return NeuronShift(*(torch.from_numpy(arrays[name]) for name in NeuronShift.__dataclass_fields__))


def save_summary(summary: dict[str, Any], path: Path) -> None:
    """Write JSON; nan and infinities become null."""
    values = json.loads(json.dumps(summary), parse_constant=lambda _: None)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def markdown(summary: dict[str, Any]) -> str:
    """Format the summary as tables: groups and their total, then layers, then the neurons that moved most."""
    groups, sums_of_layers = summary["groups"], summary["layers"]
    total = {"share": sum(group["share"] for group in groups.values()), **summary["total"]}
    lines = [
        "| group | neurons of the kind | moved away | gross | share of gross | moved toward | opposing | net |",
        "| --- " * 8 + "|",
    ]
    for name, row in {**groups, "all": total}.items():
        share = "-" if np.isnan(row["share"]) else f"{row['share']:.1%}"
        lines.append(GROUP_ROW.format_map({**row, "name": name, "share": share}))
    lines += [
        "",
        f"Net over gross: {total['balance']:.3f}. The changed value vectors add {total['value_vectors']:.4g} to the "
        "net.",
        "",
        "| layer | gross | opposing | net | " + " | ".join(groups) + " |",
        "| --- " * (4 + len(groups)) + "|",
    ]
    for layer in range(summary["shape"][0]):
        cells = [f"{sums_of_layers[name][layer]:.4g}" for name in ("gross", "opposing", "net", *groups)]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    for direction, neurons in summary["top"].items():
        lines += [
            "",
            f"Neurons that moved most {direction} the probe direction:",
            "",
            "| layer | neuron | kind | cosine | activation before | after | reduction |",
            "| --- " * 7 + "|",
            *map(NEURON_ROW.format_map, neurons),
        ]
    return "\n".join(lines) + "\n"


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


def page(summary: dict[str, Any], reports: list[str]) -> str:
    """Format the Markdown page of a whole analysis: policies, tables, measures of the continuations, data."""
    positions, probe = summary["num_positions"], summary["probe"]
    writer = "each policy" if summary["recorded_on"] == "own" else "the policy before"
    parts = [
        f"# Neurons of {summary['policies']['after']} against {summary['policies']['before']}\n",
        f"{summary['num_prompts']} prompts, recorded on what {writer} writes; {positions['before']} positions before, "
        f"{positions['after']} after.",
    ]
    if probe is not None:
        parts.append(
            f"Probe on {probe['num_texts']} texts held out: accuracy {probe['accuracy']:.3f} (always the commoner "
            f"label: {probe['commoner_label']:.3f}), AUC {probe['auc']:.3f}."
        )
    noise = summary["total"]["noise_gross"]
    parts += [
        f"Two samples of the policy before would show a gross sum of about {noise:.4g} by chance.\n",
        markdown(summary),
        "## What the policies write\n",
        written_markdown(summary["written"]),
        "## Data\n",
    ]
    return "\n".join([*parts, *reports]) + "\n"


def plot_layers(summary: dict[str, Any], path: Path) -> None:
    """Plot by layer: gross stacked by group, opposing and net."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sums = summary["layers"]
    layers = range(summary["shape"][0])
    figure, axis = pyplot.subplots(figsize=(7, 4))
    bottom = np.zeros(len(layers))
    for group in summary["groups"]:
        axis.bar(layers, sums[group], bottom=bottom, label=group)
        bottom = bottom + sums[group]
    axis.bar(layers, sums["opposing"], color="lightgrey", label="opposing")
    axis.plot(layers, sums["net"], color="black", marker="o", label="net")
    axis.axhline(0, color="black", linewidth=0.5)
    if len(layers) <= 16:
        axis.set_xticks(layers)
    axis.set_xlabel("layer")
    axis.set_ylabel("reduction of the projection")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
