"""The order of examples: pass after pass, each in its own seeded order, without any state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from drpo.random_streams import Stream, stream

Item = TypeVar("Item")


def item_at(items: Sequence[Item], index: int, seed: int) -> Item:
    """Return the `index`-th item of an endless sequence of shuffled passes over `items`.

    A function of (seed, index) alone: a resumed run needs no cursor, and every process can look up any index.
    """
    sweep, position = divmod(index, len(items))
    return items[_order(len(items), sweep, seed)[position]]


@functools.lru_cache(maxsize=4)
def _order(num_items: int, sweep: int, seed: int) -> np.ndarray:
    return stream(seed, Stream.ORDER, sweep).permutation(num_items)
