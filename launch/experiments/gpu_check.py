"""Check every path of training on a GPU, then measure rollouts, PPO and DPO of a model of 1B weights: 8 minutes.

    python launch/experiments/gpu_check.py [recipe.yaml] [key=value ...]

Every part (launch/experiments/gpu_check_parts.py) is a process of its own with a time limit. One that fails or runs
over is reported with the last lines of its log, and the others go on. results.json and results.md are written after
every part. It needs no network; vLLM and TRL are included where they are installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import psutil
import torch
import yaml

from drpo.config import ConfigError, Section, refuse, setting
from launch.command_line import StageFailed, main
from launch.environment import environment_text
from launch.experiments.gpu_check_parts import CHECKS, PARTS, SPEEDS, Finding, Setup, Skipped
from launch.experiments.results import markdown_table, write_results
from launch.experiments.speed import SpeedRecipe

WAVES = (("small_inputs",), (*CHECKS, "large_inputs"), *((name,) for name in SPEEDS))
"Parts that may run at the same time; those that measure speed run alone."
CPU_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 300,
    "prompt_length": 24,
    "response_length": 8,
    "batch_size": 4,
    "microbatch_size": 2,
    "generation_batch_sizes": [2, 4],
    "lora_rank": 2,
}
LOG_LINES, LOG_WIDTH = 12, 300
"What is shown of a log."
GOOD = ("passed", "skipped")


@dataclass(frozen=True)
class GpuCheckRecipe(Section):
    """Settings of the check: parts, time limits, and the sizes of the model whose speed is measured."""

    run_dir: str = "runs/gpu_check"
    """Folder of the inputs, of every part, and of results.json and results.md; it must not exist."""
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """Which parts are done. Checks need small_inputs, the measurements large_inputs."""
    only: str | None = None
    """Do this part alone, in this process, with what is in run_dir; null: all, each in its own."""
    allow_cpu: bool = False
    """Without a GPU: run the same parts on the CPU, in float32 and with tiny sizes in place of those below."""
    part_seconds: float = setting(200, gt=0)
    """Time limit of a part."""
    total_seconds: float = setting(480, gt=0)
    """Time limit of all parts together."""
    num_jobs: int = setting(4, ge=1)
    """Checks that run at the same time; measurements run alone."""
    num_threads: int = setting(4, ge=1)
    """OMP_NUM_THREADS of every process."""
    hidden_size: int = setting(2048, ge=8)
    """Width of the random GPT-NeoX models whose speed is measured."""
    num_layers: int = setting(16, ge=1)
    """Their layers."""
    num_heads: int = setting(16, ge=1)
    """Their attention heads."""
    vocab_size: int = setting(50304, ge=100)
    """Their vocabulary."""
    prompt_length: int = setting(256, ge=2)
    """Tokens of a prompt."""
    response_length: int = setting(53, ge=2)
    """Tokens of a response."""
    batch_size: int = setting(64, ge=1)
    """Rollouts or pairs of a step."""
    microbatch_size: int = setting(8, ge=1)
    """Rows or pairs per forward."""
    generation_batch_sizes: list[int] = field(default_factory=lambda: [64, 256, 512])
    """Numbers of rows decoded together, a measurement each."""
    lora_rank: int = setting(64, ge=1)
    """Rank of PPO's adapters."""
    seed: int = setting(0, ge=0)
    """Seed of weights, texts and rollouts."""

    def check(self) -> None:
        unknown = not self.parts or not set(self.parts) <= set(PARTS)
        refuse(unknown, "parts", f"must be some of {', '.join(PARTS)}")
        refuse(self.only not in (None, *PARTS), "only", f"must be null or one of {', '.join(PARTS)}")
        sizes = self.generation_batch_sizes
        refuse(not sizes or min(sizes) < 1, "generation_batch_sizes", f"must be numbers >= 1, got {sizes}")
        self.setup.large.check()  # batch_size against microbatch_size

    @property
    def setup(self) -> Setup:
        """What the parts need to know."""
        shared = ("hidden_size", "num_layers", "num_heads", "vocab_size", "prompt_length", "response_length")
        shared += ("batch_size", "microbatch_size", "num_threads", "seed")
        precision = "bf16" if torch.cuda.is_available() else "no"
        sizes = {name: getattr(self, name) for name in shared}
        large = SpeedRecipe(cases=["ppo", "dpo"], precision=precision, **sizes)
        batch_sizes = tuple(self.generation_batch_sizes)
        return Setup(Path(self.run_dir).resolve(), large, batch_sizes, self.lora_rank, self.num_threads)


