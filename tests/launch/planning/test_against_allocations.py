"""The plan of a run against what torch's allocator hands out while the run trains: exact counts, no resident memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from torch.profiler import ProfilerActivity, profile

from drpo.api import train_online, train_preference, train_sft
from drpo.config import load_recipe
from launch.experiments.memory_plan import CASES, LAUNCHERS, MemoryPlanRecipe, make_inputs, plan, settings_of
from launch.planning.stages import STAGES
from reward_models.api import train_reward_model

SHAPE = MemoryPlanRecipe(
    hidden_size=128, num_layers=3, vocab_size=4096, prompt_length=48, response_length=16, microbatch_size=4
)
TRAIN = {
    "sft": train_sft,
    "reward_model": train_reward_model,
    "dpo": train_preference,
    "ppo": lambda recipe: train_online(recipe),
}


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes that torch had handed out at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    now = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_inputs(SHAPE, root)
    return root


FAST = ("sft lora", "reward_model", "dpo", "ppo checkpointing")
IN_4BIT = ("sft lora 4bit", "ppo lora 4bit")
IN_ONE_PROCESS = [case for case in (*CASES, *IN_4BIT) if not set(LAUNCHERS) & set(case.split())]


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in IN_ONE_PROCESS]
)
def test_plan_is_what_a_run_allocates(case, inputs, tmp_path, monkeypatch):
    """Within the 15% that a plan promises; allocations are the same in every run, so this cannot flicker."""
    monkeypatch.chdir(inputs)
    monkeypatch.syspath_prepend(inputs)
    settings = settings_of(SHAPE, inputs, case, "large") | {"run_dir": str(tmp_path / "run")}
    settings |= {"eval": {"every": 0}, "checkpoint": {"every": 0}, "num_steps": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = case.partition(" ")[0]
    recipe = load_recipe(STAGES[command.replace("_", "-")].recipe, path, [])
    measured = allocated_peak(lambda: TRAIN[command](recipe))
    assert plan(SHAPE, inputs, case, "large") * 2**30 == pytest.approx(measured, rel=0.15)
