"""Numbers of a run over its steps: curves, means by thirds of training, and where rollouts started."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drpo.trainers.drawn_resets import NUM_BINS

Row = Mapping[str, Any]
Curve = tuple[list[float], list[float]]
"Steps and values."

NUM_BLOCKS = 100
"Points of a curve at most; those of a longer run are means over blocks of steps."
BARE_PROMPT = "bare prompt"
_GROUP = re.compile(r"prefix_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)/\w+", re.ASCII)


def curve(rows: Sequence[Row], key: str) -> Curve:
    """Return the finite values of a metric with their steps; a step without one is left out."""
    points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def by_start(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return title and unit of what is shown of each group of rollouts by their start, by metric.

    The KL is the k1 estimate, or k3 for runs of earlier versions, which have no other.
    """
    kl = "kl_k1" if any(key.endswith("/kl_k1") for row in rows for key in row) else "kl_k3"
    return {
        "score": ("Score", "score"),
        kl: ("KL", "KL per rollout, nats"),
        "sampled_length": ("Sampled length", "sampled tokens"),
    }


def has_position(rows: Sequence[Row]) -> bool:
    """Return whether the run searched for the length of its prefixes (reset.length=adaptive)."""
    return any("reset/position" in row for row in rows)


def averaged(points: Curve) -> Curve:
    """Average a curve over blocks of consecutive points, so that at most NUM_BLOCKS are left."""
    blocks = [np.array_split(values, min(NUM_BLOCKS, max(1, len(values)))) for values in points]
    steps, values = ([float(block.mean()) for block in each if len(block)] for each in blocks)
    return steps, values


def eval_keys(rows: Sequence[Row]) -> list[str]:
    """Return the held-out metrics, `eval/<name>`, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith("eval/")))


def start_groups(rows: Sequence[Row]) -> dict[str, str]:
    """Return the names of the groups of rollouts by their start, by the prefix of their metrics: bare prompt first."""
    found = {
        match[0].partition("/")[0]: match for row in rows for match in map(_GROUP.fullmatch, row) if match
    }
    ordered = sorted(found.values(), key=lambda match: float(match[1]))
    groups = {match[0].partition("/")[0]: f"h/L in ({match[1]}, {match[2]}]" for match in ordered}
    has_prompts = any("from_prompt/score" in row for row in rows)
    return ({"from_prompt": BARE_PROMPT} if has_prompts else {}) | groups


def thirds(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Divide the rows of steps 1, 2, ... into first, middle and last third, named by their steps; fewer if short."""
    trained = [row for row in rows if row["step"] > 0]
    sizes = [(len(trained) * i) // 3 for i in range(4)]
    parts = [trained[low:high] for low, high in zip(sizes, sizes[1:], strict=False) if high > low]
    return {_steps_text(part): part for part in parts}


def _steps_text(part: Sequence[Row]) -> str:
    first, last = part[0]["step"], part[-1]["step"]
    return f"step {first}" if first == last else f"steps {first}–{last}"


def mean(rows: Sequence[Row], key: str) -> float | None:
    """Return the mean of a metric over the steps that have it; None without one, not finite if a value is not."""
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else None


# --- where rollouts started -------------------------------------------------------------------------------


def fraction_names() -> list[str]:
    """Return the names of the counts in `fractions` of resets.jsonl."""
    bins = (f"({low / NUM_BINS:g}, {(low + 1) / NUM_BINS:g}]" for low in range(NUM_BINS))
    return [BARE_PROMPT, *bins]


def fraction_shares(rows: Sequence[Row]) -> list[float]:
    """Return the share of all rollouts of these rows in every bin of `fractions`."""
    counts = np.sum([row["fractions"] for row in rows], axis=0)
    return (counts / counts.sum()).tolist()


def share_blocks(rows: Sequence[Row]) -> tuple[list[float], NDArray[np.float64]]:
    """Return the limits of at most NUM_BLOCKS blocks of steps, and the shares in each, (bins, blocks)."""
    num_blocks = min(NUM_BLOCKS, len(rows))
    limits = [len(rows) * i // num_blocks for i in range(num_blocks + 1)]
    blocks = [rows[low:high] for low, high in zip(limits, limits[1:], strict=False)]
    edges = [block[0]["step"] - 0.5 for block in blocks] + [rows[-1]["step"] + 0.5]
    return edges, np.array([fraction_shares(block) for block in blocks]).T


def length_shares(rows: Sequence[Row], edges: Sequence[int]) -> list[float]:
    """Return the share of all rollouts with low <= h < high forced tokens, for neighbours low and high of `edges`."""
    lengths = [(int(h), count) for row in rows for h, count in row["lengths"].items()]
    values, counts = zip(*lengths, strict=True)
    found, _ = np.histogram(values, bins=edges, weights=counts)
    return (found / sum(counts)).tolist()


def length_edges(rows: Sequence[Row], max_bars: int = 50) -> list[int]:
    """Return the limits of at most `max_bars` bars of equally many lengths h, from 0 to the longest of all rows."""
    longest = max(int(h) for row in rows for h in row["lengths"])
    width = -(-(longest + 1) // max_bars)
    return list(range(0, longest + 1 + width, width))


def mean_length(rows: Sequence[Row]) -> float:
    """Return the mean of h over all rollouts, the bare prompts counted as 0."""
    lengths = [(int(h), count) for row in rows for h, count in row["lengths"].items()]
    return sum(h * count for h, count in lengths) / sum(count for _, count in lengths)
