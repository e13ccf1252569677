"""What the engine takes from the environment."""

from __future__ import annotations

import pytest

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
