"""Tiny runs as real processes: a random policy of a few thousand weights on the demo task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import torch
import warm_python
import yaml
from safetensors.torch import load_file

from drpo.run.metrics import read_metrics, reproducible

ROOT = Path(__file__).resolve().parents[2]

# What a launcher leaves in the environment of this process must not reach the runs under test.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))} | {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

SFT = {
    "num_steps": 2,
    "data": {"task": "demo", "demo": {"num_train": 256, "num_eval": 8}},
    "model": {
        "architecture": {
            "model_type": "gpt_neox",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
        "vocab_size": 400,
    },
    "batch": {"size": 8, "microbatch_size": 8},
    "optim": {"learning_rate": 1e-3},
    "eval": {"every": 0},
    "sample": {"num_prompts": 0},
    "log": {"samples_every": 0},
    "engine": {"trackers": [], "mixed_precision": "no"},
}

ONLINE = {
    "num_steps": 4,
    "data": {"task": "demo", "demo": {"num_train": 256, "num_eval": 8}},
    "reward": {"function": "drpo.data.tasks.demo:true_rewards", "shaping": {"missing_stop": "none"}},
    "kl": {"coef": 0.1, "target_per_token": 0.2, "horizon": 100},
    "rollout": {
        "batch_size": 16,
        "max_response_length": 8,
        "generation_batch_size": 8,
        "sampling": {"temperature": 1.0},
    },
    "ppo": {"num_epochs": 2, "num_minibatches": 2, "microbatch_size": 8},
    "optim": {"learning_rate": 1e-3},
    "eval": {"every": 2, "num_prompts": 8, "temperature": 1.0},
    "log": {"samples_every": 2},
    "checkpoint": {"every": 1, "keep": 2},
    "engine": {"trackers": [], "mixed_precision": "no"},
}

PREFERENCE = {
    "num_steps": 4,
    "data": {"task": "demo", "demo": {"num_train": 256, "num_eval": 12}},
    "model": {"path": "sft/policy"},
    "batch": {"size": 8, "microbatch_size": 8},
    "optim": {"learning_rate": 1e-3},
    "eval": {"every": 2, "num_examples": 11},
    "sample": {"num_prompts": 5, "max_response_length": 6},
    "checkpoint": {"every": 1, "keep": 9},
    "engine": {"trackers": [], "mixed_precision": "no"},
}
SEVERAL = "../tests/support/several_runs"  # in place of the name of a launch script


def write_recipe(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def plain(script: str) -> list[str]:
    """`python launch/<script>.py`."""
    return [sys.executable, str(ROOT / "launch" / f"{script}.py")]


def ddp(script: str) -> list[str]:
    """Two gloo processes through `accelerate launch`."""
    config = str(ROOT / "launch" / "accelerate" / "cpu.yaml")
    port = ["--main_process_port", "0"]
    return [*accelerate(), "--config_file", config, *port, str(ROOT / "launch" / f"{script}.py")]


def deepspeed(script: str, stage: int | str) -> list[str]:
    """Two DeepSpeed processes on CPU through `accelerate launch`, in float32; `stage` as in the name of the config."""
    config = str(ROOT / "launch" / "accelerate" / f"zero{stage}.yaml")
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    return [*accelerate(), "--config_file", config, *options, str(ROOT / "launch" / f"{script}.py")]


def fsdp2(script: str, *options: str) -> list[str]:
    """Two FSDP2 processes on CPU through `accelerate launch`, in float32 unless the recipe says otherwise."""
    config = str(ROOT / "launch" / "accelerate" / "fsdp2.yaml")
    options = ("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", *options)
    return [*accelerate(), "--config_file", config, *options, str(ROOT / "launch" / f"{script}.py")]


def partitioned(script: str, folder: Path) -> list[str]:
    """Two processes of DeepSpeed's stage 3 that cut every weight in two; by default it leaves small ones whole."""
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }
    (folder / "zero3.json").write_text(json.dumps(settings))
    config = {"distributed_type": "DEEPSPEED", "num_processes": 2, "num_machines": 1, "machine_rank": 0}
    config["deepspeed_config"] = {
        "deepspeed_config_file": str(folder / "zero3.json"),
        "zero3_init_flag": False,
    }
    file = write_recipe(folder / "zero3.yaml", config)
    port = ["--main_process_port", "0"]
    return [*accelerate(), "--config_file", str(file), *port, str(ROOT / "launch" / f"{script}.py")]


def accelerate() -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch"]


def finished(
    command: list[str], *arguments: str, cwd: Path, env: dict[str, str] = CLEAN, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """A process that has run to its end."""
    whole = [*command, *arguments]
    if _can_be_warm(whole):
        return warm_python.completed(whole, cwd, env, timeout)
    return subprocess.run(whole, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def started(
    command: list[str],
    *arguments: str,
    cwd: Path,
    env: dict[str, str] = CLEAN,
    out: IO | None = None,
    err: IO | int | None = None,
) -> warm_python.WarmProcess:
    """One of our commands, or the launcher, as a process that may be killed; see `warm_python.started`."""
    whole = [*command, *arguments]
    assert _can_be_warm(whole), whole
    return warm_python.started(whole, cwd, env, out, err)


def launch_warm(monkeypatch) -> None:
    """Start from the warm parent what `launch.command_line` starts."""

    def run_to_end(command: list[str], stdout: IO, stderr: IO, env: dict[str, str], cwd: Path | None):
        process = started(command, cwd=cwd or Path.cwd(), env=env, out=stdout, err=stderr)
        return subprocess.CompletedProcess(command, process.wait())

    monkeypatch.setattr("launch.command_line.subprocess", SimpleNamespace(run=run_to_end))


def _can_be_warm(command: list[str]) -> bool:
    """Our commands and the launcher need not import torch for themselves."""
    is_script = Path(command[1]).parent in (ROOT / "launch", ROOT / "launch" / "experiments")
    is_module = command[1:3] in (accelerate()[1:], ["-m", "launch.cli"])
    return command[0] == sys.executable and (is_script or is_module)


def run(command: list[str], *arguments: str, cwd: Path, timeout: float = 300) -> str:
    """Run to the end; standard output. Fails with everything the process wrote."""
    done = finished(command, *arguments, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, f"code {done.returncode}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The reproducible metrics of a run."""
    return [reproducible(row) for row in read_metrics(run_dir / "metrics.jsonl")]


def assert_same_policy(left: Path, right: Path, tolerance: float = 2e-4) -> None:
    """The policies of two runs agree weight by weight, to an absolute tolerance."""
    a, b = (load_file(path / "policy" / "model.safetensors") for path in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def assert_close(left: list[dict], right: list[dict], tolerance: float) -> None:
    """Two metric logs agree key by key, to relative or absolute `tolerance`."""
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        far = {k: (a[k], b[k]) for k in a if abs(a[k] - b[k]) > tolerance * max(1.0, abs(a[k]))}
        assert not far, f"step {a['step']}: {far}"
