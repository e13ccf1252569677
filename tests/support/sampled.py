"""The sampler's tokens alone."""

from __future__ import annotations

from drpo.rollout.sampler import sample


def generate(*arguments, **settings) -> list[list[int]]:
    return sample(*arguments, **settings).tokens
