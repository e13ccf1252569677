"""The check on a GPU, on a CPU: its arithmetic, what it refuses, parts that go wrong, and all of it with tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from online_runs import forget_precision

from drpo.config import ConfigError
from launch.command_line import StageFailed
from launch.experiments import gpu_check
from launch.experiments.gpu_check import CPU_SIZES, GpuCheckRecipe, do_part, end_tree, last_lines, numbers
from launch.experiments.gpu_check_parts import CHECKS, PARTS, SPEEDS, Finding, difference, first_ratio, merged

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the check on a GPU is tested without one")


def tiny(run_dir: Path, **changes) -> GpuCheckRecipe:
    settings = {"allow_cpu": True, "num_threads": 1, "num_jobs": 2, **CPU_SIZES, **changes}
    return GpuCheckRecipe(run_dir=str(run_dir), **settings)


def parts_of(run_dir: Path) -> dict[str, dict]:
    parts = json.loads((run_dir / "results.json").read_text())["parts"]
    return {part["part"]: part for part in parts}


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_difference_is_relative_above_1_and_sees_nan():
    rows, others = [{"a": 0.5, "b": 200.0}], [{"a": 0.5001, "b": 202.0}]
    assert difference(rows, others).value == pytest.approx(0.01) and not difference(rows, others).is_right
    assert difference(rows, [{"a": 0.5001, "b": 200.1}]).is_right
    assert not difference(rows, [{"a": math.nan, "b": 200.0}]).is_right


@pytest.mark.parametrize("others", [[], [{"a": 1.0, "b": 2.0}]])
def test_runs_with_other_metrics_are_not_compared(others):
    with pytest.raises(StageFailed, match="other metrics, or another number of steps"):
        difference([{"a": 1.0}], others)


@pytest.mark.parametrize(
    ("ratio", "right"), [(1.0, True), (0.9999999, True), (1.0001, False), (math.nan, False)]
)
def test_ratio_must_be_1_in_every_step(ratio, right):
    rows = [{"ppo/ratio": value, "ppo/approx_kl": 0.0} for value in (1.0, ratio)]
    assert [finding.is_right for finding in first_ratio(rows)] == [right, True]


def test_numbers_name_their_limits():
    findings = [Finding("a", 12345.6), Finding("b", 1e-7, 1e-6)]
    assert numbers(findings) == "a 12,346; b 1e-07 (at most 1e-06)"


def test_later_settings_win_within_sections():
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ["odd"]}, "^parts must be some of small_inputs, "),
        ({"parts": []}, "^parts must be some of small_inputs, "),
        ({"only": "odd"}, "^only must be null or one of small_inputs, "),
        ({"generation_batch_sizes": [4, 0]}, r"^generation_batch_sizes must be numbers >= 1, got \[4, 0\]"),
        ({"batch_size": 3}, r"^batch_size \(3\) must be a multiple of microbatch_size \(2\)"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, **changes)


def test_without_a_gpu_it_says_so_and_touches_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no GPU here; allow_cpu=true runs the same parts"):
        gpu_check.run(tiny(tmp_path / "run", allow_cpu=False))
    assert not (tmp_path / "run").exists()


def test_results_of_another_run_are_not_mixed_in(tmp_path):
    with pytest.raises(ConfigError, match="^run_dir: .* exists; move it away"):
        gpu_check.run(tiny(tmp_path))


# --- parts that go wrong ------------------------------------------------------------------------------------


def test_part_that_fails_is_reported_with_its_log_and_the_others_go_on(tmp_path):
    root = tmp_path / "run"
    with pytest.raises(StageFailed, match="offload: failed.*; see .*results.md"):
        gpu_check.run(tiny(root, parts=["offload", "vllm"]))
    parts = parts_of(root)
    assert "to compare with: the part small_inputs failed, or was left out" in parts["offload"]["detail"]
    if importlib.util.find_spec("vllm") is None:
        assert parts["vllm"]["result"] == "skipped" and "vllm is not installed" in parts["vllm"]["detail"]
    text = (root / "results.md").read_text()
    assert "| offload | failed |" in text and "| vllm | " in text and "GPU: none" in text


def test_parts_over_the_limits_are_ended_or_not_begun(tmp_path):
    root = tmp_path / "run"
    message = "small_inputs: over time, rollouts: not begun; see"
    with pytest.raises(StageFailed, match=message):
        gpu_check.run(tiny(root, parts=["small_inputs", "rollouts"], total_seconds=0.3))
    assert "small_inputs.log:" in parts_of(root)["small_inputs"]["detail"]


def test_what_a_process_started_in_another_session_ends_with_it(tmp_path):
    inner = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], start_new_session=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    child = psutil.Process(int(pid.read_text()))
    end_tree(process)
    assert process.poll() is not None
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_ends_of_logs_are_those_of_the_newest_run_and_of_the_part(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "run.log").write_text("".join(f"line {i}\n" for i in range(50)))
    (tmp_path / "lora.log").write_text("x" * 1000)
    lines = last_lines(tmp_path, "lora").splitlines()
    assert lines[0] == "lora/run.log:" and lines[1] == "line 38" and lines[12] == "line 49"
    assert lines[13:] == ["lora.log:", "x" * 300]


# --- runs ---------------------------------------------------------------------------------------------------


def test_rollouts_are_measured_for_each_number_of_rows(tmp_path):
    setup = tiny(tmp_path).setup
    do_part(setup, "large_inputs")
    forget_precision()
    try:
        path = do_part(setup, "rollouts")
    finally:
        forget_precision()
    found = [Finding(**finding) for finding in json.loads(path.read_text())["findings"]]
    assert [finding.name for finding in found] == [
        f"{what}/s of {size}" for size in (2, 4) for what in ("rollouts", "tokens")
    ]
    # The policy never ends a response of 8 tokens.
    for rollouts, tokens in zip(found[::2], found[1::2], strict=True):
        assert tokens.value == pytest.approx(8 * rollouts.value) and rollouts.value > 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_all_parts_pass_on_a_cpu(tmp_path):
    root = tmp_path / "run"
    gpu_check.run(tiny(root, part_seconds=600, total_seconds=3000))
    parts = parts_of(root)
    assert set(parts) == set(PARTS)
    for name, part in parts.items():
        skipped = {"vllm": "vllm", "dpo": "trl", "four_bit": "bitsandbytes"}.get(name)
        allowed = "skipped" if skipped and importlib.util.find_spec(skipped) is None else "passed"
        assert part["result"] == allowed, part
    findings = {name: {f["name"]: f["value"] for f in part["findings"]} for name, part in parts.items()}
    for name in (*CHECKS, *SPEEDS):
        assert findings[name] or parts[name]["result"] == "skipped"
    assert findings["zero2"].keys() == findings["zero3"].keys() == findings["fsdp2"].keys()
    assert 0 < findings["ppo"]["update, share of the peak"] < 1
    # 4 rollouts of 24 + 8 tokens, 4 epochs.
    tokens = findings["ppo"]["update tokens/s"] * findings["ppo"]["update, s"]
    assert tokens == pytest.approx(4 * 32 * 4)
