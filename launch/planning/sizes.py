"""What a dry run measures: the weights of a model, and a phase of a step."""

from __future__ import annotations

from typing import NamedTuple


class Weights(NamedTuple):
    """Elements and bytes of a model's weights, without those that it shares with a model before it."""

    trained: int
    trained_bytes: int
    frozen: int = 0
    frozen_bytes: int = 0
    shared_bytes: int = 0
    "Of the weights that it shares."


class Phase(NamedTuple):
    """What a phase holds at its peak beyond weights, gradients and optimizer state, in bytes."""

    name: str
    activations: int
    "All but the cache: activations, temporaries, bf16 copies of weights."
    cache: int = 0
    "Keys and values of rollouts."
    logits: int = 0
    "The share of one chunk of logits in `activations`."
    with_gradients: bool = False
    gathers_policy: bool = False
    "Whether the whole policy is gathered where its weights are divided (ZeRO-3)."
