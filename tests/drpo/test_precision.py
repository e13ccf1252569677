"""Which precision a run takes, and what it says about it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from online_runs import forget_precision
from tiny_runs import CLEAN, ROOT

from drpo import precision
from drpo.config import ConfigError
from drpo.config_help import options
from drpo.engine import Engine, EngineConfig
from drpo.precision import (
    bf16_over_float32,
    choose_precision,
    multiplies_bf16,
    settled_why,
    slow_bf16_warning,
)
from drpo.trainers.sft import SFTRecipe
from eval.comparing.recipe import CompareRecipe
from eval.completions.recipe import CompleteRecipe

CPUINFO = Path("/proc/cpuinfo")
ENVIRONMENT = CLEAN | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
CAPS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@pytest.fixture(autouse=True)
def fresh():
    """A process as it starts, as far as accelerate goes."""
    forget_precision()
    yield
    forget_precision()


# --- who decides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, launcher, precision",
    [
        ("no", "bf16", "no"),
        ("bf16", "no", "bf16"),
        ("bf16", None, "bf16"),
        (None, "bf16", "bf16"),
        (None, "no", "no"),
    ],
)
def test_the_recipe_wins_over_the_launcher_and_the_launcher_over_the_machine(recipe, launcher, precision):
    chosen, why = choose_precision(recipe, launcher, "cpu")
    assert chosen == precision
    assert ("recipe" if recipe else "accelerate launch") in why


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists() or any(cap in os.environ for cap in CAPS),
    reason="the machine's word on bf16 is read from /proc/cpuinfo of an x86 that nothing holds down",
)
def test_without_a_word_the_machine_decides():
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    fast = "avx512_bf16" in flags or "amx_tile" in flags
    assert choose_precision(None, None, "cpu")[0] == ("bf16" if fast else "no")
    assert ("is faster here" in choose_precision(None, "no", "cpu")[1]) == fast


@pytest.mark.parametrize(
    "cap", [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}], ids=["torch", "oneDNN"]
)
def test_a_cpu_that_is_held_to_avx2_has_no_fast_bf16(cap):
    code = "from drpo.precision import choose_precision; print(*choose_precision(None, None, 'cpu'))"
    assert said(code, cap) == ["no since this CPU has no fast bf16 products"]


def test_a_device_that_torch_cannot_be_asked_about_gets_float32():
    assert not multiplies_bf16("meta")


def said(code: str, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- what the engine says -------------------------------------------------------------------------------


ENGINES = """
from pathlib import Path
import torch
from drpo.engine import Engine, EngineConfig
from online_runs import forget_precision

for precision in ("bf16", None):
    engine = Engine(EngineConfig(mixed_precision=precision, trackers=[]), Path("."), 0, None)
    engine.place(torch.nn.Linear(2, 2, dtype=torch.bfloat16), as_trained=False)
    engine.place(torch.nn.Linear(2, 2, dtype=torch.bfloat16), as_trained=False)
    forget_precision()
"""


def test_bf16_where_it_is_slow_gets_one_warning_with_the_ratio():
    """Under autocast, and in the weights alone."""
    lines = said(ENGINES, {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"})
    assert len(lines) == 4
    assert lines[0] == "precision: bf16, as the recipe says"
    assert lines[2] == "precision: float32, since this CPU has no fast bf16 products"
    before, after = (
        "warning: bf16 is slow on this CPU: a matrix product takes ",
        " times as long as in float32.",
    )
    for warning in lines[1::2]:
        assert warning.startswith(before) and after in warning
        assert float(warning.removeprefix(before).partition(after)[0]) > 1


@pytest.mark.parametrize(
    "recipe, keys",
    [
        (SFTRecipe, {"engine.mixed_precision", "model.dtype"}),
        (CompareRecipe, {"complete.mixed_precision", "complete.dtype"}),
        (CompleteRecipe, {"mixed_precision", "dtype"}),
    ],
)
def test_the_warning_names_the_keys_of_the_recipes(recipe, keys, monkeypatch):
    monkeypatch.setattr(precision, "bf16_over_float32", lambda device: 30.0)
    words = set(slow_bf16_warning("meta").replace("=", " ").replace(",", " ").split())
    assert keys <= words
    assert keys <= {option.key for option in options(recipe)}


def test_an_engine_says_once_what_it_computes_in(tmp_path, capsys):
    first = Engine(EngineConfig(trackers=[]), tmp_path, 0, None)
    assert first.precision == "no"  # the suite's ACCELERATE_MIXED_PRECISION
    assert capsys.readouterr().out.startswith("precision: float32, as accelerate launch says")
    second = Engine(EngineConfig(trackers=[]), tmp_path, 0, None)
    assert (second.precision, capsys.readouterr().out) == ("no", "")


def test_what_null_stands_for_is_settled_for_the_whole_process(tmp_path):
    Engine(EngineConfig(mixed_precision="bf16", trackers=[]), tmp_path, 0, None)
    assert Engine(EngineConfig(trackers=[]), tmp_path, 0, None).precision == "bf16"


@pytest.mark.parametrize("word", ["fp16", "fp8"])
def test_a_precision_that_we_do_not_train_in_is_refused(word, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", word)
    with pytest.raises(ConfigError, match=f"mixed_precision={word}.*must be no or bf16"):
        Engine(EngineConfig(trackers=[]), tmp_path, 0, None)


def test_deepspeed_s_own_config_is_held_against_what_was_asked_for():
    assert settled_why("bf16", "bf16", "bf16", "as asked") == "as asked"
    assert settled_why(None, None, "bf16", "") == ""
    assert settled_why(None, "no", "bf16", "as the launcher says") == "as the DeepSpeed config says"
    with pytest.raises(ConfigError, match="recipe's mixed_precision is bf16, but DeepSpeed's config says no"):
        settled_why("bf16", "bf16", "no", "as asked")
    with pytest.raises(ConfigError, match="mixed_precision=fp16"):
        settled_why(None, "no", "fp16", "")


def test_the_measurement_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert bf16_over_float32("cpu") > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


PLACED = """
from pathlib import Path
import torch
from tiny_models import tiny_model
from drpo.engine import Engine, EngineConfig

engine = Engine(EngineConfig(trackers=[]), Path("."), 0, None)
placed, trained = (tiny_model("gemma2") for _ in range(2))
engine.place(placed, as_trained=True)
engine.prepare(trained, torch.optim.AdamW(trained.parameters()))
for model in (placed, trained):
    print(sorted((name, str(t.dtype)) for name, t in (*model.named_parameters(), *model.named_buffers())))
"""


def test_a_reference_has_the_precision_of_a_policy_that_deepspeed_trains(tmp_path):
    """Weights in bfloat16, rotary frequencies in float32, as transformers loads them."""
    pytest.importorskip("deepspeed")
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}
    launched |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    script = tmp_path / "placed.py"
    script.write_text(PLACED)
    done = warm_python.completed([sys.executable, str(script)], ROOT, ENVIRONMENT | launched, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, placed, trained = done.stdout.splitlines()
    assert placed == trained
    assert "('model.rotary_emb.inv_freq', 'torch.float32')" in placed
    assert "('model.norm.weight', 'torch.bfloat16')" in placed
