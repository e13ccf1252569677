"""How an accelerate config divides a run, read from its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from drpo.config import ConfigError
from launch.planning.sharding import Sharding


class Launcher(NamedTuple):
    """An accelerate config on given GPUs."""

    name: str
    sharding: Sharding
    deepspeed: bool
    precision: str
    "no or bf16."


def read_launcher(path: Path, gpus_per_machine: int) -> Launcher:
    """Read an accelerate config, with one process for each GPU. Raises ConfigError for one that a plan cannot size."""
    config = yaml.safe_load(path.read_text()) or {}
    kind, precision = str(config.get("distributed_type", "NO")), str(config.get("mixed_precision") or "no")
    num_processes = gpus_per_machine * int(config.get("num_machines", 1))
    if config.get("use_cpu"):
        raise ConfigError(f"--accelerate: {path.stem} runs on CPUs, and a plan is for GPUs")
    match kind:
        case "NO":
            return Launcher(path.stem, Sharding(), False, precision)
        case "MULTI_GPU":
            return Launcher(path.stem, Sharding(num_processes), False, precision)
        case "DEEPSPEED":
            settings = _deepspeed(config.get("deepspeed_config") or {}, path)
            offloads = [
                settings.get(f"offload_{part}_device") in ("cpu", "nvme") for part in ("optimizer", "param")
            ]
            sharding = Sharding(num_processes, int(settings.get("zero_stage", 2)), *offloads)
            return Launcher(path.stem, sharding, True, settings.get("precision", precision))
    raise ConfigError(
        f"--accelerate: {path} has distributed_type {kind}; a plan knows NO, MULTI_GPU and DEEPSPEED"
    )


def _deepspeed(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return accelerate's keys of DeepSpeed, also of a DeepSpeed config file that it names."""
    if "deepspeed_config_file" not in settings:
        return settings
    file = Path(settings["deepspeed_config_file"])
    if not file.is_file():
        raise ConfigError(f"--accelerate: {path} names the DeepSpeed config {file}, which is not there")
    content = json.loads(file.read_text())
    zero = content.get("zero_optimization", {})
    read = {
        f"offload_{part}_device": zero.get(f"offload_{part}", {}).get("device")
        for part in ("optimizer", "param")
    }
    bf16 = content.get("bf16", {}).get("enabled")
    precision = {} if bf16 in (None, "auto") else {"precision": "bf16" if bf16 else "no"}
    return {"zero_stage": zero.get("stage", 0), **read, **precision}
