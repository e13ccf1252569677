"""GPUs by name: how many, and how much of their memory a run can use."""

from __future__ import annotations

import re
from typing import NamedTuple

from drpo.config import ConfigError

GIB = 2**30
CAPACITY = {
    "3090": 23.7,
    "4090": 23.5,
    "A10G": 22.0,
    "L4": 22.0,
    "L40S": 44.4,
    "A100-40": 39.4,
    "A100-80": 79.2,
    "H100": 79.1,
    "H200": 139.8,
    "B200": 178.3,
}
"Total memory in GiB, as torch's out-of-memory errors give it: less than the number on the box."
CONTEXT_GIB = 0.75
"CUDA's context and the kernels that a run loads."
NCCL_GIB = 0.5
"Buffers of NCCL, where several GPUs talk."
FRAGMENTED = 0.05
"Share that the caching allocator cannot hand out: its blocks do not fit each other."


class Gpus(NamedTuple):
    """Equal GPUs of one machine."""

    count: int
    name: str
    capacity: float
    "Memory of one, in bytes."

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors can take."""
        reserved = CONTEXT_GIB + (NCCL_GIB if self.count > 1 else 0)
        return (1 - FRAGMENTED) * (self.capacity - reserved * GIB)


def parse_gpus(text: str) -> Gpus:
    """Read `8xH100`, `L4`, or a size in GB (10^9 bytes) in place of the name: `8x80`.

    Raises ConfigError for an unknown name.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(?:RTX[ -]?)?([\w.-]+)", text.strip(), re.IGNORECASE)
    count, name = (int(match[1] or 1), match[2].upper()) if match else (0, "")
    if count and name in CAPACITY:
        return Gpus(count, name, CAPACITY[name] * GIB)
    if count and re.fullmatch(r"\d+(\.\d+)?(GB)?", name) and float(name.removesuffix("GB")) > 0:
        return Gpus(count, f"{name.removesuffix('GB')} GB", float(name.removesuffix("GB")) * 1e9)
    raise ConfigError(
        f"--gpus: {text!r} is unknown; write a number of GPUs and a name or a size in GB, as 8xH100 or 8x80; the names "
        f"are {', '.join(CAPACITY)}"
    )
