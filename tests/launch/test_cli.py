"""The installed command: what it starts, what it refuses, and that a wheel holds all it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import CLEAN, ROOT, finished

from launch.cli import COMMANDS, accelerate_config, accelerate_configs

TINY = [
    *("num_steps=2", "data.demo.num_train=64", "data.demo.num_eval=8", "eval.every=0", "engine.trackers=[]"),
    *("engine.mixed_precision=no", "optim.warmup_steps=0"),
]
SMALL = [
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "sample.num_prompts=0",
]


def drpo(*arguments: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**CLEAN, "PYTHONPATH": str(path)}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    if path == ROOT:
        return finished(command, cwd=cwd, env=environment)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)


def test_every_command_is_a_script_and_every_script_a_command():
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py") if "__main__" in path.read_text()}
    assert {command.replace("-", "_") for command in COMMANDS} == scripts - {"cli", "demo", "demo_real"}


def test_shipped_accelerate_configs_are_found_by_name_and_others_by_path(tmp_path):
    for name in accelerate_configs():
        assert accelerate_config(name) == ROOT / "launch" / "accelerate" / f"{name}.yaml"
    own = tmp_path / "mine.yaml"
    own.touch()
    assert accelerate_config(str(own)) == own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trane"], "drpo: unknown command trane; there are sft, reward-model, drpo"),
        (["launch"], "drpo: launch needs a command: sft"),
        (
            ["launch", "--accelerate", "zero9", "drpo"],
            "drpo: no accelerate config zero9; the shipped ones are cpu",
        ),
        (["launch", "--accelerate", "cpu"], "drpo: --accelerate needs a name (cpu"),
        (["sft", "nothing.yaml"], "drpo sft: no recipe nothing.yaml here or in launch/recipes"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, arguments, message):
    done = drpo(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_help_and_the_environment_are_shown(tmp_path):
    assert "drpo launch [--accelerate NAME] COMMAND" in drpo(cwd=tmp_path).stdout
    assert "rollout.batch_size" in drpo("drpo", "--help", cwd=tmp_path).stdout
    shown = drpo("env", cwd=tmp_path).stdout
    lines = dict(line.split(": ", 1) for line in shown.splitlines())
    assert {"drpo", "python", "torch", "deepspeed", "CPU", "precision"} <= lines.keys()
    assert lines["torch"][0].isdigit() and lines["precision"].startswith(("float32", "bf16"))


def test_two_processes_are_launched_with_a_shipped_config(tmp_path):
    arguments = ["sft", "demo/sft.yaml", *TINY, *SMALL, "run_dir=two"]
    done = drpo("launch", "--accelerate", "cpu", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two" / "policy" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_wheel_runs_the_chain_in_a_fresh_folder(tmp_path):
    """Recipes, accelerate configs, pages and prices are in it, and nothing reads the source tree."""
    source, wheels, site, folder = (tmp_path / name for name in ("source", "wheels", "site", "folder"))
    folder.mkdir()
    names = ("drpo", "reward_models", "eval", "launch", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    for name in names:  # a build leaves files in its source
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = wheels.glob("drpo-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True
    )
    where = [sys.executable, "-c", "import drpo, launch; print(drpo.__file__, launch.__file__)"]
    found = subprocess.run(
        where, cwd=folder, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert found.stdout.count(str(site)) == 2, found

    def run(*arguments: str) -> None:
        done = drpo(*arguments, cwd=folder, path=site)
        assert done.returncode == 0, f"{arguments}: {done.stderr[-3000:]}"

    policy = "model.path=sft/policy"
    run("sft", "demo/sft.yaml", *TINY, *SMALL, "run_dir=sft")
    run("reward-model", "demo/reward_model.yaml", *TINY, policy, "run_dir=rm", "score.num_references=0")
    online = ["rollout.batch_size=16", "ppo.num_minibatches=1", "ppo.microbatch_size=8", "ppo.num_epochs=1"]
    run("drpo", "demo/drpo.yaml", *TINY, *online, policy, "reward.path=rm/reward_model", "run_dir=drpo")
    systems = 'systems=[{name: "SFT", policies: [sft/policy]}, {name: "DR-PO", policies: [drpo/policy]}]'
    asked = ["complete.data.demo.num_eval=8", "kl_reference=null", "reward_model=null"]
    run("compare", "demo/compare.yaml", systems, *asked, "run_dir=compare")
    assert "DR-PO" in (folder / "compare" / "report.html").read_text()
    run("label", "--help")
