"""Bytes per GPU and per machine, from what a dry run of one process measures and how the launcher divides it.

    N processes, T trained elements, b bytes each (4, or 2 where DeepSpeed casts to bf16), B = 5e8

                      one process    DDP        ZeRO-2          ZeRO-3
    weights           b T            b T        b T             b T / N, and b min(T, 10^9) gathered
    gradients         b T            b T        4 T / N         4 T / N
    their transport   0              b T        b B             b B, twice in the update
    optimizer         8 T            8 T        12 T / N        12 T / N
    frozen models     all            all        all             1 / N

The optimizer is AdamW: two moments, and under ZeRO the float32 weights that it steps. DDP's buckets stay for the whole
run; gradients of several micro-batches are summed outside them. B is DeepSpeed's default `reduce_bucket_size`, 10^9 its
`stage3_max_live_parameters`; ZeRO-3 keeps its bucket and gradients, copies the bucket to reduce it, and the gradients
for the optimizer (DeepSpeed 0.19). Source of the division: Rajbhandari et al. 2020 (ZeRO), section 5, with float32
gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from launch.planning.sizes import Phase, Weights

BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
FLOAT = 4

Parts = dict[str, int]
"Bytes by what they are for."


class Sharding(NamedTuple):
    """How a launcher divides a run."""

    num_processes: int = 1
    zero_stage: int = 0
    "0: every process holds all (one process, DDP); 1 to 3: DeepSpeed's."
    offload_optimizer: bool = False
    offload_weights: bool = False
    "ZeRO-3: the divided weights are on the host."


def device_memory(
    weights: Mapping[str, Weights],
    phases: Sequence[Phase],
    sharding: Sharding,
    bucket: int = BUCKET,
    waiting: Mapping[str, str] | None = None,
) -> dict[str, Parts]:
    """Return the parts of each phase on one device, in bytes; a part of no bytes is left out.

    Args:
        weights: by model.
        phases: of a step.
        sharding: how the launcher divides the run.
        bucket: elements of DeepSpeed's reduction bucket.
        waiting: models that wait on the host, and the phase that needs them.
    """
    always, memory = _always(weights, sharding, bucket), {}
    for phase in phases:
        absent = {name for name, needed in (waiting or {}).items() if needed != phase.name}
        parts = always | _of_phase(weights, phase, sharding, bucket)
        memory[phase.name] = {name: size for name, size in parts.items() if size and name not in absent}
    return memory


def host_memory(
    weights: Mapping[str, Weights], sharding: Sharding, processes_here: int, waiting: Collection[str] = ()
) -> Parts:
    """Return the parts of one machine's memory that holds `processes_here` processes, in bytes.

    Models `waiting` are there outside their phase. Every process loads whole models in float32 before they go to its
    device, the trained ones together.
    """
    num_trained = _trained(weights)
    loaded = FLOAT * sum(model.trained + model.frozen for model in weights.values() if model.trained)
    share = -(-num_trained // sharding.num_processes)
    parts = {"models while they load": loaded}
    if sharding.offload_optimizer:
        parts |= {"optimizer": 3 * FLOAT * share, "gradients": FLOAT * share}
    if sharding.offload_weights:
        parts["weights"] = sum(_divided(model, sharding) for model in weights.values())
    for name in waiting:
        held = weights[name].trained_bytes + weights[name].frozen_bytes
        parts[name] = _divided(weights[name], sharding) if sharding.zero_stage == 3 else held
    return {name: processes_here * size for name, size in parts.items() if size}


def _always(weights: Mapping[str, Weights], sharding: Sharding, bucket: int) -> Parts:
    """Return what a device holds in every phase."""
    parts = {name: model.trained_bytes + model.frozen_bytes for name, model in weights.items()}
    num_trained = _trained(weights)
    share, element = _share(weights, sharding), _element_bytes(weights)
    if sharding.zero_stage == 3:
        parts = {
            name: 0 if sharding.offload_weights else _divided(model, sharding)
            for name, model in weights.items()
        }
        parts["communication"] = bucket * element
        if not sharding.offload_optimizer:
            parts["gradients"] = FLOAT * share
    elif sharding.zero_stage == 0 and sharding.num_processes > 1:
        parts["communication"] = element * num_trained
    masters = FLOAT * share if sharding.zero_stage else 0
    moments = 2 * FLOAT * (share if sharding.zero_stage else num_trained)
    parts["optimizer"] = 0 if sharding.offload_optimizer else masters + moments
    return parts


def _of_phase(weights: Mapping[str, Weights], phase: Phase, sharding: Sharding, bucket: int) -> Parts:
    """Return what a device holds in this phase alone, or more of in it."""
    element, share = _element_bytes(weights), _share(weights, sharding)
    parts = {"key-value cache": phase.cache, "activations": phase.activations}
    is_step = phase.name == "step"
    if is_step and sharding.offload_optimizer:
        parts["activations"] = 0
    if phase.with_gradients or is_step:
        is_ddp = sharding.zero_stage == 0 and sharding.num_processes > 1
        if is_ddp and is_step:
            parts["gradients"] = 0  # they are in the buckets
        elif sharding.zero_stage == 0:
            parts["gradients"] = element * _trained(weights)
        elif not sharding.offload_optimizer:
            copies = 2 if is_step and sharding.zero_stage == 3 else 1
            parts["gradients"] = copies * FLOAT * share
        if sharding.zero_stage and phase.with_gradients:
            parts["communication"] = bucket * element * (2 if sharding.zero_stage == 3 else 1)
    if sharding.zero_stage == 3:
        parts["gathered weights"] = 0 if is_step else _gathered(weights, phase)
    return parts


def _gathered(weights: Mapping[str, Weights], phase: Phase) -> int:
    """Return the bytes of weights that ZeRO-3 gathers at a time."""
    if phase.gathers_policy:
        return weights["policy"].trained_bytes + weights["policy"].frozen_bytes
    elements = sum(model.trained + model.frozen for model in weights.values())
    held = sum(model.trained_bytes + model.frozen_bytes for model in weights.values())
    return held * min(elements, MAX_LIVE) // max(elements, 1)


def _divided(model: Weights, sharding: Sharding) -> int:
    """Return one process's share of a model; ZeRO-3 divides frozen models on their own, so they share nothing."""
    held = model.trained_bytes + model.frozen_bytes + (0 if model.trained else model.shared_bytes)
    return -(-held // sharding.num_processes)


def _trained(weights: Mapping[str, Weights]) -> int:
    return sum(model.trained for model in weights.values())


def _share(weights: Mapping[str, Weights], sharding: Sharding) -> int:
    return -(-_trained(weights) // sharding.num_processes)


def _element_bytes(weights: Mapping[str, Weights]) -> int:
    return sum(model.trained_bytes for model in weights.values()) // max(_trained(weights), 1)
