"""Random numbers that are drawn by (seed, purpose, key), so that a resumed run needs no state to draw on.

    stream(seed, Stream.RESETS, episode)      numbers of the run that depend on (seed, purpose, episode)
    seed + SeedOffset.EVALUATION              seed of responses that are sampled beside the rollouts

The numbers below are part of what makes a run reproducible: changing one changes every run. New weights, flipped
labels and generated data have seeds of their own.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for."""

    RESETS = 1
    "Whether and where a rollout is reset."
    ORDER = 2
    "The order of examples in each pass."
    MINIBATCHES = 3
    "The order of rollouts in each epoch of an update."
    OWN_ROLLOUTS = 4
    "Which earlier rollout a reset goes to."
    SPREAD = 5
    "Where the search for a prefix places a new prompt."
    SAMPLING = 0x5A3
    "Tokens of a response."


class SeedOffset(IntEnum):
    """Added to the seed of responses that are sampled beside the rollouts, so that none has a rollout's numbers."""

    EVALUATION = 1_000_003
    CONTINUATIONS = 2_000_003
    "From states within rollouts, for Monte-Carlo values."
    INITIAL_POLICY = 3_000_017


def stream(seed: int, purpose: Stream, *key: int) -> np.random.Generator:
    """Return the random numbers of a purpose, which depend on the arguments alone."""
    return np.random.default_rng([seed, int(purpose), *key])
