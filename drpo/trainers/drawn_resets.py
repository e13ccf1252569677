"""Count where the rollouts of a step started: a row of resets.jsonl."""

from __future__ import annotations

from collections import Counter
from typing import Any

from drpo.rollout.trajectory import Rollouts

NUM_BINS = 10
"Bins of the prefix fraction."


def drawn_resets(rollouts: Rollouts) -> dict[str, Any]:
    """Count the rollouts of a whole batch by forced tokens h and by prefix fraction h / L, L the source's length.

        lengths[h] = number of rollouts with h forced tokens;   h = 0 is the bare prompt
        fractions[0] = lengths[0];   fractions[b] = number with (b - 1) / 10 < h / L <= b / 10, for b = 1, ..., 10

    `lengths` has strings as keys, as JSON requires, in the order of h.
    """
    forced, sources = rollouts.reset_lengths.tolist(), rollouts.source_lengths.tolist()
    fractions = [0] * (1 + NUM_BINS)
    for h, length in zip(forced, sources, strict=True):
        fractions[-(-NUM_BINS * h // length) if h else 0] += 1  # ceil(10 h / L), exact in integers
    return {
        "lengths": {str(h): count for h, count in sorted(Counter(forced).items())},
        "fractions": fractions,
    }
