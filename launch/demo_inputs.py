"""Create the missing inputs of the embedded demo recipes: policies, a reward model, completions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from drpo.data.tasks.demo import DemoConfig, make_demo
from eval.completions.rows import CompletionRow, CompletionsWriter, prompt_id_of

LAUNCH = Path(__file__).resolve().parent
DEMO_RUNS = Path("runs/demo")
DEMO_COMPLETIONS = Path("runs/demo/completions/texts.jsonl")
NUM_POSTS = 256

# In order of creation: the folder that a stage writes, and the script and recipe that write it.
STAGES = {
    DEMO_RUNS / "sft" / "policy": ("sft.py", "demo/sft.yaml"),
    DEMO_RUNS / "sft_often" / "policy": ("sft.py", "demo/sft_often.yaml"),
    DEMO_RUNS / "reward_model" / "reward_model": ("reward_model.py", "demo/reward_model.yaml"),
    DEMO_RUNS / "dpo" / "policy": ("dpo.py", "demo/dpo.yaml"),
    DEMO_RUNS / "ppo" / "policy": ("ppo.py", "demo/ppo.yaml"),
    DEMO_RUNS / "drpo" / "policy": ("drpo.py", "demo/drpo.yaml"),
}

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")


def make_demo_inputs(*needed: str | None) -> None:
    """Make what is in `needed`, belongs to the demo and is missing, in one process, before any engine exists.

    Under a multi-process launch the first process runs the stages, and the others wait.
    """
    if str(DEMO_COMPLETIONS) in needed and not DEMO_COMPLETIONS.exists():
        _write_completions()
    missing = [folder for folder in STAGES if str(folder) in needed and not folder.exists()]
    if not missing:
        return
    if int(os.environ.get("RANK", 0)) > 0:
        while not all(folder.exists() for folder in missing):
            time.sleep(1)
        return
    for folder in missing:
        script, recipe = STAGES[folder]
        print(f"{folder} is missing: making it with launch/{script} {recipe}", flush=True)
        subprocess.run(
            [sys.executable, str(LAUNCH / script), recipe], check=True, env=single_process_environment()
        )


def single_process_environment() -> dict[str, str]:
    """Return this environment without the variables that a multi-process launcher set."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith(LAUNCHER_PREFIXES)
    }


def _write_completions() -> None:
    print(f"{DEMO_COMPLETIONS} is missing: writing it", flush=True)
    config = DemoConfig(num_eval=NUM_POSTS)
    by_writers = make_demo(config, "demonstrations", "eval")
    by_annotator = make_demo(config, "prompts", "eval")
    rows = []
    for written, pair in zip(by_writers, by_annotator, strict=True):
        texts = {"writers": written.completion, "chosen": pair.chosen, "rejected": pair.rejected}
        for system, text in texts.items():
            prompt_id = prompt_id_of(pair.prompt)
            rows.append(CompletionRow(system, prompt_id, pair.prompt, text, True, None, 0, pair.completion))
    CompletionsWriter(DEMO_COMPLETIONS, {"data": "demo", "seed": config.seed}).write(rows)
