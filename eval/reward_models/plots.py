"""The plots of an evaluation, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.reward_models.pairs import ScoredPairs
from eval.statistics.pair_accuracy import equal_mass_bins

WIDTH, HEIGHT = 6.0, 4.2
"Inches of one panel."
SCORE_BINS = 40


PLOTS = {
    "Reliability": "reliability.png",
    "Margin by length difference": "margin_by_length.png",
    "Scores": "scores.png",
    "Best of n": "best_of_n.png",
}
"File names by title."


def plots_of(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Return file names by title of the plots that an evaluation has."""
    has_samples = evaluation["models"][0]["best_of_n"] is not None
    return {title: name for title, name in PLOTS.items() if has_samples or title != "Best of n"}


def plot_all(
    evaluation: Mapping[str, Any], scored: Mapping[str, ScoredPairs], num_bins: int, folder: Path
) -> None:
    """Write the plots of `plots_of` to the folder."""
    models = evaluation["models"]
    curves = list((models[0]["best_of_n"] or {"curves": {}})["curves"])[:2]
    drawings = {
        "Reliability": (1, lambda axes: _reliability(axes[0], models)),
        "Margin by length difference": (1, lambda axes: _margin_by_length(axes[0], scored, num_bins)),
        "Scores": (len(scored), lambda axes: _scores(axes, scored)),
        "Best of n": (len(curves), lambda axes: _best_of_n(axes, models, curves)),
    }
    for title, name in plots_of(evaluation).items():
        _save(folder / name, *drawings[title])


def _save(path: Path, num_panels: int, draw: Callable[[Sequence[Axes]], None]) -> None:
    figure = Figure(figsize=(WIDTH * num_panels, HEIGHT), layout="constrained")
    draw(list(figure.subplots(1, num_panels, squeeze=False)[0]))
    figure.savefig(path, dpi=120)


def _reliability(axis: Axes, models: Sequence[Mapping[str, Any]]) -> None:
    axis.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", label="calibrated")
    for model in models:
        bins = model["calibration"]["bins"]
        x, y = ([each[name] for each in bins] for name in ("confidence", "accuracy"))
        limits = np.array([[each["interval"]["low"], each["interval"]["high"]] for each in bins]).T
        middle = [each["interval"]["value"] for each in bins]
        # The interval is over prompts; shifted to the share over pairs, at which the ECE is computed.
        errors = np.abs(limits - middle)
        axis.errorbar(x, y, errors, marker="o", capsize=2, label=model["name"])
    axis.set_xlabel("confidence, sigmoid(|margin|)")
    axis.set_ylabel("share of pairs that are right")
    axis.legend()


def _margin_by_length(axis: Axes, scored: Mapping[str, ScoredPairs], num_bins: int) -> None:
    axis.axhline(0, color="grey", linestyle="--")
    for label, pairs in scored.items():
        lengths, margins = pairs.length_differences.astype(float), pairs.margins
        (line,) = axis.plot(lengths, margins, ".", markersize=2, alpha=0.3)
        bins = equal_mass_bins(lengths, num_bins)
        counts = np.bincount(bins)
        x, y = (np.bincount(bins, weights=values) / counts for values in (lengths, margins))
        axis.plot(x, y, marker="o", color=line.get_color(), label=label)
    axis.set_xlabel("tokens of the chosen minus the rejected response")
    axis.set_ylabel("margin of the scores")
    axis.legend()


def _scores(axes: Sequence[Axes], scored: Mapping[str, ScoredPairs]) -> None:
    for axis, (label, pairs) in zip(axes, scored.items(), strict=True):
        edges = np.histogram_bin_edges(np.concatenate([pairs.chosen, pairs.rejected]), SCORE_BINS)
        for name, values in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
            axis.hist(values, edges, alpha=0.5, label=name)
        axis.set_title(label)
        axis.set_xlabel("score")
        axis.set_ylabel("responses")
        axis.legend()


def _best_of_n(axes: Sequence[Axes], models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for axis, name in zip(axes, names, strict=True):
        for model in models:
            result = model["best_of_n"]
            points = result["curves"][name]
            low, high = ([point[limit] for point in points] for limit in ("low", "high"))
            values = [point["value"] for point in points]
            axis.plot(result["kl_bound"], values, marker="o", markersize=3, label=model["name"])
            axis.fill_between(result["kl_bound"], low, high, alpha=0.2)
        if name == "true_reward":
            best = [point["value"] for point in models[0]["best_of_n"]["curves"]["true_best"]]
            axis.plot(
                models[0]["best_of_n"]["kl_bound"], best, color="grey", linestyle="--", label="best possible"
            )
        axis.set_xlabel("bound of the KL to the policy, log n - (n - 1) / n, in nats")
        axis.set_ylabel({"score": "score of the reward model", "true_reward": "true reward"}[name])
        axis.legend()
