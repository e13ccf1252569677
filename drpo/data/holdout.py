"""Hold out prompts by a hash of the prompt, so that SFT, reward model and RL agree on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from drpo.config import key
from drpo.data.records import DataError, Record


def is_held_out(prompt: str, fraction: float, seed: int) -> bool:
    """Return whether a prompt is held out: hash(seed, prompt) < fraction, with a hash uniform on [0, 1).

    The answer depends on nothing else: not on the other prompts, their order or number.
    """
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def hold_out(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split records by whether their prompt is held out; DataError if a fraction > 0 holds out none."""
    train = [record for record in records if not is_held_out(record.shared_prompt, fraction, seed)]
    held_out = [record for record in records if is_held_out(record.shared_prompt, fraction, seed)]
    if fraction > 0 and not held_out:
        num_prompts = len({record.shared_prompt for record in records})
        raise DataError(
            f"{key('eval_fraction')}={fraction:g} of {num_prompts} distinct prompts held out none: "
            "raise it, or set it to 0 to hold out nothing"
        )
    return train, held_out
