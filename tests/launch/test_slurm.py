"""The SLURM script on two nodes that are this machine: real launchers and processes, and a SLURM of shell lines."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import CLEAN, ONLINE, ROOT, SFT, assert_close, finished, metrics_of, plain, run, write_recipe

SCRIPT = ROOT / "launch" / "slurm" / "drpo.sbatch"
# Starts the tasks of all nodes and fails if one fails; under LOCAL_DISKS every node has a working directory of its own.
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 9
shift
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  (if [[ -n ${LOCAL_DISKS:-} ]]; then cd "$LOCAL_DISKS/$node"; fi && SLURM_NODEID=$node exec "$@") &
  tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames n[1-2]" ]] && printf '127.0.0.1\\nn2\\n'
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "launch").symlink_to(ROOT / "launch")
    run(plain("sft"), str(write_recipe(folder / "sft.yaml", SFT)), "run_dir=sft", cwd=folder)
    write_recipe(folder / "drpo.yaml", {**ONLINE, "model": {"path": "sft/policy"}, "num_steps": 2})
    run(plain("drpo"), "drpo.yaml", "run_dir=alone", cwd=folder)
    return folder


def free_job_id() -> int:
    """The id of a job whose port is free."""
    with socket.socket() as sock:
        for job in range(os.getpid() % 19000, 20000):
            try:
                sock.bind(("127.0.0.1", 10000 + job))
            except OSError:
                continue
            return job
    raise RuntimeError("no free port")


def sbatch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as the batch step of a job of two nodes with one process each."""
    job = {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": str(free_job_id()),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }
    return finished(["bash", str(SCRIPT)], *arguments, cwd=Path("/"), env={**CLEAN, **job, **environment})


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "zero2", "zero3", "fsdp2"])
def test_two_nodes_equal_one_process(folder, config):
    done = sbatch(folder, config, "drpo", "drpo.yaml", f"run_dir={config}")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert_close(metrics_of(folder / "alone"), metrics_of(folder / config), 2e-4)


@pytest.mark.slow
def test_nodes_without_a_shared_folder_are_refused(folder, tmp_path):
    for node in ("0", "1"):
        (tmp_path / node).mkdir()
        for name in ("launch", "sft", "drpo.yaml"):
            (tmp_path / node / name).symlink_to(folder / name)
    done = sbatch(folder, "cpu", "drpo", "drpo.yaml", "run_dir=runs/x", LOCAL_DISKS=str(tmp_path))
    assert done.returncode != 0
    assert "run_dir: process 1 of 2 cannot see what process 0 writes to" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*/runs/x/metrics.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["cpu"], {}, "usage: sbatch launch/slurm/drpo.sbatch <accelerate config> <script>"),
        (["cpus", "drpo"], {}, "no launch/accelerate/cpus.yaml in .*; submit from the root of a checkout"),
        (["cpu", "dr-dpo"], {}, "no launch/dr_dpo.py in .*; submit from the root of a checkout"),
        (
            ["cpu", "drpo"],
            {"SLURM_GPUS_ON_NODE": ""},
            "SLURM gave no GPUs; ask for them with --gpus-per-node",
        ),
    ],
)
def test_wrong_submission_is_refused(folder, arguments, environment, message):
    done = sbatch(folder, *arguments, **environment)
    assert done.returncode == 2 and re.search(message, done.stderr)
