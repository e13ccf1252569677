"""The plots of a training run, as PNG pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.training_runs.files import TrainingRun
from eval.training_runs.series import (
    averaged,
    by_start,
    curve,
    eval_keys,
    fraction_names,
    has_position,
    length_edges,
    length_shares,
    share_blocks,
    start_groups,
    thirds,
)

WIDTH, HEIGHT = 6.0, 4.2
"Inches of a picture."
HELD_OUT = {
    "eval/kl": ("Held-out KL", "KL per response, nats", "nats"),
    "eval/log_ratio": ("Held-out log ratio", "log ratio per response, nats", "nats"),
    "eval/length": ("Held-out length", "tokens", "tokens"),
    "eval/ended": ("Held-out share ended", "share of completions", "share"),
}
"Titles, axis labels and units of the held-out metrics that are no rewards."


@dataclass(frozen=True)
class Plot:
    title: str
    png: bytes


def eval_plots(run: TrainingRun) -> list[Plot]:
    """Draw the held-out metrics over the steps: rewards, KL or log ratio, length, share ended."""
    keys = eval_keys(run.metrics)
    rewards = [key for key in keys if key not in HELD_OUT]
    drawn = [("Held-out score", "score", rewards)]
    drawn += [(title, label, [key]) for key, (title, label, _) in HELD_OUT.items() if key in keys]
    plots = []
    for title, label, names in drawn:
        lines = {name.removeprefix("eval/"): curve(run.metrics, name) for name in names}
        plots.append(_picture(title, partial(_lines, lines=lines, label=label, marker="o")))
    return plots


def start_plots(run: TrainingRun) -> list[Plot]:
    """Draw score, KL and sampled length over the steps, a line for each group of rollouts by their start.

    Of an adaptive length the position is drawn, too.
    """
    plots = []
    groups = start_groups(run.metrics)
    colours = [_colour(group) for group in groups]
    for metric, (title, label) in by_start(run.metrics).items():
        lines = {name: averaged(curve(run.metrics, f"{group}/{metric}")) for group, name in groups.items()}
        draw = partial(_lines, lines=lines, label=label, colours=colours)
        plots.append(_picture(f"{title} by start", draw))
    if has_position(run.metrics):
        lines = {"position": averaged(curve(run.metrics, "reset/position"))}
        label = "position (0: shortest prefix, 1: longest)"
        plots.append(_picture("Position of the adaptive length", partial(_lines, lines=lines, label=label)))
    return plots


def reset_plots(resets: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Draw the shares of prefix fractions over the steps, and those of lengths in each third of training."""
    return [
        _picture("Prefix fraction as drawn", partial(_heat_map, resets=resets)),
        _picture("Forced tokens as drawn", partial(_histograms, resets=resets)),
    ]


def _picture(title: str, draw: Callable[[Axes], None]) -> Plot:
    content = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}):  # the name of a reward is not a formula
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(figure.subplots())
        figure.savefig(content, format="png", dpi=120)
    return Plot(title, content.getvalue())


def _colour(group: str) -> Any:
    """Return the colour of a group of rollouts, the same for every run: by the lower end of its prefix fractions."""
    if group == "from_prompt":
        return "grey"
    low = float(group.split("_")[1])
    return matplotlib.colormaps["viridis"](min(0.9, 1.2 * low))


def _lines(
    axis: Axes,
    lines: Mapping[str, tuple[list[float], list[float]]],
    label: str,
    marker: str | None = None,
    colours: Sequence[Any] | None = None,
) -> None:
    for index, (name, (steps, values)) in enumerate(lines.items()):
        colour = None if colours is None else colours[index]
        shape = "o" if len(steps) == 1 else marker  # a line of one point would not be seen
        axis.plot(steps, values, marker=shape, markersize=4, color=colour, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        _legend(axis)


def _heat_map(axis: Axes, resets: Sequence[Mapping[str, Any]]) -> None:
    edges, shares = share_blocks(resets)
    names = fraction_names()
    mesh = axis.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, shares, cmap="viridis", vmin=0)
    axis.axhline(0.5, color="white", linewidth=2)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("step")
    axis.set_ylabel("prefix fraction h/L")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.figure.colorbar(mesh, ax=axis, label="share of rollouts")


def _histograms(axis: Axes, resets: Sequence[Mapping[str, Any]]) -> None:
    edges = length_edges(resets)
    for name, rows in thirds(resets).items():
        axis.stairs(length_shares(rows, edges), np.array(edges) - 0.5, linewidth=1.5, label=name)
    axis.set_xlabel("forced tokens h (0: bare prompt)")
    axis.set_ylabel("share of rollouts")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    _legend(axis)


def _legend(axis: Axes) -> None:
    """Put the legend below the axes, where it hides nothing."""
    axis.figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
