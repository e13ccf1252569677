"""An engine in float32 and a policy's tokenizer, for servers and their clients."""

from __future__ import annotations

from pathlib import Path

import pytest
from online_runs import forget_precision
from tiny_tokenizers import CHATML, single_bytes

from drpo.engine import Engine, EngineConfig


@pytest.fixture
def engine(tmp_path):
    forget_precision()
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    yield engine
    engine.close()
    forget_precision()


@pytest.fixture
def policy(tmp_path) -> Path:
    """Folder of the policy's tokenizer."""
    tokenizer = single_bytes()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"
