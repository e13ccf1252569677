"""What the engine takes from the environment."""

from __future__ import annotations

import sys

import pytest
import warm_python
from tiny_runs import CLEAN, ROOT

from drpo.config import ConfigError
from drpo.engine import Engine, EngineConfig


@pytest.mark.parametrize("value", ["", "maybe"])
@pytest.mark.parametrize("name", ["USE_CPU", "USE_FSDP", "DEBUG_MODE", "CPU_AFFINITY"])
def test_a_variable_that_is_neither_true_nor_false_is_named(monkeypatch, tmp_path, name, value):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(
        ConfigError, match=f"variable ACCELERATE_{name} is '{value}': set it to true or false"
    ):
        Engine(EngineConfig(trackers=[], mixed_precision="no"), tmp_path, 0, None)


PARTITIONED = """
import json, os, sys
from pathlib import Path
import torch
from drpo.engine import Engine, EngineConfig

stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": stage}
Path(sys.argv[1]).write_text(json.dumps(settings))
os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = sys.argv[1]
engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), Path("."), 0, None)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
inputs = torch.ones(1, 4)
expected = model(inputs)
engine.place(model, as_trained=False)
engine.partition(model)
first, second = model[0].weight, model[1].weight  # read from a module in a forward, a weight would be gathered
sizes = []
model[1].register_forward_pre_hook(lambda module, args: sizes.append((first.numel(), second.numel())))
print(torch.allclose(model(inputs), expected))
print([weight.numel() for weight in model.parameters()], sizes)
"""


def test_a_partitioned_frozen_model_gathers_a_layer_at_a_time(tmp_path):
    """Between forwards no process has any whole weight; in one, only the layer that runs."""
    pytest.importorskip("deepspeed")
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    (tmp_path / "partitioned.py").write_text(PARTITIONED)
    command = [sys.executable, "partitioned.py", "zero3.json"]
    environment = CLEAN | {"PYTHONPATH": str(ROOT)} | environment
    done = warm_python.completed(command, tmp_path, environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["True", "[0, 0, 0, 0] [(0, 6)]"]


def test_what_was_left_for_the_end_is_done_by_one_process_too(tmp_path):
    engine = Engine(EngineConfig(trackers=[], mixed_precision="no"), tmp_path, 0, None)
    done = []
    engine.at_close(lambda: done.append(1))
    assert not done
    engine.close()
    assert done == [1]