def run(recipe: GpuCheckRecipe) -> Path:
    """Do the parts and write what they found; raise StageFailed, after the last one, if one of them went wrong."""
    root = Path(recipe.run_dir).resolve()
    if not torch.cuda.is_available():
        if not recipe.allow_cpu:
            raise ConfigError("no GPU here; allow_cpu=true runs the same parts on the CPU with tiny sizes")
        recipe = replace(recipe, **CPU_SIZES)
    if recipe.only is not None:
        return do_part(recipe.setup, recipe.only)
    if root.exists():
        raise ConfigError(f"run_dir: {root} exists; move it away, or choose another folder")
    root.mkdir(parents=True)
    settings = root / "recipe.yaml"
    settings.write_text(yaml.safe_dump(asdict(recipe)))
    environment, end = environment_text(), time.monotonic() + recipe.total_seconds
    done: list[dict[str, Any]] = []
    for wave in WAVES:
        with ThreadPoolExecutor(recipe.num_jobs) as pool:
            names = [name for name in wave if name in recipe.parts]
            for job in as_completed(pool.submit(run_part, recipe, settings, name, end) for name in names):
                done.append(job.result())
                print(row_text(done[-1]), flush=True)
                save(root, recipe, environment, done)
    save(root, recipe, environment, done)
    if wrong := [f"{part['part']}: {part['result']}" for part in done if part["result"] not in GOOD]:
        raise StageFailed(f"{', '.join(wrong)}; see {root / 'results.md'}")
    return root / "results.md"


def do_part(setup: Setup, name: str) -> Path:
    """Do one part in this process; write its findings after each of them."""
    path, found, skipped = setup.root / f"{name}.json", [], None

    def write() -> None:
        path.write_text(json.dumps({"findings": [asdict(finding) for finding in found], "skipped": skipped}))

    try:
        for finding in PARTS[name](setup):
            found.append(finding)
            write()
    except Skipped as reason:
        skipped = str(reason)
        write()
    return path


def run_part(recipe: GpuCheckRecipe, settings: Path, name: str, end: float) -> dict[str, Any]:
    """Do one part in a process of its own; return its result, findings, seconds, and a reason or the end of its log.

    Args:
        recipe: limits.
        settings: file of the recipe.
        name: of the part.
        end: time by `time.monotonic` at which all parts end.
    """
    root, start = settings.parent, time.monotonic()
    limit = min(recipe.part_seconds, end - start)
    if limit <= 0:
        return {"part": name, "result": "not begun", "seconds": 0.0, "findings": [], "detail": "no time left"}
    command = [sys.executable, str(HERE / "gpu_check.py"), str(settings), f"only={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(recipe.num_threads)}
    with (root / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_tree(process)
    path = root / f"{name}.json"
    written = json.loads(path.read_text()) if path.exists() else {"findings": [], "skipped": None}
    findings = [Finding(**finding) for finding in written["findings"]]
    result, detail = "passed", ""
    if code != 0:
        result = "over time" if code is None else "failed"
        detail = last_lines(root, name)
    elif not all(finding.is_right for finding in findings):
        result = "wrong"
    elif written["skipped"] is not None:
        result, detail = "skipped", written["skipped"]
    seconds = time.monotonic() - start
    return {"part": name, "result": result, "seconds": seconds, "findings": findings, "detail": detail}


def end_tree(process: subprocess.Popen) -> None:
    """End a process that has not ended, and all that it started: a launcher's workers are in sessions of their own."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for one in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def last_lines(root: Path, name: str) -> str:
    """Return the ends of the newest log of a part's runs, and of its own."""
    logs = sorted((root / name).glob("*.log"), key=lambda path: path.stat().st_mtime)[-1:]
    ends = []
    for log in [*logs, root / f"{name}.log"]:
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        ends += [f"{log.relative_to(root)}:", *(line[:LOG_WIDTH] for line in lines)]
    return "\n".join(ends)


def row_text(part: dict[str, Any]) -> str:
    """Format what a part found as one line."""
    return f"{part['part']}: {part['result']} after {part['seconds']:.0f} s; {numbers(part['findings'])}"


def numbers(findings: Sequence[Finding]) -> str:
    """Format findings: numbers, and the limits of those that have one."""
    return "; ".join(
        f"{finding.name} {finding.value:{',.0f' if finding.value >= 1000 else '.3g'}}"
        + ("" if finding.limit is None else f" (at most {finding.limit:g})")
        for finding in findings
    )


def save(root: Path, recipe: GpuCheckRecipe, environment: str, done: Sequence[dict[str, Any]]) -> None:
    """Write results.json and results.md: the machine, a row for each part, and the ends of logs."""
    rows = [
        {
            "part": part["part"],
            "result": part["result"],
            "seconds": f"{part['seconds']:.0f}",
            "found": numbers(part["findings"]),
        }
        for part in done
    ]
    ends = [
        f"{part['part']}: {part['result']}\n\n```\n{part['detail']}\n```\n" for part in done if part["detail"]
    ]
    text = "\n".join([f"```\n{environment}\n```\n", markdown_table(rows), *ends])
    results = {
        "recipe": asdict(recipe),
        "environment": environment.splitlines(),
        "parts": [{**part, "findings": [asdict(finding) for finding in part["findings"]]} for part in done],
    }
    write_results(root, results, text, show=False)


if __name__ == "__main__":
    main(GpuCheckRecipe, "demo/gpu_check.yaml", run)
