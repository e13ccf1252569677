"""Describe the machine and the packages, for bug reports."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from drpo.precision import PRECISIONS, choose_precision
from drpo.versions import VERSIONED_PACKAGES, git_commit, package_versions

OTHER_PACKAGES = ("tokenizers", "numpy", "openai", "trl")


def environment_text() -> str:
    """Return `name: value` lines: versions, CPU, GPUs, and the precision that a run would choose."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision, why = choose_precision(None, None, device)
    lines = {
        "drpo": f"{metadata.version('drpo')} (commit {git_commit()})",
        "python": platform.python_version(),
        "system": platform.platform(),
        **package_versions((*VERSIONED_PACKAGES, *OTHER_PACKAGES)),
        "CPU": f"{_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        **_gpus(),
        "precision": f"{PRECISIONS[precision]}, {why}",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"GPU": "none"}
    gpus = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gpus[f"GPU {index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    return gpus | {"CUDA": str(torch.version.cuda)}
